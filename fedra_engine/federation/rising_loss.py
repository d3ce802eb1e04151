"""Whether tuning has made a model overconfident: its loss on held-out samples, beside its accuracy; without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from fedra_engine.config.data import HeldOut
from fedra_engine.runtime.measure_text import measure_text

_ABOVE_FROZEN = 1.01
"""How many times the frozen model's loss a loss must be to be mentioned; a smaller rise changes no decision."""
_ABOVE_LOWEST = 1.1
"""The same for the lowest loss of the run; with few participants a round, losses vary by some percent anyway."""


class BeforeAndAfter(NamedTuple):
    """The average of a measure over the domains, of the frozen model and of the tuned one."""

    frozen: float
    tuned: float


def loss_warnings(
    accuracy: BeforeAndAfter, loss: BeforeAndAfter, by_round: Mapping[int, float], held_out: HeldOut
) -> list[str]:
    """Sentences that say where the loss on held-out samples has risen; none where it has not, or is not known.

    Args:
        accuracy: shares from 0 to 1.
        loss: on the same samples; NaN where it is not defined.
        by_round: the loss after each evaluated round, by the round's number from 1.
        held_out: which samples were evaluated.
    """
    found = list[str]()
    if not math.isfinite(loss.tuned):
        # Probabilities of zero for the right class, or no loss at all, say nothing of a trend.
        return found
    earlier = {number: value for number, value in by_round.items() if math.isfinite(value)}
    if loss.tuned > _ABOVE_FROZEN * loss.frozen and accuracy.tuned > accuracy.frozen:
        found.append(
            f"The loss on {held_out} samples rose from {_text(loss.frozen)} to {_text(loss.tuned)} while the accuracy "
            "rose, too: the tuned model is overconfident where it is wrong."
        )
    lowest = min(earlier, key=earlier.__getitem__, default=None)
    if lowest is not None and loss.tuned > _ABOVE_LOWEST * earlier[lowest]:
        found.append(
            f"The loss on {held_out} samples was lowest after round {lowest:,} ({_text(earlier[lowest])}) and is "
            f"{_text(loss.tuned)} after the last round: fewer rounds or a lower training.lr may give better-calibrated "
            f"probabilities{'' if held_out == 'validation' else '; choose them with data.validation_fraction'}."
        )
    return found


def _text(loss: float) -> str:
    return measure_text("test_loss", loss)
