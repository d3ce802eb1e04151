"""Runs from Python: train an experiment into its run folder, build one to look at, or load what a run left."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedra_engine.callback import Callback, Outcome
from fedra_engine.callbacks.adapter_files import export
from fedra_engine.callbacks.checkpoint import Keeper, find_start, newest_checkpoint, newest_state
from fedra_engine.callbacks.console import Console
from fedra_engine.callbacks.fingerprint import check_fingerprint, fingerprint, setting_digest
from fedra_engine.callbacks.partition_report import PartitionReport
from fedra_engine.callbacks.run_folder import RunFolder, reading
from fedra_engine.callbacks.trace import Trace
from fedra_engine.config import ExperimentConfig
from fedra_engine.config.parsing import read_config
from fedra_engine.config.validation import validate
from fedra_engine.config.values import plain_copy
from fedra_engine.experiment import Experiment, build_experiment
from fedra_engine.inputs import Inputs
from fedra_engine.models.sharding import Sharding
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.exit_codes import unwound_by_signals
from fedra_engine.runtime.processes import Processes, join_job
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
) -> Result:
    """Train the rounds of `config` that its folder does not have yet, and leave the results there.

    All processes of a job call this together.

    Args:
        config: of the experiment; valid.
        earlier: the run to go on with; None for a new one.
        inputs: data and model that are handed over instead of loaded.
        callbacks: what watches, beside what shows the run and keeps its folder.
        accelerator: of the job; accelerate's own if not given.
        console: where the run is shown; stdout if not given.

    Raises:
        InputError: something cannot be used, training diverged, or `earlier` began with something else, is damaged, is
            finished or still going on.
        BaseException: whatever else cut the run short; a note says how to go on.
    """
    if not isinstance(callbacks, Sequence) or not all(isinstance(each, Callback) for each in callbacks):
        raise InputError(f"callbacks: found {callbacks!r}, expected a list of instances of Callback")
    accelerator = join_job() if accelerator is None else accelerator
    processes, sharding = Processes.of(accelerator), Sharding.of(accelerator)
    with (
        open_folder(config, earlier, processes) as folder,
        Console(folder.log_file, console) if processes.is_main else Console.silent() as shown,
    ):
        with processes.raise_on_all():
            experiment = build_experiment(config, accelerator.device, processes, sharding, inputs)
        begun = fingerprint(experiment)
        of_main = processes.broadcast_object(begun)
        with processes.raise_on_all():
            check_fingerprint(begun, of_main, "the main process")
        shown.message(f"run folder: {folder.path}")
        start = find_start(experiment, folder, begun)
        traces = [Trace(folder.path)] if config.trace else []
        watching = [*traces, Keeper(folder, begun), shown, PartitionReport(folder.path), *callbacks]
        state, outcome = train(experiment, start.state, start.round, watching, start.accuracy)
    return Result(folder.path, config, (experiment, state, outcome))


@contextmanager
def open_folder(config: ExperimentConfig, earlier: RunFolder | None, processes: Processes) -> Iterator[RunFolder]:
    """The run's folder, which no other command may use meanwhile; a new one if there is no `earlier` run.

    A new one goes away again when the input turns out to be bad before any round. Of several `processes` the main one
    makes the folder, and all get the same.

    Raises:
        InputError: the folder's name is taken; or the earlier run is still going on, is past `config.rounds` already,
            began with other settings, or has no intact checkpoint left.
        BaseException: whatever else cuts short what is done in the folder; a note says how to go on.
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
            error.add_note(f"--resume {shlex.quote(str(folder.path))} goes on")
            raise


def _check_early(config: ExperimentConfig, folder: RunFolder) -> None:
    """What `find_start` checks behind the lock, as far as it is known before the experiment is built."""
    folder.check_kinds()
    found, _ = newest_checkpoint(folder, {"setting": setting_digest(config)})
    if found is not None and config.rounds <= found.round:
        raise InputError(
            f"rounds: found {config.rounds}, expected at least the {found.round + 1} done in {folder.path}"
        )


@dataclass(frozen=True)
class Result:
    """What a run left.

    Attributes:
        folder: of the run.
        config: of its experiment.
    """

    folder: Path
    config: ExperimentConfig
    _trained: tuple[Experiment, GlobalState, Outcome] | None = field(default=None, repr=False)
    _inputs: Inputs = field(default_factory=Inputs, repr=False)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of `summary.json`.

        Raises:
            InputError: the run is not finished.
        """
        file = RunFolder(self.folder).summary_file
        with reading(file, "that of a finished run (--resume goes on)"):
            summary: dict[str, Any] = json.loads(file.read_text())
        return summary

    @property
    def accuracy(self) -> dict[str, float]:
        """Share of correct predictions (0 to 1) by domain, after the last round."""
        accuracy: dict[str, float] = self.summary["tuned"]
        return accuracy

    @cached_property
    def history(self) -> DataFrame:
        """One row for every round, with the columns of `metrics.jsonl`; accuracies are `accuracy.<domain>`."""
        import pandas

        records = RunFolder(self.folder).read_metrics()
        return pandas.json_normalize(records).set_index("round") if records else pandas.DataFrame()

    def to_dataframe(self) -> DataFrame:
        """A copy of `history`."""
        return self.history.copy()

    @property
    def experiment(self) -> Experiment:
        """What was trained; built again where the run was loaded.

        Raises:
            InputError: data or model are not there any more, or are others.
        """
        return self._restored[0]

    @property
    def state(self) -> GlobalState:
        """The global state after the last round: adapters [blocks, slot size] and heads [exits, head size]."""
        return self._restored[1]

    def save_adapter(self, folder: str | Path) -> None:
        """Write the tuned adapter in PEFT's format into `folder`, as the run has it in its own `adapters/`."""
        export(Path(folder), *self._restored)

    @cached_property
    def _restored(self) -> tuple[Experiment, GlobalState, Outcome]:
        if self._trained is not None:
            return self._trained
        summary = self.summary
        experiment = _build(self.config, self._inputs)
        state = newest_state(experiment, RunFolder(self.folder)).state
        names = ("rounds", "frozen", "tuned", "exported_accuracy", "tuned_is")
        return experiment, state, Outcome(*(summary[name] for name in names))


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
        callbacks: what watches, beside what shows the run and keeps its folder.
        processor: an image processor or tokenizer, in place of the one beside the model's weights.
        partitioner: of flwr-datasets, in place of `data.partition`.
        quiet: show nothing; the run's log has it all the same.

    Returns:
        What the run left, with the folder that it is in.

    Raises:
        InputError: something cannot be used; says what was found and what was expected.
    """
    inputs = Inputs(dataset=dataset, model=model, processor=processor, partitioner=partitioner)
    config = _described(config, inputs)
    if method is not None:
        config = replace(config, method=replace(config.method, name=method))
    validate(config)
    console = PlainConsole(quiet=True, force_terminal=False) if quiet else None
    with _without_advice(bars=not quiet):
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
        dataset, model, processor, partitioner: as of `simulate`.

    Raises:
        InputError: something cannot be used; says what was found and what was expected.
    """
    return _build(config, Inputs(dataset=dataset, model=model, processor=processor, partitioner=partitioner))


def load_run(
    folder: str | Path, *, dataset: Any = None, model: Any = None, processor: Any = None, partitioner: Any = None
) -> Result:
    """What the run in `folder` left.

    Args:
        folder: of the run.
        dataset, model, processor, partitioner: as of `simulate`, for the experiment to be built again when it is asked
            for.

    Raises:
        InputError: there is no run, or its configuration cannot be read.
    """
    # Before the configuration, which may say that the partitioner is handed over.
    inputs = Inputs(dataset=dataset, model=model, processor=processor, partitioner=partitioner)
    run = RunFolder.open(folder)
    return Result(run.path, read_config(run.config_file), None, inputs)


def _build(config: ExperimentConfig | None, inputs: Inputs) -> Experiment:
    config, accelerator = _described(config, inputs), join_job()
    with _without_advice():
        return build_experiment(
            config, accelerator.device, Processes.of(accelerator), Sharding.of(accelerator), inputs=inputs
        )


def _described(config: ExperimentConfig | None, inputs: Inputs) -> ExperimentConfig:
    """The configuration, the embedded one if not given, with what is handed over in it."""
    if config is not None and not isinstance(config, ExperimentConfig):
        raise InputError(f"config: found {config!r}, expected an ExperimentConfig")
    return inputs.described_in(plain_copy(config or ExperimentConfig()))


@contextmanager
def _without_advice(*, bars: bool = True) -> Iterator[None]:
    """Keep transformers' warnings about models it loads out of the output; without `bars`, its progress bars, too."""
    from transformers.utils import logging

    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()
