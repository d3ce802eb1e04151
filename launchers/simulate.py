"""Simulates federated LoRA tuning of a foundation model by many heterogeneous clients.

python launchers/simulate.py --help
"""

from __future__ import annotations

import os
import sys

from fedra_engine.runtime.exit_codes import end, exit_code


def main() -> None:
    """Run the experiment that the command line describes, or go on with one, or show what would be trained."""
    from fedra_engine.commands.parsing import quiet_libraries
    from fedra_engine.commands.run_request import parse_request

    request = parse_request(sys.argv[1:], description="Federated LoRA tuning of a transformer foundation model.")
    quiet_libraries()
    if os.environ.get("RANK", "0") == "0":
        print("loading torch and transformers …", flush=True)
    # Imported late: they take seconds, and a mistyped option should fail at once.
    from fedra_engine.commands.dry_run import print_probe
    from fedra_engine.models.sharding import refuse_sharding
    from fedra_engine.run import run
    from fedra_engine.runtime.processes import Processes, join_job

    accelerator = join_job()
    if request.dry_run:
        refuse_sharding(accelerator, "dry_run")
        if Processes.of(accelerator).is_main:
            print_probe(request.config, accelerator.device)
        return
    run(request.config, request.resumed, accelerator=accelerator)


if __name__ == "__main__":
    end(exit_code(main))
