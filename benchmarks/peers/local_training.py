"""A client's training as a careful user of PEFT writes it: the model is loaded and wrapped once, for all clients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

from benchmarks.peers.work import State, Work
from fedra_engine.models.peft_library import LoraLayer, PeftLoraConfig, inject_adapter_in_model

_ADAPTER = "default"


class CachedModel(nn.Module):
    """The frozen model with PEFT's adapters in all blocks, of which those of one client are in use at a time.

    In bfloat16, adapters and classifier keep float32, as PEFT has it around whole models.

    Attributes:
        trained: the trainable parameters by their names in `Work.state`.
    """

    def __init__(self, work: Work, attention: str, dtype: torch.dtype) -> None:
        """Load the model with transformers' implementation of `attention`."""
        super().__init__()
        settings = AutoConfig.from_pretrained(work.model)
        is_text = settings.model_type == "bert"
        auto: Any = AutoModelForSequenceClassification if is_text else AutoModelForImageClassification
        model = auto.from_pretrained(work.model, attn_implementation=attention, dtype=dtype)
        self.model = model.eval().requires_grad_(False)
        self.inputs = {name: _cast(values, dtype) for name, values in work.inputs.items()}
        self._path, _, self._name = work.block_path.rpartition(".")
        blocks = self.model.get_submodule(work.block_path)
        assert isinstance(blocks, nn.ModuleList)
        self.blocks = blocks
        self.trained: dict[str, nn.Parameter] = self._adapt(work)
        classes, features = work.state["head.weight"].shape
        head = nn.Linear(features, classes)
        # It has full precision even if the model has not.
        head.register_forward_pre_hook(lambda module, args: (args[0].float(),))
        path, _, name = work.head_path.rpartition(".")
        setattr(self.model.get_submodule(path), name, head)
        self.trained["head.weight"], self.trained["head.bias"] = head.parameters()

    def _adapt(self, work: Work) -> dict[str, nn.Parameter]:
        """Put adapters around the targets of all blocks; returns their factors by name."""
        names = [f"{block}.{target}" for block in range(len(self.blocks)) for target in work.targets]
        settings = PeftLoraConfig(r=work.rank, lora_alpha=work.alpha, lora_dropout=0.0, target_modules=names)
        inject_adapter_in_model(settings, self.blocks)
        factors: dict[str, nn.Parameter] = {}
        for name in names:
            layer = self.blocks.get_submodule(name)
            assert isinstance(layer, LoraLayer)
            # What PEFT does around whole models, and injecting alone does not.
            layer.lora_A.float(), layer.lora_B.float()
            factors[f"blocks.{name}.lora_A"] = layer.lora_A[_ADAPTER].weight
            factors[f"blocks.{name}.lora_B"] = layer.lora_B[_ADAPTER].weight
        return factors

    def use(self, blocks: list[int]) -> None:
        """Make the model that of a client with these `blocks`."""
        chosen = nn.ModuleList([self.blocks[block] for block in blocks])
        setattr(self.model.get_submodule(self._path), self._name, chosen)

    def load(self, state: State) -> None:
        """Copy the values of `state` into the parameters of the same names."""
        with torch.no_grad():
            for name, value in state.items():
                self.trained[name].copy_(value)

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy of the samples `rows` [n] with `labels` [n]."""
        inputs = {name: values[rows] for name, values in self.inputs.items()}
        return cross_entropy(self.model(**inputs).logits, labels)


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype) if values.is_floating_point() else values


def train_client(model: CachedModel, work: Work, client: int, state: State, *, idle: bool) -> State:
    """Train `client` from the global `state`; returns its tensors, which stay valid until the next client is trained.

    An `idle` client takes no steps.
    """
    names = work.names(client)
    model.use(work.held[client])
    model.load({name: state[name] for name in names})
    if not idle:
        take_steps(model, work, client, [model.trained[name] for name in names])
    return {name: model.trained[name].detach() for name in names}


def take_steps(model: CachedModel, work: Work, client: int, parameters: list[nn.Parameter]) -> None:
    """The local steps of `client`, by AdamW with a clipped gradient."""
    optimizer = torch.optim.AdamW(
        parameters, work.lr, betas=work.betas, eps=work.eps, weight_decay=work.weight_decay, fused=True
    )
    for rows in work.batches[client]:
        optimizer.zero_grad()
        model.loss(rows, work.labels[rows]).backward()
        nn.utils.clip_grad_norm_(parameters, work.clip_norm)
        optimizer.step()


def train_all(model: CachedModel, work: Work, state: State, *, idle: bool) -> Iterator[State]:
    """Train one client after another."""
    for client in range(work.clients):
        yield train_client(model, work, client, state, idle=idle)
