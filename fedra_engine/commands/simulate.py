"""`simulate`: run an experiment, resume one, or show what would be trained."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.commands.local_job import PROCESSES, choose_processes, parse_processes, run_in_processes
from fedra_engine.config import ExperimentConfig
from fedra_engine.config.parsing import (
    LOG_LEVEL,
    QUIET,
    CommandOption,
    Parser,
    asks_for_help,
    given_options,
    quiet_libraries,
    read_config,
    split_options,
    switch,
)
from fedra_engine.config.validation import check_paths, check_trackers, validate
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.quick_imports import quick_imports

DESCRIPTION = """Federated LoRA tuning of a transformer foundation model by many heterogeneous clients.

  fedra simulate --rounds 20 --method.allocation covered --clients.capacities 12,10,8,6,4,3
  fedra simulate --config pacs_vit_s14 --data.root PACS --model.path VIT --dry_run
  fedra simulate --processes auto
  fedra simulate --resume runs/NAME
"""
_OPTIONS = (
    CommandOption(
        "resume",
        "FOLDER",
        "Resume the run in FOLDER, with its own config.yaml and the data and model that it began with; of the fields, "
        "only a larger --rounds may be given too, where training.lr_schedule is constant",
    ),
    PROCESSES,
    switch("dry_run", "Show what would be trained, by whom, and what it would cost; train nothing"),
    QUIET,
    LOG_LEVEL,
)
PARSER = Parser(ExperimentConfig, DESCRIPTION, _OPTIONS)


def main(arguments: Sequence[str]) -> None:
    """Run the experiment that `arguments` describe, resume one, or show what would be trained."""
    request = parse_request(arguments, DESCRIPTION)
    if os.environ.get("RANK", "0") == "0":
        # Here, as importing torch may take long; and in the only process that has a folder and reports.
        check_paths(request.config)
        if not request.dry_run:
            check_trackers(request.config.report_to)
            if request.resumed is None:
                RunFolder.check_name(request.config)
    # Bars would be drawn across the live display.
    quiet_libraries(bars=not request.quiet and not (sys.stdout is not None and sys.stdout.isatty()))
    shows_info = not request.quiet and request.log_level <= logging.INFO
    if request.processes != 1:
        chosen = choose_processes(request.processes, request.config)
        if shows_info:
            print(chosen, flush=True)
        if chosen.processes > 1:
            _, others = split_options(arguments, [PROCESSES])
            run_in_processes(chosen, ["simulate", *others])
    if os.environ.get("RANK", "0") == "0" and shows_info:
        print("loading torch and transformers …", flush=True)
    with quick_imports():
        from fedra_engine.commands.dry_run import print_probe
        from fedra_engine.execution.step_graph import require_graphs
        from fedra_engine.models.sharding import refuse_sharding
        from fedra_engine.run import run
        from fedra_engine.runtime.processes import Processes, join_job

    accelerator = join_job()
    if request.dry_run:
        refuse_sharding(accelerator)
        # Here, as the first step that is timed would say so only after all else is printed.
        if request.config.execution.cuda_graphs == "on":
            require_graphs(accelerator.device)
        if Processes.of(accelerator).is_main:
            print_probe(request.config, accelerator.device, quiet=request.quiet, log_level=request.log_level)
        return
    run(
        request.config,
        request.resumed,
        accelerator=accelerator,
        quiet=request.quiet,
        log_level=request.log_level,
    )


class RunRequest(NamedTuple):
    """What `simulate` is asked for.

    Attributes:
        config: the experiment.
        resumed: the earlier run to resume, if any.
        dry_run: whether only to show what would be trained.
        quiet: whether to print the results alone.
        log_level: the least severe messages, of Python's logging, to print and keep.
        processes: how many of this machine; None for as many as help.
    """

    config: ExperimentConfig
    resumed: RunFolder | None
    dry_run: bool = False
    quiet: bool = False
    log_level: int = logging.INFO
    processes: int | None = 1


def parse_request(arguments: Sequence[str], description: str) -> RunRequest:
    """Read the options of `simulate`."""
    options, others = split_options(arguments, _OPTIONS)
    dry_run, quiet = options.dry_run == "true", options.quiet == "true"
    log_level = logging.getLevelNamesMapping()[options.log_level.upper()]
    given = "processes" in given_options(arguments)
    processes = parse_processes(options.processes if given else None, dry_run=dry_run)
    if options.resume is None or asks_for_help(others):
        config = replace(PARSER, description=description).parse(others)
        validate(config)
        return RunRequest(config, None, dry_run, quiet, log_level, processes)
    more, others = split_options(others, [CommandOption("rounds")])
    if others or dry_run:
        other = others[0] if others else "--dry_run"
        raise InputError(
            f"resume: found {other} beside it, expected no other option than --rounds, --processes, --quiet and "
            "--log_level"
        )
    if not options.resume:
        raise InputError("resume: found '', expected the folder of an earlier run")
    folder = RunFolder.open(os.path.expanduser(options.resume))
    before = read_config(folder.config_file)
    config = before if more.rounds is None else read_config(folder.config_file, "--rounds", more.rounds)
    for each in (before, config):
        validate(each)
    if config.rounds != before.rounds and config.training.lr_schedule != "constant":
        raise InputError(
            f"rounds: found {config.rounds}, expected {before.rounds} as before, because the "
            f"{config.training.lr_schedule} learning rate schedule depends on it (only a run that began with "
            "training.lr_schedule constant can get other rounds)"
        )
    return RunRequest(config, folder, quiet=quiet, log_level=log_level, processes=processes)
