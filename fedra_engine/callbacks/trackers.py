"""Send the metrics of a run to experiment trackers, through the classes that Accelerate has for them."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from fedra_engine.callback import Callback, Evaluation, Round
from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.config import ExperimentConfig
from fedra_engine.config.fields import settings
from fedra_engine.config.validation import check_trackers
from fedra_engine.experiment import Experiment
from fedra_engine.federation.averages import average
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import InputError, one_line

_LOG = logging.getLogger(__name__)
_PROJECT = "fedra-engine"
_MODES_WITHOUT_LOGIN = ("offline", "dryrun", "disabled")
_NOT_IN_NAMES = re.compile(r"[^\w.: -]")
"""What MLflow refuses, and the slash, which groups names."""


class Trackers(Callback):
    """Reports a run to the trackers that `report_to` names; a context manager, at whose end they are finished.

    After an error, the trackers' runs are marked as failed.

    Steps are rounds, from 1; step 0 is the frozen model. A run that goes on begins a new run of the tracker, which gets
    the earlier rounds from `metrics.jsonl`. A tracker that fails after its start is dropped with a warning, so that no
    run is lost to a server that is not there.
    """

    def __init__(self, run: RunFolder, names: Sequence[str]) -> None:
        """Report to the trackers with these `names`.

        Raises:
            InputError: a tracker is not installed, or wandb has no login.
        """
        self._run = run
        self._open: dict[str, GeneralTracker] = {}
        self._first_round = 0
        self._names = list(dict.fromkeys(names))
        check_trackers(self._names)
        if "wandb" in self._names:
            check_wandb_login()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in [*self._open]:
            with self._dropped_if_failing(name) as tracker:
                finish(tracker, failed=error is not None)

    def on_start(self, experiment: Experiment, state: GlobalState, first_round: int) -> None:
        """Raises InputError if a tracker cannot start."""
        self._first_round = first_round
        values = plain_settings(experiment.config)
        for name in self._names:
            tracker = make_tracker(name, self._run.path)
            try:
                start(tracker)
                # From here on it has to be finished, even if it takes no settings.
                self._open[name] = tracker
                tracker.store_init_configuration(values)
            except Exception as error:
                raise _not_starting(name, error) from error

    def shown_by(self) -> dict[str, str]:
        """The commands that show what trackers have of the run outside of its folder, by title."""
        return {"trackio": f"trackio show --project {_PROJECT}"} if "trackio" in self._open else {}

    def on_evaluate(self, experiment: Experiment, state: GlobalState, evaluation: Evaluation) -> None:
        measured = values_of(evaluation.measures)
        if evaluation.metrics is not None:
            self._log(measured, step=evaluation.metrics.round + 1)
            return
        self._log(measured, step=0)
        # Trackers expect rising steps.
        for record in self._run.read_metrics() if self._open else []:
            if record["round"] < self._first_round:
                found = {name: record[name] for name in experiment.evaluator.measures if name in record}
                self._log(numbers_of(record) | values_of(found), step=record["round"] + 1)

    def on_round(self, experiment: Experiment, state: GlobalState, round: Round) -> None:
        self._log(numbers_of(round.metrics.record()), step=round.metrics.round + 1)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        for name in [*self._open]:
            with self._dropped_if_failing(name) as tracker:
                tracker.log(dict(values), step=step)

    @contextmanager
    def _dropped_if_failing(self, name: str) -> Iterator[GeneralTracker]:
        try:
            yield self._open[name]
        except Exception as error:
            del self._open[name]
            _LOG.warning("report_to: %s failed and gets nothing more of this run: %s", name, one_line(error))


def make_tracker(name: str, folder: Path) -> GeneralTracker:
    """The tracker with this name, which is also its package's, for the run in `folder`."""
    match name:
        case "tensorboard":
            # What an earlier run has written of these rounds would be drawn as well.
            return TensorBoardTracker("tensorboard", folder, purge_step=0)
        case "wandb":
            # A project that is given is preferred to the variable, and a variable that changes is not read again.
            project, mode = os.environ.get("WANDB_PROJECT", _PROJECT), os.environ.get("WANDB_MODE")
            return WandBTracker(project, name=folder.name, dir=str(folder), mode=mode)
        case "trackio":
            # In a notebook it would put its dashboard under the cell.
            return TrackioTracker(_PROJECT, name=folder.name, embed=False)
        case _:
            return MLflowTracker(_PROJECT, run_name=folder.name)


def check_wandb_login() -> None:
    """Check that wandb, where it needs a login, has one: it would ask for it, and the live display hides the question.

    Raises:
        InputError: it has none, or one that it cannot use.
    """
    import wandb

    try:
        mode = os.environ.get("WANDB_MODE") or wandb.setup().settings.mode
        # A run that is active already has answered the question.
        if mode in _MODES_WITHOUT_LOGIN or wandb.run is not None or wandb.login(prompt=False, verify=False):
            return
    except Exception as error:
        raise _not_starting("wandb", error) from error
    raise InputError("report_to: found no login for wandb, expected one (wandb login), or WANDB_MODE=offline")


def start(tracker: GeneralTracker) -> None:
    """Start a tracker."""
    with _without_output() if isinstance(tracker, TrackioTracker) else nullcontext():
        tracker.start()


def finish(tracker: GeneralTracker, *, failed: bool) -> None:
    """Finish a tracker, as failed or not; TensorBoard and trackio make no difference."""
    if failed and isinstance(tracker, MLflowTracker):
        import mlflow

        mlflow.end_run("FAILED")
    elif failed and isinstance(tracker, WandBTracker):
        tracker.tracker.finish(exit_code=1)
    elif isinstance(tracker, TrackioTracker):
        import trackio

        # The tracker's own method leaves the run active, and it would be finished again when Python ends.
        with _without_output():
            trackio.finish()
    else:
        tracker.finish()


def _without_output() -> redirect_stdout[StringIO]:
    """What trackio prints while it starts and ends would break into the live display."""
    return redirect_stdout(StringIO())


def plain_settings(config: ExperimentConfig) -> dict[str, bool | int | float | str]:
    """The configuration by dotted names; values that trackers cannot take as they are become JSON."""
    # Lists hold their entries; MLflow refuses the brackets in their names.
    values = {setting.name: setting.value for setting in settings(config) if "[" not in setting.name}
    return {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value, default=asdict)
        for name, value in values.items()
    }


def _not_starting(name: str, error: Exception) -> InputError:
    return InputError(
        f"report_to: found {name}, which does not start ({one_line(error)}), expected a tracker that does"
    )


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a round's record, which do not include its measures and the number of the round."""
    return {name: value for name, value in record.items() if isinstance(value, int | float) and name != "round"}


def values_of(measures: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    """Measures as `<measure>/<domain>`, and their means over the domains as `average_<measure>`, where defined.

    Args:
        measures: values by name of the measure and domain; NaN, infinite or None where not defined.
    """
    found = dict[str, float | None]()
    for name, of_domain in measures.items():
        found[f"average_{name}"] = average(of_domain)
        found |= {f"{name}/{_NOT_IN_NAMES.sub('_', domain)}": value for domain, value in of_domain.items()}
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}
