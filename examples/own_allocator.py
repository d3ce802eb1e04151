"""An allocation of one's own: every client holds a window of neighbouring blocks, at a random place."""

import sys

import numpy as np

from fedra_engine import ExperimentConfig, register_allocator, simulate


@register_allocator("window")
def window(round, capacities, participants, depth, rng, federation):
    """bool [participants, blocks]: as many blocks as the client's capacity, one after another."""
    firsts = rng.integers(0, depth - capacities + 1)[participants]
    ends, blocks = firsts + capacities[participants], np.arange(depth)
    return (blocks >= firsts[:, None]) & (blocks < ends[:, None])


if __name__ == "__main__":
    config = ExperimentConfig(rounds=4, output_dir=sys.argv[1] if len(sys.argv) > 1 else "runs")
    config.method.allocation = "window"
    result = simulate(config)
    print("accuracy by domain:", result.accuracy)
