"""Tests and measures the engine on one GPU in less than eight minutes: `python launchers/gpu_report.py OUTPUT_DIR`.

Needs torch, triton, numpy, transformers, peft, accelerate, safetensors, rich, matplotlib, pytest, hypothesis and
scikit-learn; the package itself need not be installed. Every stage leaves a JSON file as it goes; report.json and
report.md come last, with a short table on the terminal. Exit code 1 when a stage failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A GPU machine may lack this package. Stages run as processes of their own and need the path too.
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path[:2], os.environ.get("PYTHONPATH", "")]))
# Nothing here is downloaded.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main() -> None:
    """Run one stage in this process, or every stage in a process of its own."""
    options = _parse(sys.argv[1:])
    import torch

    from fedra_engine.errors import InputError

    if not torch.cuda.is_available():
        raise InputError("device: found no GPU, expected one; `launchers/microbench.py kernels` measures a CPU")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if options.stage:
        from fedra_engine.benchmarks.gpu.stages import run_stage

        run_stage(options.stage, options.output_dir, torch.device("cuda", 0))
    elif not _report(options.output_dir):
        sys.exit(1)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="folder for the results; made if there is none")
    parser.add_argument(
        "--stage",
        choices=["tests", "checks", "kernels", "end_to_end", "scaling"],
        help="run this stage alone, in this process, without a report",
    )
    return parser.parse_args(arguments)


def _report(folder: Path) -> bool:
    """Run all stages. Returns whether all went well."""
    import torch
    from rich.console import Console

    from fedra_engine.benchmarks.gpu.stages import run_stages
    from fedra_engine.benchmarks.gpu.summary import read_findings, short_table, write_report
    from fedra_engine.benchmarks.kernels.measure import versions

    device = torch.cuda.get_device_name(0)
    outcomes = run_stages(Path(__file__).resolve(), folder)
    found = read_findings(folder, outcomes)
    write_report(folder, device, versions(), outcomes, found)
    Console(width=150).print(short_table(device, outcomes, found))
    return not any(outcome.error for outcome in outcomes)


if __name__ == "__main__":
    from fedra_engine.exit_codes import end, exit_code

    end(exit_code(main))
