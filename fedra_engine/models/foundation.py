"""The frozen foundation model, its parts, and copies of it with fewer blocks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedra_engine.config import LoraConfig
from fedra_engine.models.adapters import AdapterLayout
from fedra_engine.models.loading import PooledClassifier, own_path
from fedra_engine.models.quantization import has_quantized_weight, is_quantized, use_training_products
from fedra_engine.models.sharding import gathered, is_sharded
from fedra_engine.models.structure import (
    find_block_path,
    find_head_path,
    find_norm_path,
    find_output_path,
    find_targets,
    linear_weight,
    stores_input_first,
)
from fedra_engine.models.task import CausalLM, Classification, HeadLayout, Task
from fedra_engine.runtime.errors import InputError, count_of

_SAVED_IN_TEXT_CLASSIFIERS = ("classifier", "score")
"""Endings of modules that PEFT saves with every adapter of a text classifier (task type SEQ_CLS)."""


@dataclass(frozen=True)
class Foundation:
    """A frozen transformer, which only `use_base` changes.

    Attributes:
        model: in eval mode, all parameters frozen; called as `model(**inputs).logits`.
        block_path: dotted path of its block list.
        head_path: dotted path of the Linear that makes its logits: the classifier, or a language model's output layer.
        adapter_layout: layout of a block's adapters.
        adapted: bool [blocks], the blocks that have adapters.
        task: loss and scores, with the head.
        norm_path: dotted path of the norm that clients train with their heads; None if they train none.
        saved_path: dotted path of the module that PEFT saves with the adapters: the head, or a module that contains it.
        saved_beside: tensors, by their names in `model`, that PEFT saves with the head's own.
    """

    model: nn.Module
    block_path: str
    head_path: str
    adapter_layout: AdapterLayout
    adapted: NDArray[np.bool_]
    task: Task
    norm_path: str | None
    saved_path: str
    saved_beside: Mapping[str, Tensor]

    def __repr__(self) -> str:
        return f"Foundation({type(self.model).__name__}, {count_of(self.depth, 'block')})"

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The blocks of `model`."""
        blocks: Any = self.model.get_submodule(self.block_path)
        return blocks

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def head(self) -> nn.Linear:
        """The Linear that makes the logits of `model`, as loaded."""
        return self.task.head

    @property
    def norm(self) -> nn.Module | None:
        """The norm at `norm_path`, as loaded."""
        return None if self.norm_path is None else self.model.get_submodule(self.norm_path)

    @property
    def head_layout(self) -> HeadLayout:
        """Layout of the trained head."""
        return self.task.layout

    @property
    def device(self) -> torch.device:
        """The model's device, where all computation happens."""
        return self.head.weight.device

    @property
    def stores_input_first(self) -> bool:
        """Whether weights of the adapter targets are stored as [in, out] (PEFT's `fan_in_fan_out`)."""
        return any(stores_input_first(self.blocks[0].get_submodule(t.path)) for t in self.adapter_layout.targets)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the frozen weights, but for those that are quantized."""
        return next(parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Precision of trainable weights: the model's, but at least float32."""
        return torch.promote_types(self.dtype, torch.float32)

    def initial_heads(self) -> Tensor:
        """The head as loaded, [1, head size], in `adapter_dtype`."""
        with gathered(self.head):
            return self.head_layout.pack(self.head, self.norm).to(self.adapter_dtype)[None]

    def make_norm(self, head: Tensor) -> nn.Module | None:
        """A client's own norm, with the parameters in `head` [head size]; None if norms are not trained."""
        if self.norm is None:
            return None
        norm = copy.deepcopy(self.norm).to(head.dtype).requires_grad_()
        for name, values in self.head_layout.norm_parameters(head).items():
            norm.get_parameter(name).data.copy_(values)
        # As the head, it has full precision even if the model does not.
        norm.register_forward_pre_hook(lambda module, args: (args[0].to(head.dtype),))
        return norm

    def base(self) -> tuple[Tensor, ...]:
        """A copy of the frozen weights of the adapter targets, per target [blocks, out, in], in `adapter_dtype`."""
        if is_sharded(self.model):
            raise InputError(
                "method.name: found one that rewrites the weights of the model, which are sharded, expected another, "
                "or a job without DeepSpeed"
            )
        if is_quantized(self.model):
            raise InputError(
                "method.name: found one that rewrites the weights of the model, which are quantized, expected another, "
                "or model.load_in null"
            )
        return tuple(
            torch.stack([self._weight(block, target.path) for block in range(self.depth)]).to(self.adapter_dtype)
            for target in self.adapter_layout.targets
        )

    def use_base(self, base: tuple[Tensor, ...]) -> None:
        """Overwrite the weights of the adapter targets with a `GlobalState.base`; an empty one changes nothing."""
        for target, weights in zip(self.adapter_layout.targets, base, strict=False):
            for block, weight in enumerate(weights):
                self._weight(block, target.path).copy_(weight)

    def _weight(self, block: int, path: str) -> Tensor:
        return linear_weight(self.blocks[block].get_submodule(path)).detach()


def make_foundation(
    model: nn.Module, lora: LoraConfig, *, classes: int | None, block_path: str | None = None
) -> Foundation:
    """Freeze `model`, a classifier of `classes` or (None) a causal language model, and find its parts."""
    use_training_products(model.eval().requires_grad_(False))
    # Key-value caches are for generation; in a training pass, samples of many clients would write into one.
    for settings in _configs(model):
        if getattr(settings, "use_cache", False):
            settings.use_cache = False
    path = find_block_path(model, block_path)
    head_path = find_output_path(model) if classes is None else find_head_path(model, path, classes)
    blocks: Any = model.get_submodule(path)
    head: Any = model.get_submodule(head_path)
    adapters = AdapterLayout(find_targets(blocks, lora))
    norm_path = find_norm_path(model, path, lora.modules_to_save)
    shapes = {} if norm_path is None else {n: len(p) for n, p in model.get_submodule(norm_path).named_parameters()}
    norms = (shapes.get("weight", 0), "bias" in shapes)
    layout = HeadLayout(classes or 0, head.in_features, head.bias is not None, *norms)
    task = CausalLM(head, layout) if classes is None else Classification(head, layout)
    saved = (head_path, {}) if classes is None else _saved_with_head(model, head_path)
    return Foundation(model, path, head_path, adapters, _adapted(len(blocks), lora), task, norm_path, *saved)


def _adapted(depth: int, lora: LoraConfig) -> NDArray[np.bool_]:
    """The blocks that `lora.layers_to_transform` names, bool [depth]; all if it names none."""
    named = lora.layers_to_transform
    if named and max(named) >= depth:
        raise InputError(
            f"lora.layers_to_transform: found {max(named)} with a model of {depth} blocks, expected 0 to {depth - 1}"
        )
    return np.isin(np.arange(depth), named or np.arange(depth))


def _saved_with_head(model: nn.Module, head_path: str) -> tuple[str, dict[str, Tensor]]:
    """`Foundation.saved_path` and `saved_beside` of a classifier; tensors of sharded modules are copied.

    PEFT finds the modules to save by the end of their paths, and needs all tensors of each that it finds: of DistilBERT
    `pre_classifier` beside `classifier`, of RoBERTa, whose head is `classifier.out_proj`, all of `classifier`.
    """
    endings = (own_path(model, head_path), *(_SAVED_IN_TEXT_CLASSIFIERS if classifies_text(model) else ()))
    found = [path for path, _ in model.named_modules() if path and own_path(model, path).endswith(endings)]
    outermost = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    tensors: dict[str, Tensor] = {}
    for path in outermost:
        module = model.get_submodule(path)
        sharded = is_sharded(module)
        with gathered(module, recurse=True):
            for name, tensor in module.state_dict(prefix=f"{path}.").items():
                if not name.startswith(f"{head_path}."):
                    tensors[name] = tensor.clone() if sharded else tensor
    (saved_path,) = (path for path in outermost if f"{head_path}.".startswith(f"{path}."))
    return saved_path, tensors


def classifies_text(model: nn.Module) -> bool:
    """Whether a classifier is one of transformers' for texts, with a head of its own."""
    return not isinstance(model, PooledClassifier) and model.main_input_name != "pixel_values"


def _configs(model: nn.Module) -> list[Any]:
    """The distinct configurations of the modules of a `model` of transformers."""
    return list({id(config): config for part in model.modules() if (config := getattr(part, "config", None))}.values())


def share_parameters(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares its parameters and buffers with `model`."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    # Outside of its parameters, such a layer keeps its scales, and may keep its weight once more.
    shared |= {id(module): module for module in model.modules() if has_quantized_weight(module)}
    return copy.deepcopy(model, memo=shared)


def cut_to_blocks(foundation: Foundation, blocks: Sequence[int]) -> nn.Module:
    """A copy of the foundation's module tree with only `blocks`, in this order; parameters are shared."""
    model = share_parameters(foundation.model)
    full: Any = model.get_submodule(foundation.block_path)
    # Models with local and global attention choose the mask of the i-th block by `layer_types[i]`.
    for config in _configs(model):
        if (types := getattr(config, "layer_types", None)) is not None:
            config.layer_types = [types[block] for block in blocks]
    chosen = [full[block] for block in blocks]
    cut = nn.ModuleList(chosen) if isinstance(full, nn.ModuleList) else nn.Sequential(*chosen)
    replace_module(model, foundation.block_path, cut)
    return model


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at dotted `path` below `root`."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
