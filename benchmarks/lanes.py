"""What more lanes gain and take: a round with 1, 2, 4, … clients trained at a time."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks.executors import run_round
from benchmarks.settings import Setting
from fedra_engine.execution.memory import measure_lane


def measure_lanes(setting: Setting, repeats: int) -> list[dict[str, Any]]:
    """CPU-seconds of a round (medians), for each number of lanes up to that of the clients, and what a step takes."""
    clients = len(setting.work.participants)
    counts = [2**power for power in range(clients.bit_length()) if 2**power <= clients]
    memory = measure_lane(
        setting.foundation,
        setting.sweep_model,
        setting.samples,
        setting.work.training,
        len(setting.state.heads),
    )
    seconds: dict[int, list[float]] = {lanes: [] for lanes in counts}
    for repeat in range(repeats + 1):
        for lanes in counts:
            took, _ = run_round(replace(setting, lanes=lanes).sweep(), setting)
            # The first round of each is not counted.
            if repeat > 0:
                seconds[lanes].append(took)
    return [
        {
            "setting": setting.name,
            "lanes": str(lanes),
            "tokens_of_a_step": lanes * memory.tokens,
            "estimated_MiB": lanes * memory.total / 2**20,
            "cpu_seconds": median(times),
            "one_lane_over_this": median(seconds[1]) / median(times),
        }
        for lanes, times in seconds.items()
    ]
