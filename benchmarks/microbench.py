"""The benchmarks of a clone, by the names that `fedra bench --help` lists.

Prints CPU-seconds, which a busy machine disturbs less than wall-clock time, and ratios from the same run. On a
machine with a GPU, `kernels` prints the GPU's seconds.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedra_engine.config import ExperimentConfig

_MARK = ".microbench"
"""Shows that the results beside it may be replaced."""


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark that the `arguments` of the command name.

    Raises:
        InputError: something in them cannot be used.
    """
    from fedra_engine.callbacks.run_folder import make_folder
    from fedra_engine.config.parsing import quiet_libraries
    from fedra_engine.runtime.files import check_own

    options = _parse(arguments)
    if (folder := getattr(options, "output_dir", None)) is not None:
        check_own([folder / name for name in options.files], folder / _MARK)
        make_folder(folder)
        (folder / _MARK).touch()
    quiet_libraries()
    options.run(options)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    from benchmarks.line_parser import LineParser, path, typed
    from fedra_engine.config.options import number, whole

    repeats = typed(int, whole(1, 1000))
    parser = LineParser(description=__doc__, prog="fedra bench")
    commands = parser.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    executors = commands.add_parser("executors", help="sweep against one client after another, on one CPU thread")
    executors.add_argument("--repeats", type=repeats, default=3, help="counted rounds of each executor (default 3)")
    executors.add_argument("--output_dir", type=path, help="folder for executors.csv; none is written if not given")
    executors.set_defaults(run=_run_executors, files=["executors.csv"])
    _add_peers(commands)
    methods = commands.add_parser("methods", help="a round of every method against FedRA's, on one CPU thread")
    methods.add_argument("--repeats", type=repeats, default=5, help="counted rounds of each method (default 5)")
    methods.set_defaults(run=_run_methods)
    lanes = commands.add_parser("lanes", help="a round with more and more clients at a time, on one CPU thread")
    lanes.add_argument("--repeats", type=repeats, default=3, help="counted rounds of each number of lanes (default 3)")
    lanes.set_defaults(run=_run_lanes)
    batches = commands.add_parser("batches", help="what batches cost of the steps of an experiment, on one CPU thread")
    batches.add_argument("--steps", type=repeats, default=3, help="counted steps (default 3)")
    batches.set_defaults(run=_run_batches)
    watching = commands.add_parser(
        "watching", help="what measures, trackers and report cost of a run, on one CPU thread"
    )
    watching.set_defaults(run=_run_watching)
    profile = commands.add_parser("profile", help="where the time of a sweep goes, on one CPU thread")
    profile.add_argument("--repeats", type=repeats, default=3, help="counted rounds (default 3)")
    profile.set_defaults(run=_run_profile)
    start = commands.add_parser("start", help="a process from its beginning to its first local step, on one CPU thread")
    start.add_argument("--repeats", type=repeats, default=3, help="counted runs (default 3)")
    start.set_defaults(run=_run_start)
    for command in (batches, watching, start):
        command.add_argument(
            "experiment", nargs=argparse.REMAINDER, help="options of fedra simulate, such as --config FILE, after --"
        )
    kernels = commands.add_parser("kernels", help="every op against its baselines and its counted work")
    kernels.add_argument(
        "--seconds",
        type=typed(float, number(0, 3600, above=True)),
        default=0.2,
        help="time spent on each provider (default 0.2)",
    )
    kernels.add_argument("--output_dir", type=path, help="folder for kernels.csv and kernels.png; none if not given")
    kernels.add_argument(
        "--architecture",
        choices=["sm_80", "sm_90", "sm_100", "gfx942", "small", "none"],
        default="sm_90",
        help="without a GPU: what to compile the kernels for, to list their needs (default sm_90)",
    )
    kernels.set_defaults(run=_run_kernels, files=["kernels.csv", "kernels.png"])
    _add_step(commands, typed(int, whole(1, 4096)))
    resources = commands.add_parser("resources", help="what every kernel needs on every architecture, without a GPU")
    resources.add_argument("file", type=path, help="Markdown page to write")
    resources.set_defaults(run=_run_resources)
    return parser.parse_args(arguments or ["--help"])


def _add_step(commands: Any, count: Any) -> None:
    step = commands.add_parser("step", help="bytes, FLOPs and launches of a training step, and what GPUs should take")
    step.add_argument("--model", choices=["vit-b", "llama-8b"], default="vit-b", help="its sizes (default vit-b)")
    step.add_argument("--lanes", type=count, help="clients at a time (default 64; of llama-8b 8)")
    step.add_argument("--samples", type=count, help="images or texts of a client (default 16; of llama-8b 1)")
    step.add_argument("--all_blocks", action="store_true", help="every client holds all blocks, not FedRA's share")
    step.set_defaults(run=_run_step)


def _add_peers(commands: Any) -> None:
    from benchmarks.line_parser import path, typed
    from fedra_engine.config.options import whole

    peers = commands.add_parser("peers", help="this engine against PEFT, pfl-research, Flower and FedRA's structure")
    peers.add_argument("--quick", action="store_true", help="once, in small settings, without pfl-research and Flower")
    peers.add_argument(
        "--only", type=lambda text: text.split(","), default=[], help="settings, with commas; all if none"
    )
    peers.add_argument("--repeats", type=typed(int, whole(1, 1000)), default=5, help="counted rounds (default 5)")
    peers.add_argument("--out", type=path, help="page to write, with a .json beside it (default: that of the docs)")
    peers.set_defaults(run=_run_peers)


def _run_peers(options: argparse.Namespace) -> None:
    from benchmarks.peers.command import run_peers

    run_peers(quick=options.quick, only=options.only, repeats=options.repeats, out=options.out)


def _run_executors(options: argparse.Namespace) -> None:
    import torch

    from benchmarks.executors import measure_executors
    from benchmarks.server import server_milliseconds_per_client, sweep_peak_gigabytes
    from benchmarks.settings import embedded_default, single_samples, tiny_vit
    from fedra_engine.config import ExperimentConfig
    from fedra_engine.runtime.files import write_whole

    torch.set_num_threads(1)
    config = ExperimentConfig()
    default = embedded_default(config)
    rows = []
    for setting in (tiny_vit(), default, single_samples(config)):
        print(f"measuring {setting.name} …", file=sys.stderr, flush=True)
        rows.append(measure_executors(setting, options.repeats).row())
    _print_table("CPU-seconds of one round, one thread", rows)
    print(f"server work per client, embedded model: {server_milliseconds_per_client(default):.3f} ms")
    print(f"peak memory of a process sweeping the tiny ViT: {sweep_peak_gigabytes():.2f} GB")
    if options.output_dir:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        write_whole(options.output_dir / "executors.csv", text.getvalue())


def _run_methods(options: argparse.Namespace) -> None:
    import torch

    from benchmarks.methods import measure_methods
    from fedra_engine.config import ExperimentConfig
    from fedra_engine.methods.registry import METHODS

    torch.set_num_threads(1)
    rows = measure_methods(ExperimentConfig(), list(METHODS), options.repeats)
    _print_table("one round of the embedded default, all clients at full depth, one thread", rows)


def _run_lanes(options: argparse.Namespace) -> None:
    import torch

    from benchmarks.lanes import measure_lanes
    from benchmarks.settings import single_samples, tiny_vit
    from fedra_engine.config import ExperimentConfig

    torch.set_num_threads(1)
    rows = [
        row
        for setting in (tiny_vit(), single_samples(ExperimentConfig()))
        for row in measure_lanes(setting, options.repeats)
    ]
    _print_table("CPU-seconds of one round, one thread", rows)


def _run_batches(options: argparse.Namespace) -> None:
    import torch

    from benchmarks.batches import measure_batches

    torch.set_num_threads(1)
    row = measure_batches(_experiment(options), options.steps).row()
    _print_table("CPU-seconds of a local step of all lanes, one thread", [row])


def _run_watching(options: argparse.Namespace) -> None:
    import torch

    from benchmarks.watching import measure_watching

    torch.set_num_threads(1)
    rows = [times.row() for times in measure_watching(_experiment(options))]
    _print_table("CPU-seconds of a run, one thread", rows)


def _run_profile(options: argparse.Namespace) -> None:
    import torch

    from benchmarks.settings import embedded_default, tiny_vit
    from benchmarks.step_profile import measure_profile
    from fedra_engine.config import ExperimentConfig

    torch.set_num_threads(1)
    settings = (tiny_vit(), tiny_vit(torch.bfloat16), embedded_default(ExperimentConfig()))
    rows = [row for setting in settings for row in measure_profile(setting, options.repeats)]
    _print_table("CPU-seconds of one round, one thread", rows)


def _run_start(options: argparse.Namespace) -> None:
    from benchmarks.start import measure_start

    os.environ["OMP_NUM_THREADS"] = "1"
    arguments = [argument for argument in options.experiment if argument != "--"]
    _print_table("CPU-seconds of a run of one round", [measure_start(arguments, options.repeats).row()])


def _experiment(options: argparse.Namespace) -> ExperimentConfig:
    from fedra_engine.commands.simulate import parse_request

    arguments = [argument for argument in options.experiment if argument != "--"]
    return parse_request(arguments, description="The experiment that is measured.").config


def _run_kernels(options: argparse.Namespace) -> None:
    from benchmarks.kernels.command import run_kernels

    architecture = None if options.architecture == "none" else options.architecture
    run_kernels(options.output_dir, seconds=options.seconds, architecture=architecture)


def _run_step(options: argparse.Namespace) -> None:
    from benchmarks.cost.command import MODELS, run_step

    of_model = MODELS[options.model]
    lanes, samples = options.lanes or of_model.lanes, options.samples or of_model.samples
    run_step(of_model.shape, lanes=lanes, samples=samples, all_blocks=options.all_blocks)


def _run_resources(options: argparse.Namespace) -> None:
    from benchmarks.kernels.resources import write_resources

    write_resources(options.file)


def _print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table

    from fedra_engine.runtime.tables import table_text

    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if name == "setting" else "right")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.3g}" for value in row.values()))
    print(table_text(table))
