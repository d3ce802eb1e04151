"""What a training step asks of a GPU, counted without one: launches, waits, copies, and memory for gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import ViTConfig, ViTForImageClassification, masking_utils

from benchmarks.launches import LaunchCounts, counted_launches
from fedra_engine.config import LoraConfig
from fedra_engine.execution.plan import StepTables, plan_groups
from fedra_engine.execution.step_graph import FEWEST_STEPS, GraphCapture
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.execution.sweep_block import BankFactors
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.federation.allocation import uniform_allocation
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.clients import Clients
from fedra_engine.federation.work import LocalWork
from fedra_engine.models import batch_arguments
from fedra_engine.models.adapters import initial_adapters
from fedra_engine.models.foundation import Foundation, make_foundation
from fedra_engine.models.state import GlobalState
from fedra_kernels.dispatch import StandIn, launches_taken_by
from tests.execution.test_assignments import early_exits, penalised_ranks
from tests.kernels.launches import Launch, record_launches
from tests.tiny import CLASSES, FAMILIES, TARGETS, TensorSamples, make_model, make_samples
from tests.tiny_federation import SGD

META = torch.device("meta")
DEPTH = 12
ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
STEPS = 4


@dataclass
class Steps:
    """What each step of a round launched, what making each of its tables copied, and what all of it waited for."""

    steps: list[LaunchCounts]
    tables: list[LaunchCounts]
    round: LaunchCounts


def train(
    monkeypatch: pytest.MonkeyPatch,
    foundation: Foundation,
    samples: TensorSamples,
    *,
    device: torch.device,
    dropout: float = 0.0,
    lanes: int = 4,
    clients: int = 6,
    fuse_blocks: bool = True,
    asked: Callable[..., Assignment] = Assignment,
    exits: int = 1,
    steps: int = STEPS,
    capture: Callable[[], GraphCapture] | None = None,
    taken: bool = False,
) -> Steps:
    """Train a round of clients that take steps of two samples each, and aggregate it.

    `taken`: the caller has something that takes the kernels' launches.
    """
    dtype = foundation.dtype
    rows = np.array_split(np.arange(clients * 2 * steps) % len(samples.labels), clients)
    capacities = np.resize([4, 1, 3, 2, 2, 1] if foundation.depth == 4 else [12, 10, 8, 6, 4, 3], clients)
    training = replace(SGD, batch_size=2)
    work = LocalWork(Clients(rows, np.zeros(clients, np.int64), capacities), np.arange(clients), training, 0, 0, 0.1)
    assignment = asked(uniform_allocation(capacities, foundation.depth, np.random.default_rng(0)))
    lora = LoraConfig(rank=3, dropout=dropout, target_modules=[t.path for t in foundation.adapter_layout.targets])
    model = SweepModel(
        foundation,
        lambda n: samples.inputs(torch.arange(n), device, dtype),
        fuse_blocks=fuse_blocks,
        whole_blocks=False,
    )
    assert (model.fused > 0) == fuse_blocks
    adapters = initial_adapters(foundation.adapter_layout, foundation.depth, seed=0, dtype=foundation.adapter_dtype)
    state = GlobalState(adapters.to(device), foundation.initial_heads().repeat(exits, 1))
    seen = Steps([], [], LaunchCounts())

    def counting(into: list[LaunchCounts], function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            with counted_launches() as counts:
                result = function(*args, **kwargs)
            into.append(counts)
            return result

        return counted

    monkeypatch.setattr(SweepExecutor, "_step", counting(seen.steps, SweepExecutor._step))
    monkeypatch.setattr(StepTables, "__init__", counting(seen.tables, StepTables.__init__))
    executor = SweepExecutor(foundation, model, samples, lora, lanes=lanes, capture=capture)
    aggregator = Aggregator(state)
    stand_in = launches_taken_by(StandIn("sm_90")) if device.type == "cpu" and not taken else nullcontext()
    with stand_in, counted_launches() as counts:
        for updates in executor.train(work, assignment, state):
            aggregator.add(updates)
        aggregator.result()
    seen.round = counts
    return seen


def vit(width: int, depth: int = DEPTH) -> Foundation:
    """A ViT in bfloat16 with adapters on all six Linears of each block."""
    torch.manual_seed(0)
    shape = ViTConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth, num_attention_heads=2,
        image_size=8, patch_size=4, num_channels=1, num_labels=CLASSES,
    )  # fmt: skip
    model = ViTForImageClassification(shape).bfloat16()
    return make_foundation(model, LoraConfig(rank=3, target_modules=ALL_LINEARS), classes=CLASSES)


@pytest.mark.parametrize("width", [16, 80])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_launches_of_a_step_of_a_fused_vit_stay_few(
    monkeypatch: pytest.MonkeyPatch, width: int, dropout: float
) -> None:
    seen = train(monkeypatch, vit(width), make_samples("vit", 12), device=torch.device("cpu"), dropout=dropout, lanes=6)
    # As docs/kernels.md says; the first step also makes tables.
    assert [step.triton.total() for step in seen.steps] == [329 if dropout else 259] * STEPS
    often, tables = (100 if dropout else 66), 24
    assert [step.torch.total() for step in seen.steps] == [often + tables] + [often] * (STEPS - 1)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_kernel_of_a_round_is_compiled_in_its_first_step(monkeypatch: pytest.MonkeyPatch, dropout: float) -> None:
    """Clients of other sizes and depths take the lanes of those that end, and nothing is compiled for them."""
    steps: list[slice] = []
    with record_launches() as launches:

        def marked(*args: Any, **kwargs: Any) -> None:
            start = len(launches)
            step(*args, **kwargs)
            steps.append(slice(start, len(launches)))

        step = SweepExecutor._step
        monkeypatch.setattr(SweepExecutor, "_step", marked)
        train(
            monkeypatch, vit(64), make_samples("vit", 24), device=torch.device("cpu"), dropout=dropout, lanes=3,
            clients=7, taken=True,
        )  # fmt: skip
    assert len(steps) > STEPS
    compiled = {_variant(launch) for launch in launches[steps[0]]}
    for of_step in steps[1:]:
        assert {_variant(launch) for launch in launches[of_step]} <= compiled
    # Alignment and small numbers may distinguish what dtypes, features and shapes do not.
    alike = Counter(shape for shape, _ in compiled)
    assert max(alike.values()) <= 2


def _variant(launch: Launch) -> tuple[tuple[Any, ...], str]:
    """The kernel with its dtypes and constants, and all that Triton compiles it for."""
    constants = [value if kind == "constexpr" else kind for kind, value in launch.specialized.values()]
    return (launch.kernel.__name__, *constants), str(launch.specialized)


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own decoders wait twice: to see whether texts are padded, and whether several are one."""
    monkeypatch.setattr(batch_arguments, "_with_padding", lambda inputs: inputs)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *_: None)


ROUNDS: dict[str, dict[str, Any]] = {
    "vit": {},
    "vit, dropout": {"dropout": 0.3},
    "vit, plain blocks": {"fuse_blocks": False, "dropout": 0.3},
    "vit, early exits": {"asked": early_exits, "exits": 3},
    "vit, penalised ranks": {"asked": penalised_ranks},
    "llama": {},
    "llama_lm": {"dropout": 0.3},
}


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("name", ROUNDS)
def test_the_host_waits_for_nothing_in_a_round(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    family, options = name.partition(",")[0], ROUNDS[name]
    lora = LoraConfig(rank=3, target_modules=TARGETS[family])
    classes = None if FAMILIES[family].causal_lm else CLASSES
    foundation = make_foundation(make_model(family).to(META), lora, classes=classes)
    samples = make_samples(family, 12)
    samples.tensors.pop("attention_mask", None)
    # Reading a tensor without values fails, however it is tried.
    seen = train(monkeypatch, foundation, samples, device=META, **options)
    assert len(seen.steps) >= 2 * STEPS
    assert seen.round.blocking == Counter()
    assert seen.round.copies.total() > 0
    # Inputs (of texts, tokens and mask) and labels, dropout keys, and the positions of learnt tokens.
    most = 5 if family == "llama_lm" else 4
    assert all(step.copies.total() <= most for step in seen.steps[1:])


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("name", ["vit, dropout", "vit, early exits"])
def test_tables_reach_the_device_in_one_copy(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    lora = LoraConfig(rank=3, target_modules=TARGETS["vit"])
    foundation = make_foundation(make_model("vit").to(META), lora, classes=CLASSES)
    seen = train(monkeypatch, foundation, make_samples("vit", 12), device=META, **ROUNDS[name])
    assert len(seen.tables) > 1
    assert [tables.copies.total() for tables in seen.tables] == [1] * len(seen.tables)
    # What the first step had to ask for goes with the tables from then on.
    images, labels, keys = 1, 1, int("dropout" in name)
    assert all(step.copies.total() == images + labels + keys for step in seen.steps[1:])


class Counted:
    """Captures nothing, and notes what a capture would have held."""

    def __init__(self) -> None:
        self.captures: list[LaunchCounts] = []

    def stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        with counted_launches() as counts:
            step()
        self.captures.append(counts)
        return lambda: None


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize(
    ("name", "trained_norm"),
    [*((name, False) for name in ROUNDS if name.startswith("vit")), ("vit", True), ("vit, early exits", True)],
)
def test_a_captured_step_copies_nothing_and_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str, trained_norm: bool
) -> None:
    saved = ["layernorm"] if trained_norm else []
    lora = LoraConfig(rank=3, target_modules=TARGETS["vit"], modules_to_save=saved)
    foundation = make_foundation(make_model("vit").to(META), lora, classes=CLASSES)
    counted = Counted()
    steps = FEWEST_STEPS + 2
    seen = train(
        monkeypatch, foundation, make_samples("vit", 12), device=META, steps=steps, capture=lambda: counted,
        lanes=3, **ROUNDS[name],
    )  # fmt: skip
    # Two sets of tables, of three clients each; replays are left out here.
    assert len(counted.captures) == 2
    for captured in counted.captures:
        assert captured.copies == captured.blocking == Counter()
        assert captured.triton.total() + captured.torch.total() > 100
    copies = 3 if ROUNDS[name].get("dropout") else 2
    for first in (0, steps):
        for step in seen.steps[first + 2 : first + steps]:
            # Inputs, labels and keys, and for each a copy to where the graph reads it; images are normalised.
            assert (step.copies.total(), step.blocking.total(), step.triton.total()) == (copies, 0, 0)
            assert step.torch.total() <= 2 * copies + 4
    # What captured steps had asked for went with the next tables; the rows of trained norms follow in a first step.
    assert seen.steps[steps].copies.total() == copies + trained_norm


def test_what_would_block_is_noticed() -> None:
    values = torch.randn(4)
    with counted_launches() as counts:
        values.sum().item()
        (values > 0).nonzero()
        values[values > 0]
        values.to(META)
        values.to(META, non_blocking=True)
    assert counts.blocking == {"item": 1, "nonzero": 1, "mask as index": 1, "blocking _to_copy": 1}
    assert counts.copies.total() == 2


class _Allocations(TorchDispatchMode):
    """Counts the new tensors of a given size, and the bytes of all new tensors."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self._entries = entries
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.count += leaf.numel() == self._entries
                self.bytes += leaf.nbytes
        return result


def test_the_gradient_of_the_residual_stream_is_not_copied() -> None:
    foundation, samples = vit(16), make_samples("vit", 12)
    model = SweepModel(
        foundation, lambda n: samples.inputs(torch.arange(n), torch.device("cpu"), torch.bfloat16), whole_blocks=False
    )
    adapters = initial_adapters(foundation.adapter_layout, 3 * DEPTH, seed=0, dtype=torch.bfloat16)
    factors = BankFactors(foundation.adapter_layout, adapters, torch.zeros_like(adapters))
    # Nobody holds all blocks, so no block's own rows are as many as the stream's.
    slots = np.arange(3 * DEPTH).reshape(3, DEPTH)
    for client in range(3):
        slots[client, client::3] = -1
    plan = plan_groups(foundation, [2, 3, 2], slots)
    inputs = samples.inputs(torch.arange(7), torch.device("cpu"), torch.bfloat16)
    # No other tensor has as many.
    entries = 7 * 5 * 16
    with launches_taken_by(StandIn("sm_90")):
        features = model.features(inputs, plan, factors)
        with _Allocations(entries) as allocated:
            features.sum().backward(retain_graph=True)
    names = Counter(type(node).__name__ for node in _nodes(features))
    assert names["_StreamBlockBackward"] == DEPTH
    assert "CopySlices" not in names
    # One for the last block, which is given the gradient by others, and two for what reads the blocks' output.
    assert 0 < allocated.count <= 3
    assert allocated.bytes <= 170 * 2 * entries


def _nodes(tensor: Tensor) -> set[Any]:
    """All nodes of the graph that leads to a tensor."""
    found, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return found
