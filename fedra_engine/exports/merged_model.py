"""Export a tuned model, or a client's sub-model, with its adapters merged into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from fedra_engine.callback import Outcome
from fedra_engine.config import ExperimentConfig
from fedra_engine.experiment import Experiment
from fedra_engine.exports.loading_lines import pooling_of
from fedra_engine.exports.model_card import merged_card
from fedra_engine.exports.processor_files import save_processor
from fedra_engine.methods.allocators import USES
from fedra_engine.models.foundation import Foundation, cut_to_blocks, replace_module
from fedra_engine.models.loading import (
    HEAD_FILE,
    PooledClassifier,
    attention_argument,
    hidden_loading_bars,
    own_path,
    without_pooling,
)
from fedra_engine.models.quantization import dequantized, has_quantized_weight
from fedra_engine.models.sharding import is_sharded
from fedra_engine.models.state import GlobalState, head_tensors
from fedra_engine.models.structure import stores_input_first
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.files import make_folders, whole_folder

_SAMPLES = 4
"""Test samples on which the saved model is compared with the tuned one."""


class Part(NamedTuple):
    """What is exported of a state.

    Attributes:
        blocks: int64 [blocks], ascending.
        slots: their adapters, [blocks, slot size].
        head: the classifier, [head size].
    """

    blocks: NDArray[np.int64]
    slots: Tensor
    head: Tensor


def export_merged(
    folder: Path,
    experiment: Experiment,
    state: GlobalState,
    outcome: Outcome,
    *,
    client: int | None = None,
    best_by: str | None = None,
) -> None:
    """Write a model of transformers into a new `folder`, with names of classes, processor and card.

    Args:
        folder: appears whole or not at all.
        state: after the last round, or the best one.
        outcome: of the run until that round.
        client: whose sub-model is written, in place of the whole model; see `part_of_client`.
        best_by: the measure by which the round was the best; None for the last one.

    Raises:
        InputError: `folder` exists, the model cannot be saved, or the client has no sub-model of blocks alone.
    """
    if folder.exists():
        raise InputError(f"output: found {folder}, expected a new folder")
    foundation = experiment.foundation
    own = without_pooling(foundation.model)
    if not isinstance(own, PreTrainedModel):
        raise InputError(
            f"export: found a {type(own).__name__} that was passed from Python, expected a model of transformers (only "
            "the adapter of others can be saved)"
        )
    if is_sharded(foundation.model):
        raise InputError("export: found a job that shards the model, expected a single process without DeepSpeed")
    part = whole_part(experiment, state)
    if client is not None:
        part = part_of_client(experiment, state, outcome.rounds, client)
    foundation.use_base(state.base)
    make_folders(folder.parent)
    samples = experiment.test_samples
    inputs = samples.inputs(torch.arange(min(_SAMPLES, len(samples.domains))), foundation.device, foundation.dtype)
    with whole_folder(folder) as made:
        classes = experiment.train_data.classes
        save_merged(made, foundation, experiment.config, part, classes=classes, inputs=inputs)
        save_processor(made, experiment.processing, experiment.train_data.task)
        card = made / "README.md"
        card.write_text(merged_card(experiment, outcome, part.blocks.tolist(), client, best_by), encoding="utf-8")
        for file in made.iterdir():
            # Libraries may make files that only their owner can read.
            file.chmod(card.stat().st_mode)


def whole_part(experiment: Experiment, state: GlobalState) -> Part:
    """The model whose accuracy is `exported_accuracy`: the method's blocks, and the last classifier."""
    blocks = experiment.method.evaluated_model().blocks
    return Part(blocks, state.adapters[torch.from_numpy(blocks).to(state.adapters.device)], state.heads[-1])


def part_of_client(experiment: Experiment, state: GlobalState, rounds: int, client: int) -> Part:
    """The blocks that `client` held in the last of `rounds` in which it took part, with what it would start from now.

    Raises:
        InputError: there is no such client, it never took part, its blocks are not known any more, or stand-ins replace
            the others.
    """
    config, clients = experiment.config, experiment.clients
    if not 0 <= client < len(clients):
        raise InputError(f"client: found {client}, expected a client from 0 to {len(clients) - 1}")
    if config.method.has_stand_ins:
        raise InputError(
            f"client: found method.name {config.method.name}, whose sub-models have maps in place of blocks, which no "
            "model of transformers has; expected a method without stand-ins"
        )
    if "movement" in USES.get(config.method.allocation or "", ()):
        raise InputError(
            f"client: found method.allocation {config.method.allocation}, which depends on the adapters of earlier "
            "rounds, expected one that can be drawn again"
        )
    for round in reversed(range(rounds)):
        work, assignment, _ = experiment.round_work(round)
        if client in work.participants:
            break
    else:
        raise InputError(f"client: found {client}, which took part in none of {rounds} rounds, expected one that did")
    row = int(np.flatnonzero(work.participants == client)[0])
    held, exit = np.flatnonzero(assignment.held[row]), int(assignment.exits_of(row)[-1])
    if exit < len(assignment.exits):
        held = held[held <= assignment.exits[exit]]
    slots = state.adapters[torch.from_numpy(held).to(state.adapters.device)]
    assignment.make_own(row, client, held, slots, experiment.foundation.adapter_layout)
    return Part(held, slots, state.heads[exit])


@torch.no_grad()
def save_merged(
    folder: Path,
    foundation: Foundation,
    config: ExperimentConfig,
    part: Part,
    *,
    classes: Sequence[str],
    inputs: dict[str, Tensor],
) -> None:
    """Write weights and configuration of `part`, and check on `inputs` that transformers makes the same model of them.

    Quantized weights are turned back, before the adapters are merged. The head of a `PooledClassifier` gets a file of
    its own.

    Raises:
        InputError: no configuration describes the model.
    """
    cut: Any = cut_to_blocks(foundation, part.blocks.tolist())
    if config.model.load_in is not None:
        _dequantize(cut, foundation.dtype)
    tensors = merged_tensors(foundation, cut, part)
    expected = functional_call(cut, tensors, (), inputs, tie_weights=False).logits
    pooling, head = pooling_of(foundation), dict[str, Tensor]()
    own = without_pooling(cut)
    _describe(own, foundation, classes, len(part.blocks))
    if pooling is not None:
        head = {name: tensors.pop(f"{foundation.head_path}.{name}").contiguous().cpu() for name in ("weight", "bias")}
        save_file(head, folder / HEAD_FILE, metadata={"pooling": pooling})
    own.save_pretrained(folder, state_dict={own_path(cut, name): tensor for name, tensor in tensors.items()})
    given = {"dtype": foundation.dtype, "attn_implementation": attention_argument(config.model)}
    with hidden_loading_bars():
        found: Any = type(own).from_pretrained(folder, **given)
    if pooling is not None:
        found = PooledClassifier(found, foundation.head_layout.classes, pooling)
        found.classifier.load_state_dict(head)
    logits = found.to(foundation.device).eval()(**inputs).logits
    tolerance = torch.finfo(foundation.dtype).eps ** 0.5
    if not torch.allclose(
        logits, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()), equal_nan=True
    ):
        raise InputError(
            f"export: found other logits in a saved {type(own).__name__} of {len(part.blocks)} of {foundation.depth} "
            "blocks, expected a model whose configuration can describe that (its adapter can be saved)"
        )


def _dequantize(cut: Any, dtype: torch.dtype) -> None:
    """Replace the quantized layers of `cut`, and what transformers remembers of them."""
    for path, module in list(cut.named_modules()):
        if has_quantized_weight(module):
            replace_module(cut, path, dequantized(module, dtype))
    own = without_pooling(cut)
    own.hf_quantizer.remove_quantization_config(own)


def merged_tensors(foundation: Foundation, cut: nn.Module, part: Part) -> dict[str, Tensor]:
    """The state dict of `cut`, which has the blocks of `part`, with its adapters merged, and its head.

    Sums are rounded to the precision of the model once.
    """
    tensors: dict[str, Tensor] = dict(cut.state_dict())
    layout, head = foundation.adapter_layout, foundation.head_layout
    for position, slot in enumerate(part.slots):
        for index, target in enumerate(layout.targets):
            path = f"{foundation.block_path}.{position}.{target.path}"
            product = target.scale * (layout.lora_b(slot, index) @ layout.lora_a(slot, index))
            weight = tensors[f"{path}.weight"]
            change = product.T if stores_input_first(cut.get_submodule(path)) else product
            tensors[f"{path}.weight"] = (weight + change.to(weight.device)).to(weight.dtype)
    for name, tensor in head_tensors([0], part.head[None], head, exits=1).items():
        owner, _, parameter = name.rpartition(".")
        place = foundation.head_path if owner == "head" else foundation.norm_path
        tensors[f"{place}.{parameter}"] = tensor.to(foundation.dtype)
    return tensors


def _describe(model: PreTrainedModel, foundation: Foundation, classes: Sequence[str], depth: int) -> None:
    """Put the names of the `classes` and the `depth` into the configuration of `model`, whose blocks have been cut."""
    settings: Any = model.config
    if foundation.task.trains_head:
        settings.id2label = dict(enumerate(classes))
        settings.label2id = {name: index for index, name in enumerate(classes)}
        # The base may have been for several labels at once, of which transformers' pipelines make other scores.
        settings.problem_type = "single_label_classification"
    else:
        # Only a training pass must not use the cache.
        settings.get_text_config().use_cache = True
    if depth == foundation.depth:
        return
    path = own_path(foundation.model, foundation.block_path)
    while not hasattr(model.get_submodule(path), "config"):
        path = path.rpartition(".")[0]
    of_blocks: Any = model.get_submodule(path).config
    # The configuration of one of several towers may be a copy.
    for each in (settings, *(getattr(settings, name) for name in settings.sub_configs)):
        if type(each) is type(of_blocks):
            each.num_hidden_layers = depth
            if (stages := getattr(each, "stage_names", None)) is not None:
                # Backbones of other models name the outputs of their blocks.
                each.stage_names = stages[: depth + 1]
                each.out_features = each.stage_names[-1:]
            if getattr(of_blocks, "layer_types", None) is not None:
                each.layer_types = of_blocks.layer_types
