"""Counted costs, against real sub-models in training and against figures computed by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedra_engine.config import DeviceConfig, LoraConfig
from fedra_engine.costs.model import measure_block_flops, parameters_of, processed_samples, sample_flops
from fedra_engine.execution.sequential import Submodel
from fedra_engine.experiment import build_experiment
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.work import local_batches
from fedra_engine.models.adapters import initial_adapters
from fedra_engine.models.batch_arguments import probe_batch_arguments
from fedra_engine.models.state import GlobalState
from fedra_engine.studies.compare import count_costs
from fedra_engine.studies.results import RunCosts
from tests.running import small_config
from tests.studies.planned import planned_run
from tests.tiny import DEPTH, TARGETS, make_samples, make_tiny
from tests.tiny_federation import random_stand_ins

SAMPLES = 4
STAND_IN_RANK = 5


def trained_flops(family: str, lora: LoraConfig, assignment: Assignment) -> float:
    """FLOPs of a sample in the blocks of the participant's PEFT model, forward and backward, as torch counts them."""
    foundation = make_tiny(family, lora)
    adapters = initial_adapters(foundation.adapter_layout, DEPTH, seed=0, dtype=torch.float64)
    state = GlobalState(adapters, foundation.initial_heads(), stand_ins=random_stand_ins(torch.float64, STAND_IN_RANK))
    samples = make_samples(family, SAMPLES)
    inputs = samples.inputs(torch.arange(SAMPLES), torch.device("cpu"), torch.float64)

    def some(count: int) -> dict[str, torch.Tensor]:
        return {name: tensor[:count] for name, tensor in inputs.items()}

    arguments = probe_batch_arguments(foundation.model, foundation.blocks, some)
    model = Submodel(foundation, lora, assignment, 0, 0, state, arguments)

    def detach(block: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # The formula has the gradient of the first trained block's input, which torch would spare itself.
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs

    first = model.held[int(np.flatnonzero(assignment.trained_blocks[0, model.blocks])[0])]
    first.register_forward_pre_hook(detach, with_kwargs=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        (logits,) = model.logits(inputs)
        logits.sum().backward()
    counts = counter.get_flop_counts()
    blocks = f"{type(foundation.model).__name__}.{foundation.block_path}"
    return sum(sum(counts[f"{blocks}.{index}"].values()) for index in range(len(model.stages))) / SAMPLES


def one(held: list[int], trained: list[int] | None = None, **others) -> Assignment:
    def row(blocks: list[int]) -> np.ndarray:
        return np.isin(np.arange(DEPTH), blocks)[None]

    return Assignment(row(held), trained=None if trained is None else row(trained), **others)


@pytest.mark.parametrize("family", ["vit", "bert", "gpt2", "llama", "timm_mixer"])
@pytest.mark.parametrize(
    "assignment",
    [
        one([0, 1, 3]),
        one([0, 1, 2, 3], trained=[1, 3]),
        one([1, 2], factors="A"),
        one([1, 2], factors="B"),
        one([0, 3], ranks=np.array([2])),
        one([1, 2]).with_stand_ins(np.arange(DEPTH)),
        one([1, 3], trained=[3]).with_stand_ins(np.arange(DEPTH)),
    ],
    ids=["both factors", "some blocks trained", "A only", "B only", "low rank", "stand-ins", "stand-ins, some trained"],
)
def test_flops_are_those_of_training_the_real_submodel(family: str, assignment: Assignment) -> None:
    lora = LoraConfig(rank=4, alpha=8, target_modules=TARGETS[family])
    foundation = make_tiny(family, lora)
    flops = measure_block_flops(foundation, make_samples(family, SAMPLES))
    counted = sample_flops(assignment, flops, lora.rank, STAND_IN_RANK)
    assert counted[0] == pytest.approx(trained_flops(family, lora, assignment), rel=1e-12)


def test_parameters_are_trained_blocks_times_factors_and_the_heads_of_the_exits() -> None:
    foundation = make_tiny("vit", LoraConfig(rank=4, alpha=8, target_modules=TARGETS["vit"]))
    (o_proj, fc2), head = foundation.adapter_layout.targets, foundation.head_layout.size
    a, b = 4 * (o_proj.in_features + fc2.in_features), 4 * (o_proj.out_features + fc2.out_features)
    held = np.array([[True, True, True, True], [True, True, False, False]])
    exits = Assignment(held, exits=(1, 3))
    assert parameters_of(held, exits, "both", foundation).tolist() == [4 * (a + b) + 2 * head, 2 * (a + b) + head]
    trained = held & [False, True, True, True]
    ranked = Assignment(held, trained=trained, ranks=np.array([4, 1]))
    assert parameters_of(trained, ranked, "both", foundation).tolist() == [3 * (a + b) + head, (a + b) / 4 + head]
    assert parameters_of(trained, ranked, "A", foundation).tolist() == [3 * a + head, a / 4 + head]


@pytest.mark.parametrize(("epochs", "max_steps"), [(1, None), (3, None), (3, 5), (2, 1), (4, 7)])
def test_processed_samples_are_those_of_the_drawn_batches(epochs: int, max_steps: int | None) -> None:
    training = small_config(Path(), training={"local_epochs": epochs, "max_local_steps": max_steps}).training
    counts = np.arange(1, 20)
    drawn = [sum(map(len, local_batches(np.arange(count), training, seed=0, round=0, client=0))) for count in counts]
    assert processed_samples(counts, training).tolist() == drawn


def test_a_run_is_counted_over_its_participants_and_rounds(tmp_path: Path) -> None:
    # The embedded model: six targets of rank 8 in a block of width 64 and 128, and a head for ten digits.
    slot, head = 8 * (4 * (64 + 64) + 2 * (64 + 128)), 65 * 10
    costs = count_costs(planned_run(tmp_path, "fedra").config)
    # Every round one client of each domain; they hold four and two blocks.
    assert costs.trainable_parameters == 3 * slot + head
    assert costs.uploaded_bytes == 4 * (3 * slot + head)
    # Two rounds, two clients, two steps of six samples; five tokens with attention in four heads of 16.
    linear, attention = 2 * 5 * (4 * 64 * 64 + 2 * 64 * 128), 2 * 2 * 5 * 5 * 64
    of_block = 2 * linear + 3 * attention + 3 * 2 * 5 * slot
    assert costs.training_flops == 2 * (2 * 6) * (4 + 2) * of_block
    # One that was stopped after the first.
    assert count_costs(planned_run(tmp_path, "fedra").config, 1).training_flops == costs.training_flops / 2


def test_stand_ins_are_downloaded_and_take_memory(tmp_path: Path) -> None:
    config = planned_run(tmp_path, "fedra").config
    plain = build_experiment(config, torch.device("cpu")).costs()
    config = replace(config, method=replace(config.method, stand_in="linear", stand_in_rank=6, stand_in_samples=20))
    mapped = build_experiment(config, torch.device("cpu")).costs()
    # Mean, bias and both factors of every missing one of the twelve blocks, in float32.
    of_maps = 4 * (12 - mapped.blocks) * (2 * 64 + 2 * 64 * 6)
    assert (mapped.downloaded - plain.downloaded).tolist() == of_maps.tolist()
    assert (mapped.frozen_memory - plain.frozen_memory).tolist() == of_maps.tolist()
    assert mapped.uploaded.tolist() == plain.uploaded.tolist()
    assert mapped.trained_memory.tolist() == plain.trained_memory.tolist()


def test_private_factors_are_not_uploaded(tmp_path: Path) -> None:
    shared, private = (count_costs(planned_run(tmp_path, name).config) for name in ("fedra", "fedsalora"))
    head = 65 * 10
    assert private.trainable_parameters == shared.trainable_parameters
    assert private.uploaded_bytes / 4 - head == (shared.uploaded_bytes / 4 - head) / 2


def test_only_participants_whose_updates_arrive_are_counted(tmp_path: Path) -> None:
    """The clients of the second domain, which hold two blocks, always drop out."""
    config = planned_run(tmp_path, "fedra").config
    config.clients.devices = [DeviceConfig(), DeviceConfig(dropout=1.0)]
    lossy = count_costs(config)
    config.clients.devices = []
    whole = count_costs(config)
    slot, head = 8 * (4 * (64 + 64) + 2 * (64 + 128)), 65 * 10
    assert lossy.trainable_parameters == 4 * slot + head
    assert lossy.uploaded_bytes == 4 * (4 * slot + head)
    assert lossy.training_flops == pytest.approx(whole.training_flops * 4 / 6, rel=1e-12)


def test_a_run_whose_updates_never_arrive_costs_nothing(tmp_path: Path) -> None:
    config = planned_run(tmp_path, "fedra").config
    config.clients.devices = [DeviceConfig(dropout=1.0)]
    assert count_costs(config) == RunCosts(0, 0, 0)
