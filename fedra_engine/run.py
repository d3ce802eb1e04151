"""Runs from Python: train an experiment into its run folder, build one to look at, or load a finished run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedra_engine.callback import Callback, Outcome
from fedra_engine.callbacks.checkpoint import RunWriter, Start, find_start, kept_best, restore_best, restore_newest
from fedra_engine.callbacks.console import Console
from fedra_engine.callbacks.early_stopping import EarlyStopping
from fedra_engine.callbacks.fingerprint import Fingerprint, check_fingerprint, fingerprint
from fedra_engine.callbacks.keep_best import KeepBest
from fedra_engine.callbacks.loss_watch import LossWatch
from fedra_engine.callbacks.open_run import open_folder
from fedra_engine.callbacks.partition_report import PartitionReport
from fedra_engine.callbacks.run_folder import RunFolder, reading
from fedra_engine.callbacks.trace import Trace
from fedra_engine.callbacks.trackers import Trackers
from fedra_engine.config import ExperimentConfig
from fedra_engine.config.parsing import read_config
from fedra_engine.config.validation import validate
from fedra_engine.execution.measured_choices import with_earlier_choices
from fedra_engine.execution.step_graph import require_graphs
from fedra_engine.experiment import Experiment, build_experiment
from fedra_engine.exports.adapter_files import export
from fedra_engine.exports.merged_model import export_merged
from fedra_engine.inputs import Inputs
from fedra_engine.models.sharding import Sharding
from fedra_engine.models.state import GlobalState
from fedra_engine.report.page import read_page
from fedra_engine.report.writer import ReportWriter
from fedra_engine.runtime.errors import InputError, count_of
from fedra_engine.runtime.files import check_unused, write_whole
from fedra_engine.runtime.libraries import without_advice
from fedra_engine.runtime.measure_text import change_text
from fedra_engine.runtime.processes import Processes, join_job
from fedra_engine.runtime.stages import Stage
from fedra_engine.runtime.tables import PlainConsole
from fedra_engine.simulation import train

if TYPE_CHECKING:
    from accelerate import Accelerator
    from pandas import DataFrame


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
    if earlier is not None:
        config = with_earlier_choices(config, read_config(earlier.config_file))
    accelerator = _joined(config, accelerator)
    processes, sharding = Processes.of(accelerator), Sharding.of(accelerator)
    with (
        open_folder(config, earlier, processes) as folder,
        Console(folder.log_file, console, config=config, level=log_level, results_only=quiet)
        if processes.is_main
        else Console.silent() as shown,
    ):
        trackers = _open_trackers(folder, config, processes)
        with processes.raise_on_all():
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
    return Result(folder.path, experiment.config, (experiment, state, outcome))


def _joined(config: ExperimentConfig, accelerator: Accelerator | None) -> Accelerator:
    """`accelerator`, or that of the job; InputError if it cannot train as `config` says."""
    joined = join_job() if accelerator is None else accelerator
    # Experiments may be built on any device, as to plan runs.
    if config.execution.cuda_graphs == "on":
        require_graphs(joined.device)
    return joined


def _open_trackers(folder: RunFolder, config: ExperimentConfig, processes: Processes) -> Trackers:
    """The trackers of the main process, once all processes know that they could be opened."""
    with processes.raise_on_all():
        return Trackers(folder, config.report_to if processes.is_main else [])


def _choosing(config: ExperimentConfig, folder: RunFolder, begun: Fingerprint, start: Start) -> Iterator[Callback]:
    """The callbacks that choose the best round and the last one.

    What they choose is on the disk before the checkpoint of the same round is.
    """
    if config.keep_best is not None:
        yield KeepBest(folder.best_folder, config.keep_best, begun, start.records)
    stopping = config.early_stopping
    if stopping.patience is not None:
        yield EarlyStopping(stopping.patience, stopping.measure, stopping.min_improvement, start.records)


@dataclass(frozen=True)
class Result:
    """The results of a run, read from its `folder`; the experiment is built again where the run was loaded."""

    folder: Path
    config: ExperimentConfig = field(repr=False)
    _trained: tuple[Experiment, GlobalState, Outcome] | None = field(default=None, repr=False)
    _inputs: Inputs = field(default_factory=Inputs, repr=False)

    def __repr__(self) -> str:
        if not RunFolder(self.folder).summary_file.exists():
            return f"Result({self.folder}, not finished)"
        try:
            change = change_text("accuracy", *(self.summary[f"average_{when}"] for when in ("frozen", "tuned")))
            return f"Result({self.folder}, {count_of(self.summary['rounds'], 'round')}: average accuracy {change})"
        except (InputError, LookupError):
            return f"Result({self.folder}, with a damaged summary)"

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of `summary.json`; InputError if the run is not finished."""
        file = RunFolder(self.folder).summary_file
        with reading(file, "that of a finished run (--resume resumes it)"):
            summary: dict[str, Any] = json.loads(file.read_text())
        return summary

    @property
    def accuracy(self) -> dict[str, float]:
        """Share of correct predictions (0 to 1) by domain, after the last round."""
        accuracy: dict[str, float] = self.summary["tuned"]
        return accuracy

    @property
    def measures(self) -> dict[str, dict[str, float | None]]:
        """What was measured beside the accuracy after the last round (docs/measures.md), by name and domain.

        None where a value is not defined.
        """
        return {name: found["tuned"] for name, found in self.summary.get("measures", {}).items()}

    @cached_property
    def history(self) -> DataFrame:
        """One row for every round, with the columns of `metrics.jsonl`; measures are `accuracy.<domain>` and so on.

        `allocation` and `trained` hold a dict in each row: blocks by client.
        """
        import pandas

        records = RunFolder(self.folder).read_metrics()
        whole = {name: [each.pop(name, None) for each in records] for name in ("allocation", "trained")}
        if not records:
            return pandas.DataFrame()
        frame = pandas.json_normalize(records).assign(**{name: of for name, of in whole.items() if any(of)})
        return frame.set_index("round")

    def to_dataframe(self) -> DataFrame:
        """A copy of `history`."""
        return self.history.copy()

    @property
    def experiment(self) -> Experiment:
        """The experiment that was trained; InputError if its data or model have gone or changed."""
        return self._restored[0]

    @property
    def state(self) -> GlobalState:
        """The global state after the last round: adapters [blocks, slot size] and heads [exits, head size]."""
        return self._restored[1]

    def save_adapter(self, folder: str | Path) -> None:
        """Write the tuned adapter, in PEFT's format, into a new or empty `folder`; the run's own is in its `adapters/`.

        Raises:
            InputError: there is something in `folder`.
        """
        check_unused("folder", Path(folder))
        export(Path(folder), *self._restored)

    def save_model(self, folder: str | Path, *, client: int | None = None, best: bool = False) -> None:
        """Write the tuned model, its adapters merged, as a model of transformers into a new `folder`.

        Args:
            folder: for the model, its image processor or tokenizer, and a card.
            client: the number of a client, from 0, to write the sub-model that it held in the last round in which it
                took part, with the weights after the last round.
            best: write the model after the round that `keep_best` has kept, not after the last one.

        Raises:
            InputError: `folder` exists, the run is not finished or has kept no round, or transformers cannot describe
                the model.
        """
        if not best:
            export_merged(Path(folder), *self._restored, client=client)
            return
        kept, frozen = kept_best(RunFolder(self.folder)).state, self.summary["frozen"]
        # Restoring changes an experiment: that of the last round stays as it is.
        experiment = _build(self.config, self._inputs)
        start = restore_best(experiment, RunFolder(self.folder))
        more = experiment.more_than_exported(start.state)
        exported = kept["accuracy"] if more is None else {}
        outcome = Outcome(start.round, frozen, kept["accuracy"], exported, more)
        export_merged(Path(folder), experiment, start.state, outcome, client=client, best_by=kept["measure"])

    def report(self, file: str | Path) -> Path:
        """Write the run's page (docs/howto/report.md) to `file`, and return its path; the run has a `report.html`."""
        write_whole(Path(file), read_page([self.folder]).html())
        return Path(file)

    @cached_property
    def _restored(self) -> tuple[Experiment, GlobalState, Outcome]:
        if self._trained is not None:
            return self._trained
        summary = self.summary
        experiment = _build(self.config, self._inputs)
        state = restore_newest(experiment, RunFolder(self.folder)).state
        rounds, frozen, tuned = summary["rounds"], summary["frozen"], summary["tuned"]
        more, stopped = summary["tuned_is"], summary.get("stopped")
        return experiment, state, Outcome(rounds, frozen, tuned, summary["exported_accuracy"], more, stopped)


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


def build(
    config: ExperimentConfig | None = None,
    *,
    dataset: Any = None,
    model: Any = None,
    processor: Any = None,
    partitioner: Any = None,
) -> Experiment:
    """Put an experiment together without training it, to look at its clients, costs and model.

    Args:
        config: the experiment; the embedded one if not given.
        dataset: as in `simulate`.
        model: likewise.
        processor: likewise.
        partitioner: likewise.

    Raises:
        InputError: something cannot be used; says what was found and what was expected.
    """
    return _build(config, Inputs(dataset=dataset, model=model, processor=processor, partitioner=partitioner))


def load_run(
    folder: str | Path, *, dataset: Any = None, model: Any = None, processor: Any = None, partitioner: Any = None
) -> Result:
    """Load the results of the run in `folder`.

    Args:
        folder: of the run.
        dataset: what was passed to `simulate`; needed to build the experiment again.
        model: likewise.
        processor: likewise.
        partitioner: likewise.

    Raises:
        InputError: there is no run, or its configuration cannot be read.
    """
    # First: with a partitioner, a configuration may say that its partition is in memory.
    inputs = Inputs(dataset=dataset, model=model, processor=processor, partitioner=partitioner)
    run = RunFolder.open(folder)
    return Result(run.path, read_config(run.config_file), None, inputs)


def _build(config: ExperimentConfig | None, inputs: Inputs) -> Experiment:
    config, accelerator = inputs.described(config), join_job()
    with without_advice():
        return build_experiment(
            config, accelerator.device, Processes.of(accelerator), Sharding.of(accelerator), inputs=inputs
        )
