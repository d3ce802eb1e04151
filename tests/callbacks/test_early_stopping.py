"""A run ends when it no longer improves, and a resumed one as if it had never been interrupted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from math import nan
from typing import Any

import pytest

from fedra_engine.callback import Stop
from fedra_engine.callbacks.early_stopping import EarlyStopping
from fedra_engine.config import DataConfig
from fedra_engine.runtime.errors import InputError
from tests.callbacks.choosing import HELD_OUT, experiment, metrics, state_after, train

Values = Sequence[float | None]
HISTORIES: dict[str, tuple[dict[str, Any], Values, int | None, int]] = {
    "it rises": ({"patience": 1}, [0.25, 0.5, 0.75], None, 0),
    "it falls at once": ({"patience": 1}, [0.5, 0.25, 0.75], 1, 0),
    "equal is no improvement": ({"patience": 2}, [0.5, 0.5, 0.5, 0.75], 2, 0),
    "an improvement starts the count again": ({"patience": 2}, [0.5, 0.25, 0.75, 0.5, 0.5], 4, 2),
    "rounds without evaluation do not count": ({"patience": 2}, [None, 0.5, None, 0.25, None, 0.25], 5, 1),
    "too little": ({"patience": 2, "min_improvement": 0.25}, [0.25, 0.5, 0.5], 2, 0),
    "slow steps add up": ({"patience": 3, "min_improvement": 0.25}, [0.25, 0.375, 0.5, 0.625], None, 3),
    "the best, not the last, is to be beaten": ({"patience": 3}, [0.75, 0.25, 0.5, 0.625], 3, 0),
    "a low loss is good": ({"patience": 1, "measure": "test_loss"}, [0.25, 0.5, 0.375], 2, 1),
    "not defined": ({"patience": 2}, [nan, 0.25, nan, 0.5, nan, nan], 5, 3),
    "never defined": ({"patience": 2}, [nan, nan], 1, 0),
    "no evaluation": ({"patience": 1}, [None, None], None, 0),
}


@pytest.mark.parametrize(("options", "values", "last", "best"), HISTORIES.values(), ids=HISTORIES)
def test_a_run_ends_after_the_round(options: dict[str, Any], values: Values, last: int | None, best: int) -> None:
    rounds = range(len(values) + 1)
    stops = [train(EarlyStopping(**options), values, until=until) for until in rounds]
    expected = [last is not None and until > last for until in rounds]
    assert [stop is not None for stop in stops] == expected
    if isinstance(stop := stops[-1], Stop):
        measure, count = options.get("measure", "accuracy"), options["patience"]
        words = {"accuracy": "accuracy", "test_loss": "test loss"}[measure]
        start = f"{words} has not improved in {count} evaluation{'s' if count > 1 else ''}"
        known = values[best]
        assert known is not None
        value = f"{-known:#.4g}" if measure == "test_loss" else f"{100 * known:.1f} %"
        assert stop.reason == (start if known != known else f"{start}; the best is {value}, after round {best + 1}")


@pytest.mark.parametrize(("options", "values", "last", "best"), HISTORIES.values(), ids=HISTORIES)
def test_a_resumed_run_ends_like_one_that_was_not(
    options: dict[str, Any], values: Values, last: int | None, best: int
) -> None:
    """Wherever it was interrupted, also where it had ended, and with records that it is about to repeat."""
    whole = train(EarlyStopping(**options), values)
    records = json.loads(json.dumps([metrics(round, value).record() for round, value in enumerate(values)]))
    for first in range(1 if last is None else min(last + 2, len(values) + 1)):
        resumed = EarlyStopping(**options, earlier=records)
        assert train(resumed, values, first) == whole
        # The same object may see several runs.
        assert train(resumed, values) == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, r"^patience: found 0, expected a whole number"),
        ({"patience": 2, "min_improvement": -1.0}, r"^min_improvement: found -1\.0, expected a number from 0"),
        ({"patience": 2, "measure": "acuracy"}, r"^measure: found 'acuracy', .*did you mean accuracy"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EarlyStopping(**options)


def test_test_samples_do_not_end_a_run() -> None:
    on_tests = experiment(replace(HELD_OUT, data=DataConfig()))
    with pytest.raises(
        InputError, match=r"^early_stopping\.patience: found 3 with data\.validation_fraction 0, expected"
    ):
        EarlyStopping(3).on_start(on_tests, state_after(-1), 0)


def test_what_is_not_measured_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"^early_stopping\.measure: found perplexity with a task of .*, expected one of accuracy, "
    ):
        EarlyStopping(3, "perplexity").on_start(experiment(), state_after(-1), 0)
