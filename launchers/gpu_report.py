"""Tests and measures the engine on one GPU in seven minutes: `python launchers/gpu_report.py OUTPUT_DIR`.

Needs torch, triton, numpy, transformers, peft, accelerate, safetensors, rich, pytest, hypothesis and scikit-learn; the
package itself need not be installed. OUTPUT_DIR gets report.md, report.json, kernels.csv and logs.tgz, written anew
after every stage; a short table comes last. Exit code 1 when a stage failed, 2 for bad input or without a GPU. What the
figures mean: docs/gpu.md. With --study, how accurate the methods become on real images in what is left of the time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_STARTED = time.monotonic()
_SECONDS = 240.0
ROOT = Path(__file__).resolve().parents[1]
# A GPU machine may lack this package. Processes that start anew need the path too.
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path[:2], os.environ.get("PYTHONPATH", "")]))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# Stages are forked from this process: it must have no threads of its own, and must not use the GPU to see whether
# there is one.
os.environ |= {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


def main() -> None:
    """Run what was asked for; exit with 1 where something went wrong on the way."""
    from fedra_engine.config.parsing import quiet_libraries
    from fedra_engine.runtime.exit_codes import unwound_by_signals

    options = _parse(sys.argv[1:])
    quiet_libraries(bars=False)
    with unwound_by_signals():
        if options.pack:
            from benchmarks.accuracy.pack import LIMIT_MIB, pack

            limit = LIMIT_MIB if options.limit is None else options.limit
            pack(options.images, options.model, options.output_dir, limit_mib=limit)
        elif not (_study(options) if options.study else _report(options)):
            sys.exit(1)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    from benchmarks.gpu.stage_process import STAGES
    from benchmarks.line_parser import LineParser, existing_folder, path, typed
    from fedra_engine.config.options import number

    positive = typed(float, number(0, 1e6, above=True))
    parser = LineParser(description=__doc__)
    parser.add_argument("output_dir", type=path, help="folder for the results; made if there is none")
    parser.add_argument(
        "--only",
        type=lambda names: names.split(","),
        metavar="STAGE,…",
        help=f"for the report: run these stages alone, of {', '.join(STAGES)}",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--rehearse",
        action="store_true",
        help="the same stages at tiny sizes on a machine without a GPU: no figure means anything, but the script is "
        "known to work",
    )
    what.add_argument(
        "--study",
        choices=["accuracy"],
        help="instead of the report, train every method on real images for as many rounds as fit into the time: "
        "docs/accuracy_study.md",
    )
    what.add_argument(
        "--pack",
        action="store_true",
        help="instead of the report, put images and model into OUTPUT_DIR, small enough to take along for a study",
    )
    study = parser.add_argument_group("for --study and --pack")
    study.add_argument("--images", type=existing_folder, metavar="FOLDER", help="<domain>/<class>/<image>, or a pack")
    study.add_argument("--model", type=existing_folder, metavar="FOLDER", help="a transformers model, or a pack")
    study.add_argument(
        "--seconds",
        type=positive,
        help=f"after these, a study begins no round (default: {_SECONDS:g})",
    )
    study.add_argument(
        "--continue",
        dest="earlier",
        type=existing_folder,
        metavar="FOLDER",
        help="a study's output to resume",
    )
    study.add_argument("--limit", type=positive, metavar="MIB", help="most MiB of a pack (default: 50)")
    options = parser.parse_args(arguments)
    _check_combination(parser, options)
    if unknown := [name for name in options.only or () if name not in STAGES]:
        parser.error(f"--only: found {', '.join(unknown)}, expected some of {', '.join(STAGES)}")
    options.only = options.only or STAGES
    options.seconds = _SECONDS if options.seconds is None else options.seconds
    return options


def _check_combination(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse an option that what was asked for would ignore."""
    of_report = not (options.study or options.pack)
    if (options.images is None) != of_report or (options.model is None) != of_report:
        parser.error("--images and --model go together, with --study or --pack only")
    for flag, value, fits, where in (
        ("--only", options.only, of_report, "without --study and --pack"),
        ("--seconds", options.seconds, bool(options.study), "with --study"),
        ("--continue", options.earlier, bool(options.study), "with --study"),
        ("--limit", options.limit, options.pack, "with --pack"),
    ):
        if value is not None and not fits:
            parser.error(f"{flag} goes {where} only")


def _study(options: argparse.Namespace) -> bool:
    """Run the study. Returns whether no method was stopped by an error."""
    from benchmarks.accuracy.study import run_study

    return run_study(
        options.images, options.model, options.output_dir, continue_from=options.earlier, seconds=options.seconds
    )


def _report(options: argparse.Namespace) -> bool:
    """Run the stages. Returns whether all went well."""
    if options.rehearse:
        # Read when Triton is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    from fedra_engine.runtime.errors import InputError

    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing and "tests" in options.only:
        raise InputError(
            f"{', '.join(missing)}: found no such package, expected it for the stage `tests` (make setup), or --only "
            "with other stages"
        )
    from benchmarks.gpu.machine import find_machine
    from benchmarks.gpu.report import Settings, run_report
    from benchmarks.gpu.sizes import GPU, REHEARSAL
    from benchmarks.gpu.stages import report_stages

    sizes = REHEARSAL if options.rehearse else GPU
    machine = find_machine(sizes.device)
    stages = [stage for stage in report_stages(sizes, machine.architecture) if stage.name in options.only]
    command = " ".join(["python launchers/gpu_report.py", *sys.argv[1:]])
    settings = Settings(sizes.total, _STARTED, sizes.refresh, sizes.notice, command)
    return run_report(stages, machine, options.output_dir, settings) == 0


if __name__ == "__main__":
    from fedra_engine.runtime.exit_codes import end, exit_code

    end(exit_code(main))
