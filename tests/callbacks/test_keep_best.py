"""The best round is kept, whatever interrupts the run."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import pytest

from fedra_engine.callback import Outcome
from fedra_engine.callbacks import keep_best
from fedra_engine.callbacks.keep_best import KeepBest
from fedra_engine.callbacks.saved_rounds import load_round, saved_rounds
from fedra_engine.config import DataConfig
from fedra_engine.runtime.errors import InputError
from tests.callbacks.choosing import HELD_OUT, experiment, metrics, state_after, train

Values = Sequence[float | None]
HISTORIES: dict[str, tuple[str, Values, int | None]] = {
    "the last": ("accuracy", [0.25, 0.5, 0.75], 2),
    "the first": ("accuracy", [0.75, 0.25, 0.5], 0),
    "the first of equals": ("accuracy", [0.25, 0.5, 0.5], 1),
    "of those that were evaluated": ("accuracy", [None, 0.25, None, 0.5, None, 0.375], 3),
    "of those where it is defined": ("accuracy", [nan, 0.25, nan], 1),
    "the lowest loss": ("test_loss", [0.25, 0.75, 0.5], 1),
    "none": ("accuracy", [None, None, None], None),
}


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter is a text that says what it was told."""

    def export(folder: Path, _: Any, state: Any, outcome: Outcome, *, best_by: str) -> None:
        told = (float(state.adapters[0, 0]), outcome.rounds, outcome.frozen["b"], best_by)
        (folder / "adapter.txt").write_text(repr(told))

    monkeypatch.setattr(keep_best, "export", export)


def end(callback: KeepBest) -> None:
    nothing: Any = None
    callback.on_end(experiment(), state_after(9), nothing)


def records(values: Values) -> list[dict[str, Any]]:
    """As a run reads them from `metrics.jsonl`."""
    found: list[dict[str, Any]] = json.loads(json.dumps([metrics(*pair).record() for pair in enumerate(values)]))
    return found


def kept(folder: Path) -> list[int]:
    return [round for round, _ in saved_rounds(folder)]


@pytest.mark.parametrize(("measure", "values", "best"), HISTORIES.values(), ids=HISTORIES)
def test_the_best_evaluated_round_is_kept(tmp_path: Path, measure: str, values: Values, best: int | None) -> None:
    callback = KeepBest(tmp_path / "best", measure)
    train(callback, values)
    end(callback)
    assert kept(tmp_path / "best") == ([] if best is None else [best])
    if best is None:
        return
    found = load_round(best, tmp_path / "best" / f"round_{best:04d}")
    assert float(found.tensors["state.adapters"][0, 0]) == best
    value = values[best]
    assert value is not None
    assert found.state == {
        "measure": measure,
        "value": -value if measure == "test_loss" else value,
        "accuracy": {"a": value - 0.125, "b": value + 0.125},
        "fingerprint": {},
    }
    told = (tmp_path / "best" / f"round_{best:04d}" / "adapter.txt").read_text()
    assert told == repr((float(best), best + 1, 1.0, measure))


@pytest.mark.parametrize("values", [[0.25, 0.5, 0.375, 0.75, 0.5], [0.5, 0.25, 0.625, 0.5, 0.75]])
@pytest.mark.parametrize("seen", range(6))
def test_a_resumed_run_keeps_what_one_that_was_not_interrupted_does(
    tmp_path: Path, values: list[float], seen: int
) -> None:
    """The process ended after `seen` rounds; the newest intact checkpoint is of the last one, or of one before."""
    whole = KeepBest(tmp_path / "whole")
    train(whole, values)
    end(whole)
    for first in range(max(seen - 2, 0), seen + 1):
        folder = tmp_path / f"from_{first}"
        train(KeepBest(folder), values, until=seen)
        resumed = KeepBest(folder, earlier=records(values[:seen]))
        train(resumed, values, first)
        end(resumed)
        (found,), (expected,) = (
            [(round, (path / "adapter.txt").read_text()) for round, path in saved_rounds(each)]
            for each in (folder, tmp_path / "whole")
        )
        assert found == expected


@pytest.mark.parametrize("gone", [False, True], ids=["damaged", "gone"])
def test_no_worse_round_takes_the_place_of_a_best_one_that_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, gone: bool
) -> None:
    values = [0.25, 0.75, 0.5, 0.875]
    train(KeepBest(tmp_path), values, until=2)
    if gone:
        shutil.rmtree(tmp_path / "round_0001")
    else:
        (tmp_path / "round_0001" / "state.safetensors").write_bytes(b"")
    resumed = KeepBest(tmp_path, earlier=records(values[:2]))
    with caplog.at_level(logging.INFO):
        train(resumed, values, first=2, until=3)
    assert "round 2, the best so far with accuracy 75.0 %, is lost, and only a better one will be kept" in caplog.text
    assert (f"removed {tmp_path / 'round_0000'}, which is not the best" in caplog.text) is gone
    assert kept(tmp_path) == ([] if gone else [0, 1])
    train(resumed, values, first=3)
    end(resumed)
    assert kept(tmp_path) == [3]


def test_what_is_removed_is_logged_once_nothing_has_refused_to_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(KeepBest(tmp_path), [0.25, 0.75])
    resumed = KeepBest(tmp_path, earlier=records([0.25]))
    resumed.on_start(experiment(), state_after(0), 1)
    assert kept(tmp_path) == [0, 1]
    with caplog.at_level(logging.INFO):
        train(resumed, [], first=1)
    assert kept(tmp_path) == [0]
    assert f"removed {tmp_path / 'round_0001'}, which is to be trained again" in caplog.text


def test_an_interrupted_save_leaves_the_best_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = KeepBest(tmp_path)
    train(callback, [0.25])

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(keep_best, "export", fail)
    with pytest.raises(KeyboardInterrupt):
        train(KeepBest(tmp_path, earlier=records([0.25])), [0.25, 0.5], first=1)
    assert kept(tmp_path) == [0]
    assert len(list(tmp_path.iterdir())) == 1


def test_test_samples_choose_no_round(tmp_path: Path) -> None:
    on_tests = experiment(replace(HELD_OUT, data=DataConfig()))
    with pytest.raises(InputError, match=r"^keep_best: found accuracy with data\.validation_fraction 0, expected"):
        KeepBest(tmp_path).on_start(on_tests, state_after(-1), 0)


def test_what_is_not_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^keep_best: found macro_f1 .*, expected one of accuracy, test_loss$"):
        KeepBest(tmp_path, "macro_f1").on_start(experiment(), state_after(-1), 0)
    with pytest.raises(InputError, match=r"^measure: found 'f1', expected one of accuracy, "):
        KeepBest(tmp_path, "f1")
