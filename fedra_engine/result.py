"""The results of a run, and the experiment behind them, built again where it is asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedra_engine.callback import Outcome
from fedra_engine.callbacks.checkpoint import kept_best, restore_best, restore_newest
from fedra_engine.callbacks.run_folder import RunFolder, reading
from fedra_engine.config import ExperimentConfig
from fedra_engine.config.parsing import read_config
from fedra_engine.experiment import Experiment, build_experiment
from fedra_engine.exports.adapter_files import export
from fedra_engine.exports.merged_model import export_merged
from fedra_engine.inputs import Inputs
from fedra_engine.models.sharding import Sharding
from fedra_engine.models.state import GlobalState
from fedra_engine.report.page import read_page
from fedra_engine.runtime.errors import InputError, count_of
from fedra_engine.runtime.files import check_unused, write_whole
from fedra_engine.runtime.libraries import without_advice
from fedra_engine.runtime.measure_text import change_text
from fedra_engine.runtime.processes import Processes, join_job

if TYPE_CHECKING:
    from pandas import DataFrame


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
