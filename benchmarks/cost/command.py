"""`microbench.py step`: what a training step asks of a GPU, and how long GPUs should need for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.cost.counter import Count
from benchmarks.cost.rules import Kind
from benchmarks.cost.step import count_step
from benchmarks.gpu.shapes import CAPACITIES, LLAMA_8B, VIT_BASE, ModelShape
from benchmarks.kernels.work import CARDS
from fedra_engine.runtime.errors import count_of
from fedra_engine.runtime.tables import PlainConsole

_KINDS: Mapping[Kind, str] = {
    "products": "frozen products with their expand",
    "attention": "attention",
    "the rest": "everything else",
}
_LEAST_SHARE = 1e-3
"""Of all bytes; ops that move less are one line together."""
_SAMPLES_OF_CLIENT = 32


@dataclass(frozen=True)
class StepModel:
    """A model, and the step of it that docs/gpu.md has: clients at a time, and images or texts of each."""

    shape: ModelShape
    lanes: int
    samples: int


MODELS: Mapping[str, StepModel] = {
    "vit-b": StepModel(VIT_BASE, 64, 16),
    "llama-8b": StepModel(LLAMA_8B, 8, 1),
}


def run_step(shape: ModelShape, *, lanes: int, samples: int, all_blocks: bool) -> None:
    """Print the tables for a step of `lanes` clients with so many images or texts each.

    The clients hold as large a share of the blocks as FedRA's do, or `all_blocks`.
    """
    shares = tuple(blocks * shape.depth // max(CAPACITIES) for blocks in CAPACITIES)
    capacities: Sequence[int] = (shape.depth,) if all_blocks else shares
    counts = {
        name: count_step(shape, lanes=lanes, samples=samples, capacities=capacities, architecture=card.architecture)
        for name, card in CARDS.items()
    }
    console = PlainConsole(width=150)
    console.print(_card_table())
    console.print(_op_table(f"{lanes} lanes × {count_of(samples, 'sample')} of {shape.tokens:,} tokens", counts))
    console.print(_total_table(counts, lanes=lanes, samples=samples))


def _card_table() -> Table:
    table = Table(title="Assumed of these GPUs, in bf16", title_justify="left")
    table.add_column("GPU")
    for column in ("TFLOP/s", "% of data sheet", "TB/s", "% of data sheet"):
        table.add_column(column, justify="right")
    for name, card in CARDS.items():
        flops, bandwidth = card.peaks.flops, card.peaks.bandwidth
        shares = 100 * flops / card.sheet.flops, 100 * bandwidth / card.sheet.bandwidth
        table.add_row(name, f"{flops / 1e12:.0f}", f"{shares[0]:.0f}", f"{bandwidth / 1e12:.3g}", f"{shares[1]:.0f}")
    return table


def _op_table(step: str, counts: Mapping[str, Count]) -> Table:
    """A line for each op of a step; launches, FLOPs and bytes are those of the first GPU."""
    first = next(iter(counts.values()))
    table = Table(title=f"One step of {step}, by op: expected ms by counted bytes and FLOPs", title_justify="left")
    table.add_column("op")
    for column in ("launches", "TFLOP", "GB", *counts):
        table.add_column(column, justify="right")
    small = [op for op in first.ops if first.of(op).bytes < _LEAST_SHARE * first.bytes]
    for op in first.ops:
        if op not in small:
            _add_row(table, op, {name: count.of(op) for name, count in counts.items()})
    if small:
        _add_row(table, f"{len(small)} others", {name: count.of(*small) for name, count in counts.items()})
    return table


def _total_table(counts: Mapping[str, Count], *, lanes: int, samples: int) -> Table:
    table = Table(title="The same step as a whole", title_justify="left")
    table.add_column("part")
    for column in ("launches", "TFLOP", "GB", *counts):
        table.add_column(column, justify="right")
    for kind, title in _KINDS.items():
        _add_row(table, title, {name: count.of(kind=kind) for name, count in counts.items()})
    table.add_section()
    for ours, title in ((True, "kernels of this project"), (False, "kernels of torch")):
        _add_row(table, title, {name: count.of(ours=ours) for name, count in counts.items()})
    table.add_section()
    _add_row(table, "all", dict(counts), style="bold")
    steps = _SAMPLES_OF_CLIENT / samples
    seconds = {name: steps * count.seconds(CARDS[name].peaks) for name, count in counts.items()}
    rates = [f"{lanes / each:.3g}" for each in seconds.values()]
    table.add_row(f"clients a second ({_SAMPLES_OF_CLIENT} samples each)", "", "", "", *rates)
    return table


def _add_row(table: Table, title: str, counts: Mapping[str, Count], style: str | None = None) -> None:
    first = next(iter(counts.values()))
    milliseconds = [f"{1000 * count.seconds(CARDS[name].peaks):.2f}" for name, count in counts.items()]
    sizes = (str(first.launches), f"{first.flops / 1e12:.3f}", f"{first.bytes / 1e9:.2f}")
    table.add_row(title, *sizes, *milliseconds, style=style)
