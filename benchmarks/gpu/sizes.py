"""All that distinguishes the report on a GPU from its rehearsal: one table of sizes, which every stage takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu.ops import Widths
from benchmarks.gpu.shapes import SMALL_VIT, VIT_BASE, VitShape
from benchmarks.kernels.cases import Sizes, llama_7b, vit_base
from fedra_kernels._kernels.configs import Tile
from fedra_kernels._kernels.product_forms import Form


@dataclass(frozen=True)
class Point:
    """A measurement of whole rounds: `lanes` clients at a time, each with `samples` a step.

    Attributes:
        shape: the model; None for the embedded default's.
        steps: local steps of each client in a round.
        sequential: clients of the PEFT loop that is compared.
        graph_steps: steps of a round that is compared with the same as CUDA graphs; 0 for none.
    """

    shape: VitShape | None
    lanes: int
    samples: int
    steps: int
    sequential: int
    graph_steps: int = 0

    @property
    def name(self) -> str:
        """Model, lanes and samples a step, as tables have them."""
        model = "embedded model" if self.shape is None else "ViT"
        return f"{model} {self.lanes} × {self.samples}"


@dataclass(frozen=True)
class OpSizes:
    """What the ops are checked on: the rows of each client, and the features of a layer."""

    rows: tuple[int, ...]
    widths: Widths


@dataclass(frozen=True)
class ReportSizes:
    """The sizes of every stage.

    Attributes:
        notice: what every line that is printed begins with.
        device: where the stages run.
        dtype: of models and ops, but for the checks of rounds, which are float32.
        total: seconds of the whole report.
        limits: seconds of each stage's process; the rest of the baselines gets what the others leave.
        refresh: seconds between two writes of the output while a stage runs.
        interpreted: stages, "checked ops" and "checked rounds", where kernels run in Triton's interpreter; on a CPU the
            others take the torch path.
        workers: how the processes that compile start: "fork" or "spawn"; forked ones need not import the libraries
            again, which takes ten seconds.
        compiled, smoke_compiled: groups of calls that are compiled ahead, and those before the first stage.
        compile_for: the architecture for which; None: that of the device.
        products: (rows, inputs, outputs) of torch's matrix products that are measured.
        peak: size of the large product, and of the large copy.
        block: the batch of one block in the kernel benchmarks, on a device.
        second_block: the batch of a block of a LLaMA.
        second_layers: (inputs, outputs) of layers at that batch in which forms are tried as well.
        seconds: spent on each provider of a kernel benchmark.
        forms: of the product with the expand that are tried.
        points: of the whole rounds.
        scaling, scaling_shape, scaling_lanes, scaling_samples: numbers of clients, their model, lanes and samples.
        ops, round_shape, round_clients, round_steps: what is checked.
        smoke_ops, smoke_shape: what is tried first of all.
        tests, marker, keyword: folder or file of the tests, and pytest's options -m and -k that choose among them.
        most_processes: for the tests, each of which may hold a CUDA context of half a gigabyte.
    """

    notice: str
    device: str
    dtype: torch.dtype
    total: float
    limits: Mapping[str, float]
    refresh: float
    interpreted: frozenset[str]
    workers: str
    compiled: tuple[str, ...]
    smoke_compiled: tuple[str, ...]
    compile_for: str | None
    products: tuple[tuple[int, int, int], ...]
    peak: int
    block: Callable[[torch.device], Sizes]
    second_layers: tuple[tuple[int, int], ...]
    second_block: Callable[[torch.device], Sizes]
    seconds: float
    forms: tuple[Form, ...]
    points: tuple[Point, ...]
    scaling: Sequence[int]
    scaling_shape: VitShape
    scaling_lanes: int
    scaling_samples: int
    ops: OpSizes
    smoke_ops: OpSizes
    round_shape: VitShape
    smoke_shape: VitShape
    round_clients: int
    round_steps: int
    tests: str
    marker: str
    keyword: str
    most_processes: int


def _vit_products(*rows: int) -> tuple[tuple[int, int, int], ...]:
    layers = dict.fromkeys([(768, 2304), *VIT_BASE.layers])
    return tuple((count, *layer) for count in rows for layer in layers)


def _tiny_block(device: torch.device) -> Sizes:
    return Sizes(2, 1, 5, 16, 32, 4, 4, 2, 10, torch.float32, device, torch.float64)


GPU = ReportSizes(
    notice="",
    device="cuda",
    dtype=torch.bfloat16,
    total=420.0,
    limits={
        "smoke": 45.0,
        "compile": 36.0,
        "kernels": 75.0,
        "end_to_end": 85.0,
        "tests": 90.0,
        "checks": 32.0,
        "scaling": 32.0,
    },
    refresh=10.0,
    interpreted=frozenset(),
    workers="fork",
    compiled=("step", "embedded step", "kernels", "tiles", "checked ops", "checked round"),
    smoke_compiled=("smoke ops", "smoke round"),
    compile_for=None,
    products=(*_vit_products(64 * 16 * 197, 64 * 4 * 197), (32_768, 4096, 4096), (32_768, 4096, 14_336)),
    peak=8192,
    block=vit_base,
    second_layers=((4096, 4096), (4096, 14_336)),
    second_block=llama_7b,
    seconds=0.15,
    forms=(
        Form(Tile(128, 256, 64, 8, 3, True), persistent=True, parts=4),
        Form(Tile(128, 256, 64, 8, 4, True), persistent=True, parts=4),
        Form(Tile(128, 128, 64, 8, 4, True), persistent=True, parts=2),
        Form(Tile(128, 128, 64, 4, 3, True), parts=2),
        Form(Tile(128, 128, 64, 8, 3, True), parts=2),
        Form(Tile(128, 256, 64, 8, 3, True), parts=2),
        Form(Tile(256, 128, 64, 8, 3, True), parts=2),
    ),
    points=(
        Point(VIT_BASE, 64, 16, 2, 6),
        Point(VIT_BASE, 64, 4, 2, 6),
        Point(VIT_BASE, 256, 1, 2, 6, graph_steps=6),
        Point(None, 30, 16, 5, 6, graph_steps=12),
    ),
    scaling=(16, 64, 256, 1024),
    scaling_shape=VIT_BASE,
    scaling_lanes=64,
    scaling_samples=4,
    ops=OpSizes((591, 5, 197, 64, 1, 394, 128, 788), Widths()),
    smoke_ops=OpSizes((197, 64, 1, 300), Widths()),
    round_shape=SMALL_VIT,
    smoke_shape=SMALL_VIT,
    round_clients=8,
    round_steps=2,
    tests="tests/gpu",
    marker="gpu",
    keyword="",
    most_processes=14,
)

_TINY_VIT = VitShape(width=32, hidden=64, depth=3, heads=2, image=16, patch=8, classes=5, rank=4, pool=8)
_TINY_OPS = OpSizes((3, 1), Widths(24, 16, 4, 3))

REHEARSAL = replace(
    GPU,
    notice="rehearsal, no GPU's figure | ",
    device="cpu",
    dtype=torch.float32,
    total=330.0,
    # Two cores that others use as well: libraries alone take half a minute to import.
    limits=dict.fromkeys(GPU.limits, 90.0),
    interpreted=frozenset({"smoke", "checked ops", "tests"}),
    workers="spawn",
    compiled=("smoke ops",),
    smoke_compiled=(),
    compile_for="sm_90",
    products=((64, 32, 32), (64, 32, 64)),
    peak=64,
    block=_tiny_block,
    second_layers=((24, 24), (24, 40)),
    second_block=_tiny_block,
    seconds=0.0005,
    forms=(GPU.forms[0], GPU.forms[3]),
    points=(Point(_TINY_VIT, 2, 2, 2, 1, graph_steps=2), Point(None, 2, 1, 1, 1)),
    scaling=(2, 5),
    scaling_shape=_TINY_VIT,
    scaling_lanes=2,
    scaling_samples=1,
    ops=_TINY_OPS,
    smoke_ops=_TINY_OPS,
    round_shape=replace(_TINY_VIT, depth=2),
    smoke_shape=replace(_TINY_VIT, depth=2),
    round_clients=2,
    round_steps=2,
    tests="tests/kernels/interpreter/test_slots.py",
    marker="not gpu",
    keyword="aggregate or norms",
    most_processes=2,
)
