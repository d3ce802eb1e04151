"""The share of a step that its batch takes, on the embedded experiment."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.batches import measure_batches
from fedra_engine.runtime.errors import InputError
from tests.running import small_config


def test_a_step_holds_its_batch() -> None:
    config = small_config(Path(), execution={"lanes": 4}, data={"augmentation": "crop_flip"})
    row = measure_batches(config, steps=2).row()
    assert (row["lanes"], row["samples"]) == (4, 4 * 6)
    assert 0 < row["batch"] < row["step"]
    assert row["batch / step"] == f"{row['batch'] / row['step']:.2%}"


def test_lanes_that_stay_empty_are_refused() -> None:
    config = small_config(Path(), execution={"lanes": 7})
    with pytest.raises(InputError, match=r"execution\.lanes: found 7 with 6 participants, expected at most as many"):
        measure_batches(config, steps=1)
