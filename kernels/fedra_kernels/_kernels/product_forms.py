"""The forms of the frozen products: their tiles, and how programs share these.

One program a tile: where the tile is small, two of them fit a streaming multiprocessor, and the one multiplies while
the other begins or ends its tile. Or persistent: as many programs as the GPU has multiprocessors, each of which walks
over tiles. In what Triton 3.7.1 makes of these for sm_90 and sm_100, the TMA loads of the next tile's first two blocks
come before the last tile's low-rank product and its store; the row tables of a tile are read before its first product;
on sm_90, S and the factor are loaded while the last product of the frozen weight runs.

A form depends on architecture, dtype, rank, columns and alignment, never on the rows of a launch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from ..dispatch import architecture
from .configs import Tile, shape_class
from .tile_loads import have_descriptors

MOST_PADDING = 1 / 8
"""A form is passed over if filling its tiles would add more than this part of the columns."""
INTERPRETED_PROGRAMS = 3
"""Persistent programs where there is no GPU: fewer than most launches have tiles."""


@dataclass(frozen=True)
class Form:
    """How a product is made.

    chosen_by: what chose it: "counted", or "measured on" a GPU; times are multiples of the frozen product's alone.
    parts: in how many parts of its columns a tile ends, so that residual rows and a staged store fit beside it.
    separate: the low-rank product has an accumulator of its own, by parts: dropout acts on it alone; for sm_100 Triton
        compiles nothing else inside the fused loops; on sm_80 the other way spills registers.
    most_rank: above which registers spill; None: none.
    """

    tile: Tile
    chosen_by: str = field(default="", compare=False)
    persistent: bool = False
    parts: int = 1
    separate: bool = False
    most_rank: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What the kernels of all products are told, and the launch options."""
        return {"PARTS": self.parts, "PERSISTENT": self.persistent, **self.tile.product_options}


Forms = Mapping[str, Mapping[str, Sequence[Form]]]
"""By architecture and shape class (see `configs.shape_class`). The first form that fits is taken; the last one always
fits. The tiles of a class have equally many rows, so that one table of spans serves all forms."""


def _forms(half: Sequence[Form], single: Form) -> Mapping[str, Sequence[Form]]:
    return {"narrow": half, "wide": half, "float": [single]}


_ONLY_ONE = "counted: no spills; nothing better was tried"
_LEAST = "counted: 1.1 to 1.2 at K = 768, 1.05 to 1.1 at K = 3072, less than any other form"
_SHARED = "counted: 98 KiB, so that two fit a multiprocessor; 1.15 to 1.3 at K = 768, 1.1 to 1.2 at K = 3072"
_WIDE, _SMALL = Tile(128, 256, 64, 8, 3, True), Tile(128, 128, 64, 4, 3, True)
_EIGHT_WARPS = Tile(128, 128, 64, 8, 3, True)
_FLOAT = Form(Tile(64, 64, 16, 8, 3), _ONLY_ONE)
_FLOAT_TWO_STAGES = Form(Tile(64, 64, 16, 8, 2), _ONLY_ONE)
_INTERPRETED = (
    Form(Tile(32, 64, 32, 4, 1, True), "as on sm_90", persistent=True, parts=2),
    Form(Tile(32, 32, 32, 4, 1, True), "as on sm_90"),
)

GEMM_FORMS: Forms = {
    "sm_80": _forms([Form(Tile(128, 128, 64, 8, 4), _ONLY_ONE, separate=True)], _FLOAT),
    "sm_90": _forms(
        [
            Form(_WIDE, _LEAST, persistent=True, parts=4, most_rank=64),
            Form(_SMALL, _SHARED, parts=2, most_rank=64),
            Form(_EIGHT_WARPS, _ONLY_ONE, parts=2),
        ],
        _FLOAT,
    ),
    "sm_100": _forms(
        [Form(_WIDE, _LEAST, persistent=True, parts=4, separate=True, most_rank=64), Form(_SMALL, _SHARED, parts=2)],
        Form(Tile(64, 64, 16, 4, 3), _ONLY_ONE),
    ),
    "gfx942": _forms([Form(Tile(128, 128, 32, 8, 2), _ONLY_ONE)], _FLOAT_TWO_STAGES),
    "small": _forms([Form(Tile(64, 128, 64, 4, 3), _ONLY_ONE)], _FLOAT_TWO_STAGES),
    "interpreter": dict.fromkeys(("narrow", "wide", "float"), _INTERPRETED),
}


def _dropout(half: Tile, single: Tile) -> Mapping[str, Sequence[Form]]:
    """The mask lives beside two accumulators: smaller tiles."""
    return _forms([Form(half, _ONLY_ONE, separate=True)], Form(single, _ONLY_ONE, separate=True))


DROPOUT_FORMS: Forms = {
    "sm_80": _dropout(Tile(128, 64, 64, 4, 4), Tile(64, 64, 16, 8, 3)),
    "sm_90": _dropout(Tile(128, 128, 64, 8, 4, True), Tile(64, 64, 16, 4, 3)),
    "sm_100": _dropout(Tile(128, 128, 64, 8, 4, True), Tile(64, 64, 16, 8, 3)),
    "gfx942": _dropout(Tile(128, 64, 32, 8, 2), Tile(64, 64, 16, 8, 2)),
    "small": _dropout(Tile(64, 64, 64, 4, 3), Tile(64, 64, 16, 8, 2)),
    "interpreter": _dropout(Tile(32, 32, 32, 4, 1, True), Tile(32, 32, 32, 4, 1)),
}

SINGLE_PASS_FORMS: Forms = {
    "sm_80": {
        "narrow": [Form(Tile(128, 128, 64, 8, 4), _ONLY_ONE)],
        "float": [Form(Tile(64, 64, 16, 4, 2), _ONLY_ONE)],
    },
    "sm_90": {
        "narrow": [
            Form(_WIDE, "counted: 1.08 to 1.18; S is 6 % of a tile", persistent=True, parts=4, most_rank=16),
            Form(_EIGHT_WARPS, "counted: no spills; with four warps there are some", parts=2),
        ],
        "float": [Form(Tile(64, 32, 16, 4, 3), _ONLY_ONE)],
    },
    "sm_100": {
        "narrow": [Form(_WIDE, _ONLY_ONE, parts=2)],
        "float": [Form(Tile(64, 32, 16, 4, 3), _ONLY_ONE)],
    },
    "gfx942": {"narrow": [Form(Tile(128, 128, 32, 8, 2), _ONLY_ONE)], "float": [_FLOAT_TWO_STAGES]},
    "small": {
        "narrow": [Form(Tile(64, 128, 64, 4, 3), _ONLY_ONE)],
        "float": [Form(Tile(64, 32, 16, 4, 3), _ONLY_ONE)],
    },
    "interpreter": dict.fromkeys(("narrow", "float"), _INTERPRETED),
}


def form_tile(forms: Forms, tensor: Tensor, rank: int) -> Tile:
    """The last candidate's tile: all have as many rows, so that tables of spans can be made before one is chosen."""
    return forms[architecture(tensor.device)][shape_class(tensor.dtype, rank)][-1].tile


def choose_form(forms: Forms, rank: int, x: Sequence[Tensor], weight: Tensor, widths: Sequence[int]) -> Form:
    """The form for x in pieces of columns, times a weight whose outputs are segments of these widths."""
    candidates = forms[architecture(weight.device)][shape_class(weight.dtype, rank)]
    return next((form for form in candidates[:-1] if _fits(form, rank, x, weight, widths)), candidates[-1])


def _fits(form: Form, rank: int, x: Sequence[Tensor], weight: Tensor, widths: Sequence[int]) -> bool:
    padded = padded_columns(form.tile, widths) > (1 + MOST_PADDING) * sum(widths)
    spilled = form.most_rank is not None and rank > form.most_rank
    return not padded and not spilled and have_descriptors(x, weight)


def padded_columns(tile: Tile, widths: Sequence[int]) -> int:
    """Columns of all tiles of segments of these widths."""
    return sum(triton.cdiv(width, tile.columns) for width in widths) * tile.columns


def programs(form: Form, row_tiles: int, widths: Sequence[int], device: torch.device) -> int:
    """How many programs a launch has: one for each tile, or, persistent, at most one for each multiprocessor."""
    tiles = row_tiles * padded_columns(form.tile, widths) // form.tile.columns
    return min(tiles, _multiprocessors(device)) if form.persistent else tiles


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count
