"""The time from the beginning of a process to its first local step."""

from __future__ import annotations

import pytest

from benchmarks.start import measure_start
from fedra_engine.runtime.errors import InputError

pytestmark = pytest.mark.slow


def test_the_start_is_a_part_of_the_run() -> None:
    times = measure_start(["--clients.sampling", "uniform", "--clients.participants", "1"], repeats=1)
    assert 0 < times.first_step < times.whole
    assert times.modules > 100


def test_a_run_that_fails_is_bad_input() -> None:
    with pytest.raises(InputError, match=r"^start: found a run that failed \(error: data\.source: found"):
        measure_start(["--data.source", "none"], repeats=1)
