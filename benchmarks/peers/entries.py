"""Who races in which scene, and in which variants."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.peers.environments import OURS
from benchmarks.peers.job import HANDWRITTEN
from benchmarks.peers.scenes import FULL_DEPTH, QUICK, Scene

PEFT, FEDRA_LOOP, PFL, FLOWER = "PEFT loop", "FedRA's structure", "pfl-research", "Flower"
SWEEP, SEQUENTIAL, BY_HAND = "this engine, sweep", "this engine, sequential", "hand-written loop"
PRODUCTS = "frozen products"
PRECISIONS = ("float32", "bfloat16")
ATTENTIONS = ("sdpa", "eager")

ENGINE = [
    ("sequential", "float32", "sdpa"),
    ("sequential", "bfloat16", "sdpa"),
    *(("sweep", dtype, attention) for dtype in PRECISIONS for attention in ATTENTIONS),
]
"""Rows of the engine: `execution.executor`, `model.dtype` and `model.attention`. Variants that differ in the attention
alone are one contestant, which races in its fastest variant."""


@dataclass(frozen=True)
class Entry:
    """A contestant in one variant.

    Attributes:
        label: its name in the tables.
        module: of `benchmarks/peers/contestants`.
        dtype, attention, executor: see `Job`; without an attention, it has that of the fastest PEFT loop of its dtype.
        environment: see `python_of`.
    """

    label: str
    module: str
    dtype: str = "float32"
    attention: str | None = None
    executor: str = ""
    environment: str = OURS

    @property
    def contestant(self) -> tuple[str, str]:
        """Label and dtype: variants with the same are one contestant."""
        return self.label, self.dtype


_LOOPS = [Entry(PEFT, "peft_loop", dtype, attention) for dtype in PRECISIONS for attention in ATTENTIONS]
_FRAMEWORKS = [Entry(PFL, "pfl_research", environment="pfl"), Entry(FLOWER, "flower", environment="flower")]
_FEDRA_LOOP = Entry(FEDRA_LOOP, "fedra_loop")
_ENGINE = [
    Entry(SWEEP if executor == "sweep" else SEQUENTIAL, "engine", dtype, attention, executor)
    for executor, dtype, attention in ENGINE
]
_SWEEPS = [entry for entry in _ENGINE if entry.label == SWEEP]
_HANDWRITTEN = Entry(BY_HAND, "engine", "float32", "sdpa", HANDWRITTEN)
_PRODUCTS = [Entry(PRODUCTS, "products", dtype, "sdpa") for dtype in PRECISIONS]


def entries(scene: Scene) -> list[Entry]:
    """The contestants of a scene, with all their variants."""
    first_sweeps = list({entry.contestant: entry for entry in reversed(_SWEEPS)}.values())
    if scene.name == "quick":
        return [*(loop for loop in _LOOPS if loop.dtype == "float32"), _FEDRA_LOOP, *first_sweeps]
    if scene.idle:
        sweeps = [entry for entry in first_sweeps if entry.dtype == "float32"]
        return [_LOOPS[0], *(_FRAMEWORKS if scene not in QUICK else []), _FEDRA_LOOP, *sweeps]
    if not scene.own_model:
        sequential = _ENGINE[:1] if scene.task == "embedded_default" else []
        return [_HANDWRITTEN, *sequential, *_SWEEPS]
    if scene.threads > 1:
        return [*_LOOPS, *_FRAMEWORKS, *_SWEEPS]
    if scene.capacities == FULL_DEPTH:
        # The structure of FedRA's code, and sub-models built for every client, are for clients that lack blocks.
        return [*_LOOPS, *_FRAMEWORKS, *_SWEEPS, *_PRODUCTS]
    return [*_LOOPS, *_FRAMEWORKS, _FEDRA_LOOP, *(_ENGINE if scene.width == 192 else _SWEEPS), *_PRODUCTS]


def by_contestant(racing: Iterable[Entry]) -> list[list[Entry]]:
    """The variants of each contestant, in the order in which contestants first appear."""
    variants: dict[tuple[str, str], list[Entry]] = {}
    for entry in racing:
        variants.setdefault(entry.contestant, []).append(entry)
    return list(variants.values())
