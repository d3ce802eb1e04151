"""The tables of rounds that README and docs show: executors, methods, lanes, and the server's work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.executors import measure_executors
from benchmarks.floor import rows_per_pass
from benchmarks.lanes import measure_lanes
from benchmarks.methods import BASELINE, measure_methods
from benchmarks.server import server_milliseconds_per_client
from benchmarks.settings import Setting, embedded_default
from tests.running import small_config

pytestmark = pytest.mark.slow

ONE_STEP = small_config(Path(), training={"max_local_steps": 1}, execution={"lanes": 4})


@pytest.fixture(scope="module")
def setting() -> Setting:
    return embedded_default(ONE_STEP)


def test_all_executors_do_the_same_round(setting: Setting) -> None:
    row = measure_executors(setting, repeats=1).row()
    assert row["largest_difference"] < 1e-3
    assert row["sequential_over_sweep"] == row["sequential"] / row["sweep"]
    assert row["handwritten_over_sweep"] == row["handwritten"] / row["sweep"]
    assert row["sweep_over_floor"] == row["sweep"] / row["floor"]
    assert 0 < row["floor"] < row["sequential"]


def test_the_floor_has_each_held_block_of_each_step(setting: Setting) -> None:
    samples = [sum(map(len, setting.work.batches(client))) for client in setting.work.participants]
    assert np.sum(rows_per_pass(setting), axis=0).tolist() == (samples @ setting.assignment.held).tolist()


def test_lanes_are_doubled_up_to_the_clients(setting: Setting) -> None:
    one, two, four = measure_lanes(setting, repeats=1)
    assert [row["lanes"] for row in (one, two, four)] == ["1", "2", "4"]
    assert (one["one_lane_over_this"], four["tokens_of_a_step"]) == (1, 4 * one["tokens_of_a_step"])
    assert two["one_lane_over_this"] == one["cpu_seconds"] / two["cpu_seconds"]


def test_a_methods_round_is_compared_with_fedras() -> None:
    rows = {row["method"]: row for row in measure_methods(ONE_STEP, ["fedhello"], repeats=1)}
    seconds = {method: row["cpu_seconds"] for method, row in rows.items()}
    every = ONE_STEP.method.fedhello.fisher_every
    plain, fisher, mean = (
        seconds["fedhello"],
        seconds["fedhello, Fisher round"],
        seconds[f"fedhello, mean of {every} rounds"],
    )
    assert mean == ((every - 1) * plain + fisher) / every
    assert all(row["over_fedra"] == row["cpu_seconds"] / seconds[BASELINE] for row in rows.values())


def test_the_servers_work_is_for_each_client(setting: Setting) -> None:
    assert 0 < server_milliseconds_per_client(setting, clients=20) < 100
