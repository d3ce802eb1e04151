"""A round is recomputed from its trace by code that knows nothing of the engine but the file format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification

from tests.running import run_experiment

MODEL = Path(__file__).parents[2] / "fedra_engine" / "assets" / "digits_vit"
LR, MOMENTUM, DECAY, CLIP, SCALE = 0.1, 0.9, 0.01, 0.05, 2.0


class LoraLinear(nn.Module):
    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.linear, self.a, self.b = linear, nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + SCALE * (x @ self.a.T) @ self.b.T


class StandIn(nn.Module):
    def __init__(self, maps: dict[str, Tensor], block: int) -> None:
        super().__init__()
        self.mean, self.down, self.up, self.bias = (maps[name][block] for name in ("mean", "down", "up", "bias"))

    def forward(self, hidden: Tensor, *others: object) -> Tensor:
        return hidden + (hidden - self.mean) @ self.down @ self.up + self.bias


def submodel(
    blocks: list[int], state: dict[str, Tensor], maps: dict[str, Tensor], replaced: list[int]
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    model = AutoModelForImageClassification.from_pretrained(MODEL, dtype=torch.float64).eval().requires_grad_(False)
    parameters = {}
    for block in blocks:
        for path in ("attention.o_proj", "mlp.fc2"):
            key = f"blocks.{block}.{path}"
            layer = LoraLinear(
                model.vit.layers[block].get_submodule(path), state[f"{key}.lora_A"], state[f"{key}.lora_B"]
            )
            model.vit.layers[block].set_submodule(path, layer)
            parameters |= {f"{key}.lora_A": layer.a, f"{key}.lora_B": layer.b}
    model.vit.layers = nn.ModuleList(
        StandIn(maps, block) if block in replaced else model.vit.layers[block] for block in sorted(blocks + replaced)
    )
    model.classifier.weight = nn.Parameter(state["head.weight"].clone())
    model.classifier.bias = nn.Parameter(state["head.bias"].clone())
    return model, parameters | {"head.weight": model.classifier.weight, "head.bias": model.classifier.bias}


def train(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    batches: list[list[int]],
    inputs: Tensor,
    labels: Tensor,
) -> dict[str, Tensor]:
    velocity = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for rows in batches:
        loss = cross_entropy(model(inputs[rows]).logits, labels[rows])
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients))
        with torch.no_grad():
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                clipped = gradient * min(1.0, CLIP / (norm + 1e-6)) + DECAY * parameter
                velocity[name] = MOMENTUM * velocity[name] + clipped
                parameter -= LR * velocity[name]
    return {name: parameter.detach() for name, parameter in parameters.items()}


def average(before: dict[str, Tensor], updates: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    held = {name: [update[name] for update in updates if name in update] for name in before}
    return {name: torch.stack(values).mean(0) if values else before[name] for name, values in held.items()}


def assert_same_change(found: dict[str, Tensor], expected: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        change = (tensor - before[name]).abs().max()
        assert (found[name] - tensor).abs().max() <= 1e-8 * change, name


@pytest.fixture(scope="module", params=["none", "linear"], ids=["skipped", "stand-ins"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_experiment(
        tmp_path_factory.mktemp("trace"),
        rounds=2,
        trace=True,
        method={"stand_in": request.param},
        model={"dtype": "float64"},
        lora={"dropout": 0.0, "rank": 4, "alpha": 8.0, "target_modules": ["o_proj", "fc2"]},
        training={
            "optimizer": "sgd",
            "lr": LR,
            "lr_schedule": "constant",
            "momentum": MOMENTUM,
            "weight_decay": DECAY,
            "clip_norm": CLIP,
            "batch_size": 6,
            "local_epochs": 1,
            "max_local_steps": 3,
        },
    )


def test_a_round_can_be_recomputed_from_its_trace(run: Path) -> None:
    samples = load_file(run / "trace" / "inputs.safetensors")
    # After the first round B is no longer zero, so the second exercises all products.
    folder = run / "trace" / "round_0001"
    before, after = (
        load_file(folder / "global_before.safetensors"),
        load_file(folder / "global_after.safetensors"),
    )
    batches = json.loads((folder / "batches.json").read_text())
    participants = json.loads((folder / "participants.json").read_text())
    allocation = np.load(folder / "allocation.npy")
    assert allocation.dtype == np.bool_
    assert allocation.sum(axis=1).tolist() == [participant["capacity"] for participant in participants]
    maps, replaced = {}, np.zeros_like(allocation)
    if (folder / "stand_ins.safetensors").exists():
        maps, replaced = load_file(folder / "stand_ins.safetensors"), np.load(folder / "replaced.npy")
        assert np.array_equal(replaced, ~allocation)
    updates = []
    for participant, row, others in zip(participants, allocation, replaced, strict=True):
        client = participant["client"]
        own = submodel(np.flatnonzero(row).tolist(), before, maps, np.flatnonzero(others).tolist())
        updates.append(train(*own, batches[str(client)], samples["inputs"], samples["labels"]))
        assert_same_change(load_file(folder / f"client_{client}.safetensors"), updates[-1], before)
    unheld = {name for name in before if all(name not in update for update in updates)}
    changed = {name: tensor for name, tensor in average(before, updates).items() if name not in unheld}
    assert_same_change({name: after[name] for name in changed}, changed, before)
    for name in unheld:
        assert torch.equal(after[name], before[name])


def test_rounds_follow_each_other_in_the_trace(run: Path) -> None:
    first, second = (run / "trace" / f"round_{round:04d}" for round in range(2))
    ended, began = (
        load_file(first / "global_after.safetensors"),
        load_file(second / "global_before.safetensors"),
    )
    assert all(torch.equal(ended[name], began[name]) for name in ended)
