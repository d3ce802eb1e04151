"""Counted work: how long a GPU needs at least, from FLOPs and bytes, written down before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """What a device can do.

    flops: per second, of a large matrix product. bandwidth: bytes per second, read and written, of a large copy.
    """

    name: str
    flops: float
    bandwidth: float

    def seconds(self, part: Pass) -> float:
        """A pass takes as long as its products or its traffic, whichever is longer."""
        return max(part.flops / self.flops, part.bytes / self.bandwidth)


@dataclass(frozen=True)
class Card:
    """A GPU that nobody here has measured.

    Attributes:
        architecture: the column of the kernels' configuration tables.
        sheet: what its data sheet says, for dense bf16 products without sparsity and for memory.
        peaks: what large products and copies are assumed to reach.
    """

    architecture: str
    sheet: Peaks
    peaks: Peaks


def _card(name: str, architecture: str, sheet: tuple[float, float], attained: tuple[float, float]) -> Card:
    """`sheet` and `attained` in TFLOP/s and TB/s."""
    (flops, bandwidth), (most, fastest) = sheet, attained
    return Card(
        architecture,
        Peaks(f"{name}, data sheet", flops * 1e12, bandwidth * 1e12),
        Peaks(f"{name}, assumed", most * 1e12, fastest * 1e12),
    )


CARDS = {
    # NVIDIA's data sheets of H100 SXM5, H200 SXM and HGX B200, whose rates are with sparsity: twice these. Assumed of
    # all three: four fifths of the rate in products, and nine tenths of the bandwidth in copies.
    "H100": _card("H100", "sm_90", (989, 3.35), (800, 3.0)),
    "H200": _card("H200", "sm_90", (989, 4.8), (800, 4.3)),
    "B200": _card("B200", "sm_100", (2250, 8.0), (1800, 7.2)),
    # AMD's data sheet of the MI300X. Assumed: half in products, where the clock falls, and four fifths in copies.
    "MI300X": _card("MI300X", "gfx942", (1307, 5.3), (650, 4.3)),
}
"""GPUs for which times are expected where there is none; every attained rate is an assumption."""
H100 = CARDS["H100"].peaks


@dataclass(frozen=True)
class Pass:
    """One pass over memory: FLOPs of its products, and bytes that it must read and write."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Work:
    """The passes an op cannot do without, one after another."""

    passes: tuple[Pass, ...]

    @property
    def flops(self) -> float:
        """Of the products of all passes."""
        return sum(part.flops for part in self.passes)

    @property
    def bytes(self) -> float:
        """Read and written by all passes."""
        return sum(part.bytes for part in self.passes)

    def seconds(self, peaks: Peaks) -> float:
        """The roofline: each pass takes as long as its products or its traffic, whichever is longer."""
        return sum(peaks.seconds(part) for part in self.passes)


def traffic(count: float) -> Work:
    """One pass without products that moves `count` bytes."""
    return Work((Pass(0.0, count),))


def lora_forward(rows: int, inputs: int, outputs: int, rank: int, slots: int, itemsize: int, *, given: bool) -> Work:
    """One pass makes X·Wᵀ and the expand; the shrink shares its read of X unless S is `given`."""
    product = _product(rows, inputs, outputs, itemsize)
    low_rank = 2.0 * rows * rank * (outputs if given else inputs + outputs)
    factors = slots * rank * (outputs if given else inputs + outputs)
    return Work((Pass(product.flops + low_rank, product.bytes + itemsize * (rows * rank + factors)),))


def lora_backward(rows: int, inputs: int, outputs: int, rank: int, slots: int, itemsize: int) -> Work:
    """dS and dB from one read of dY, dA from one read of X, and dX = dY·W + dS·A; gradients in float32."""
    narrow = itemsize * rows * rank
    grad_b = 8.0 * slots * rank * outputs
    grad_a = 8.0 * slots * rank * inputs
    product = _product(rows, outputs, inputs, itemsize)
    return Work(
        (
            Pass(4.0 * rows * rank * outputs, itemsize * rows * outputs + 2 * narrow + grad_b),
            Pass(2.0 * rows * rank * inputs, itemsize * rows * inputs + narrow + grad_a),
            Pass(product.flops + 2.0 * rows * rank * inputs, product.bytes + narrow + itemsize * slots * rank * inputs),
        )
    )


def _product(rows: int, inputs: int, outputs: int, itemsize: int) -> Pass:
    return Pass(2.0 * rows * inputs * outputs, itemsize * (rows * (inputs + outputs) + inputs * outputs))
