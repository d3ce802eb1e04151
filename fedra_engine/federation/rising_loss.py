"""Whether tuning has made a model over-confident: its loss on held-out samples, beside its accuracy; without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from fedra_engine.federation.measure_text import measure_text

_ABOVE_FROZEN, _ABOVE_BEST = 1.01, 1.1
"""How many times the loss of the frozen model, and that after the best round, a loss must be to be mentioned."""


class BeforeAndAfter(NamedTuple):
    """The average of a measure over the domains, of the frozen model and of the tuned one."""

    frozen: float
    tuned: float


def loss_warnings(
    accuracy: BeforeAndAfter, loss: BeforeAndAfter, by_round: Mapping[int, float], samples: str
) -> list[str]:
    """Sentences that say where the loss on held-out samples has risen; none where it has not, or is not known.

    Args:
        accuracy: shares from 0 to 1.
        loss: on the same samples; NaN where it is not defined.
        by_round: the loss after each evaluated round, by the round's number from 1.
        samples: what was evaluated, such as `test samples`.
    """
    found = list[str]()
    earlier = {number: value for number, value in by_round.items() if math.isfinite(value)}
    if loss.tuned > _ABOVE_FROZEN * loss.frozen and accuracy.tuned > accuracy.frozen:
        found.append(
            f"The loss on {samples} rose from {_text(loss.frozen)} to {_text(loss.tuned)} although the accuracy rose: "
            "the tuned model is over-confident where it is wrong."
        )
    best = min(earlier, key=earlier.__getitem__, default=None)
    if best is not None and loss.tuned > _ABOVE_BEST * earlier[best]:
        found.append(
            f"The loss on {samples} was lowest after round {best:,}, {_text(earlier[best])}, and is "
            f"{_text(loss.tuned)} after the last: fewer rounds, or a lower training.lr, would give probabilities that "
            "fit better."
        )
    return found


def _text(loss: float) -> str:
    return measure_text("test_loss", loss)
