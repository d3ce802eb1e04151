"""Results of races that were not run."""

from __future__ import annotations

from benchmarks.peers.agreement import Agreement
from benchmarks.peers.entries import Entry
from benchmarks.peers.processes import Times
from benchmarks.peers.race import Standing

EQUAL = Agreement(0.0, 1.0, True)
OTHER_WORK = Agreement(0.5, 0.9, False)


def standing(label: str, *cpu: float, dtype: str = "float32", agreement: Agreement = EQUAL) -> Standing:
    """A contestant whose rounds took `cpu` seconds."""
    entry = Entry(label, "", dtype, "sdpa")
    return Standing(entry, "sdpa", [Times(seconds, seconds) for seconds in cpu], agreement=agreement)
