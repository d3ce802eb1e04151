"""`simulate`: run an experiment, go on with one, or show what would be trained."""

from __future__ import annotations

import os
from collections.abc import Sequence

from fedra_engine.commands.run_request import parse_request
from fedra_engine.config.parsing import quiet_libraries

DESCRIPTION = """Federated LoRA tuning of a transformer foundation model by many heterogeneous clients.

  fedra simulate --rounds 20 --method.allocation covered --clients.capacities 12,10,8,6,4,3
  fedra simulate --config pacs_vit_s14 --data.root PACS --model.path VIT --dry-run
  fedra simulate --resume runs/NAME
"""


def main(arguments: Sequence[str]) -> None:
    """Run the experiment that `arguments` describe, or go on with one, or show what would be trained.

    Raises:
        InputError: they describe none, or something in it cannot be used.
    """
    request = parse_request(arguments, DESCRIPTION)
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
