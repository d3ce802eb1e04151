"""Train an experiment into its run folder."""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedra_engine.callback import Callback
from fedra_engine.callbacks.checkpoint import RunWriter, Start, find_checkpoint, find_start
from fedra_engine.callbacks.console import Console
from fedra_engine.callbacks.early_stopping import EarlyStopping
from fedra_engine.callbacks.fingerprint import Fingerprint, check_fingerprint, early_fingerprint, fingerprint
from fedra_engine.callbacks.keep_best import KeepBest
from fedra_engine.callbacks.loss_watch import LossWatch
from fedra_engine.callbacks.partition_report import PartitionReport
from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.callbacks.trace import Trace
from fedra_engine.callbacks.trackers import Trackers
from fedra_engine.config import ExperimentConfig
from fedra_engine.config.validation import validate
from fedra_engine.experiment import build_experiment
from fedra_engine.inputs import Inputs
from fedra_engine.models.sharding import Sharding
from fedra_engine.report.writer import ReportWriter
from fedra_engine.result import Result
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.exit_codes import unwound_by_signals
from fedra_engine.runtime.libraries import without_advice
from fedra_engine.runtime.processes import Processes, join_job
from fedra_engine.runtime.stages import Stage
from fedra_engine.runtime.tables import PlainConsole
from fedra_engine.simulation import train

if TYPE_CHECKING:
    from accelerate import Accelerator


def run(
    config: ExperimentConfig,
    earlier: RunFolder | None = None,
    *,
    inputs: Inputs | None = None,
    callbacks: Sequence[Callback] = (),
    accelerator: Accelerator | None = None,
    console: PlainConsole | None = None,
    quiet: bool = False,
    log_level: int = logging.INFO,
) -> Result:
    """Train the rounds of `config` that the run's folder lacks; all processes of a job call this together.

    Args:
        config: of the experiment; validated.
        earlier: the run to resume; None for a new one.
        inputs: data and model in place of those that `config` names.
        callbacks: beside those that show the run and keep its folder.
        accelerator: of the job; made here if not given.
        console: where the run is shown; stdout if not given.
        quiet: show the results alone.
        log_level: the least severe messages, of Python's logging, that are shown and logged.

    Raises:
        InputError: something cannot be used, training diverged, or `earlier` had other settings or inputs, or is
            damaged, finished or still running.
        BaseException: any other interruption; a note says how to resume.
    """
    if not isinstance(callbacks, Sequence) or not all(isinstance(each, Callback) for each in callbacks):
        raise InputError(f"callbacks: found {callbacks!r}, expected a list of instances of Callback")
    accelerator = join_job() if accelerator is None else accelerator
    processes, sharding = Processes.of(accelerator), Sharding.of(accelerator)
    with (
        open_folder(config, earlier, processes) as folder,
        Console(folder.log_file, console, config=config, level=log_level, results_only=quiet)
        if processes.is_main
        else Console.silent() as shown,
    ):
        with processes.raise_on_all():
            trackers = Trackers(folder, config.report_to if processes.is_main else [])
            experiment = build_experiment(config, accelerator.device, processes, sharding, inputs)
        with Stage("taking the fingerprint of data and model"):
            begun = fingerprint(experiment)
        of_main = processes.broadcast_object(begun)
        with processes.raise_on_all():
            check_fingerprint(begun, of_main, "the main process")
        shown.detail(f"run folder: {folder.path}")
        start = find_start(experiment, folder, begun)
        if start.round > 0:
            shown.remember(start.records)
        traces = [Trace(folder.path)] if config.trace else []
        writer, plots = RunWriter(folder, begun, start), PartitionReport(folder.path, shown.detail)
        kept = [writer, shown, plots, ReportWriter(folder.path), LossWatch(start.records)]
        watching = [*traces, *_choosing(config, folder, begun, start), *kept, trackers, *callbacks]
        with trackers:
            state, outcome = train(experiment, start.state, start.round, watching, start.accuracy)
        shown.finish(folder.written(), trackers.shown_by())
    return Result(folder.path, config, (experiment, state, outcome))


def _choosing(config: ExperimentConfig, folder: RunFolder, begun: Fingerprint, start: Start) -> Iterator[Callback]:
    """The callbacks that choose the best round and the last one.

    What they choose is on the disk before the checkpoint of the same round is.
    """
    if config.keep_best is not None:
        yield KeepBest(folder.best_folder, config.keep_best, begun, start.records)
    stopping = config.early_stopping
    if stopping.patience is not None:
        yield EarlyStopping(stopping.patience, stopping.measure, stopping.min_improvement, start.records)


@contextmanager
def open_folder(config: ExperimentConfig, earlier: RunFolder | None, processes: Processes) -> Iterator[RunFolder]:
    """Lock the folder of the `earlier` run, or of a new one that the main process makes, for all `processes`.

    A new folder is removed if bad input ends the run before its first round.

    Raises:
        InputError: the folder's name is taken; or the earlier run is still running, has already trained more than
            `config.rounds`, had other settings, or has no intact checkpoint left.
        BaseException: any other interruption within; a note says how to resume.
    """
    with unwound_by_signals(), ExitStack() as lock:
        made = ""
        with processes.raise_on_all():
            if processes.is_main:
                mine = RunFolder.create(config) if earlier is None else earlier
                if earlier is not None:
                    _check_early(config, earlier)
                lock.enter_context(mine.locked())
                made = str(mine.path)
        folder = RunFolder(Path(processes.broadcast_object(made)))
        try:
            yield folder
        except InputError:
            if processes.is_main and earlier is None and not folder.kept_metrics_file.exists():
                shutil.rmtree(folder.path)
            raise
        except BaseException as error:
            error.add_note(f"fedra simulate --resume {shlex.quote(str(folder.path))} resumes it")
            raise


def _check_early(config: ExperimentConfig, folder: RunFolder) -> None:
    """Check before the experiment is built, which may take long: the folder, the settings, and that rounds are left."""
    folder.check_kinds()
    find_checkpoint(folder, early_fingerprint(config), config.rounds)


def simulate(
    config: ExperimentConfig | None = None,
    *,
    dataset: Any = None,
    model: Any = None,
    method: str | None = None,
    callbacks: Sequence[Callback] = (),
    processor: Any = None,
    partitioner: Any = None,
    quiet: bool = False,
) -> Result:
    """Train an experiment into a new run folder.

    Args:
        config: the experiment; the embedded one if not given.
        dataset: a `datasets.Dataset` or `DatasetDict` in place of `data.source`, with columns as `data.columns` says;
            its test split, else `data.test_fraction` of it, is held out.
        model: a torch model in place of `model.path`; it is copied and stays as it is.
        method: name of a method, in place of `method.name`.
        callbacks: beside those that show the run and keep its folder.
        processor: an image processor or tokenizer, in place of the one beside the model's weights.
        partitioner: of flwr-datasets, in place of `data.partition`.
        quiet: print nothing; the run's log is written all the same.

    Raises:
        InputError: something cannot be used; says what was found and what was expected.
    """
    inputs = Inputs(dataset=dataset, model=model, processor=processor, partitioner=partitioner)
    config = inputs.described(config)
    if method is not None:
        config = replace(config, method=replace(config.method, name=method))
    validate(config)
    console = PlainConsole(quiet=True, force_terminal=False) if quiet else PlainConsole()
    # Bars would be drawn across the live display.
    with without_advice(bars=not quiet and not console.can_redraw):
        return run(config, inputs=inputs, callbacks=callbacks, console=console)
