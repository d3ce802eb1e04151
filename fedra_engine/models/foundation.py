"""Load a frozen foundation model and know its parts."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedra_engine.config import LoraConfig, ModelConfig
from fedra_engine.errors import InputError
from fedra_engine.models.adapters import AdapterLayout
from fedra_engine.models.heads import HeadLayout
from fedra_engine.models.structure import find_block_path, find_head_path, find_targets


@dataclass(frozen=True)
class Foundation:
    """A frozen transformer for classification; nothing but `use_base` ever changes it.

    Attributes:
        model: the whole model in eval mode, all parameters frozen; `model(**inputs).logits`.
        block_path: dotted path of its block list.
        head_path: dotted path of its classifier (a Linear).
        adapter_layout: layout of a block's adapters.
        head_layout: layout of the classifier.
    """

    model: nn.Module
    block_path: str
    head_path: str
    adapter_layout: AdapterLayout
    head_layout: HeadLayout

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The block list of `model`."""
        blocks = self.model.get_submodule(self.block_path)
        assert isinstance(blocks, nn.ModuleList | nn.Sequential)
        return blocks

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def classifier(self) -> nn.Linear:
        """The classifier of `model`, as loaded."""
        head = self.model.get_submodule(self.head_path)
        assert isinstance(head, nn.Linear)
        return head

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the frozen weights."""
        return next(self.model.parameters()).dtype

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Precision of the trainable weights: that of the model, but at least float32."""
        return torch.promote_types(self.dtype, torch.float32)

    def initial_heads(self) -> Tensor:
        """The classifier as loaded, [1, head size], in `adapter_dtype`."""
        return self.head_layout.pack(self.classifier).to(self.adapter_dtype)[None]

    def base(self) -> tuple[Tensor, ...]:
        """The frozen weights of the adapter targets, per target [blocks, out, in], copied in `adapter_dtype`."""
        return tuple(
            torch.stack([self._weight(block, target.path) for block in range(self.depth)]).to(self.adapter_dtype)
            for target in self.adapter_layout.targets
        )

    def use_base(self, base: tuple[Tensor, ...]) -> None:
        """Overwrite the weights of the adapter targets with those of a `GlobalState.base`; nothing if it is empty."""
        for target, weights in zip(self.adapter_layout.targets, base, strict=False):
            for block, weight in enumerate(weights):
                self._weight(block, target.path).copy_(weight)

    def _weight(self, block: int, path: str) -> Tensor:
        linear = self.blocks[block].get_submodule(path)
        assert isinstance(linear, nn.Linear)
        return linear.weight.detach()


def make_foundation(model: nn.Module, lora: LoraConfig, *, classes: int, block_path: str | None = None) -> Foundation:
    """Freeze `model` and find its blocks, classifier and adapter targets.

    Raises:
        InputError: the model lacks one of these.
    """
    model.eval().requires_grad_(False)
    path = find_block_path(model, block_path)
    head_path = find_head_path(model, path, classes)
    blocks = model.get_submodule(path)
    head = model.get_submodule(head_path)
    assert isinstance(blocks, nn.ModuleList | nn.Sequential)
    assert isinstance(head, nn.Linear)
    adapters = AdapterLayout(find_targets(blocks, lora.target_modules), lora.rank)
    return Foundation(model, path, head_path, adapters, HeadLayout(classes, head.in_features))


def share_parameters(model: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters and buffers are those of `model`, not copies."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=shared)


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at dotted `path` below `root`."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def resolve_model_path(path: str) -> str:
    """`path`; if no folder of that name is here, the folder of the model of that name which ships with the package."""
    shipped = files("fedra_engine") / "assets" / path
    return str(shipped) if path.isidentifier() and not Path(path).is_dir() and shipped.is_dir() else path


def load_pretrained(config: ModelConfig, *, classes: int) -> PreTrainedModel:
    """Load a classifier from a Hugging Face directory or hub name; a missing or unfit classification layer is new.

    Raises:
        InputError: no such model, or one transformers cannot load as an image or sequence classifier.
    """
    from transformers import AutoConfig

    path = resolve_model_path(config.path)
    _check_directory(path)
    try:
        auto_class = _classifier_class(AutoConfig.from_pretrained(path))
        # A new layer is the same in every run: its seed is a constant of the model, not of the experiment.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, report = auto_class.from_pretrained(
                path,
                num_labels=classes,
                ignore_mismatched_sizes=True,
                dtype=getattr(torch, config.dtype),
                attn_implementation=config.attention,
                output_loading_info=True,
            )
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"model.path: cannot load {config.path!r}: {reason}") from error
    _check_loaded(model, report, config)
    loaded: PreTrainedModel = model
    return loaded


def _check_loaded(model: PreTrainedModel, report: dict[str, Any], config: ModelConfig) -> None:
    """Only the classification layer may be new; anything else would be a random part of a frozen model."""
    unfit = [*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])]
    inside = [name for name in unfit if name.startswith(f"{model.base_model_prefix}.")]
    if inside:
        raise InputError(
            f"model.path: found no fitting weights in {config.path!r} for {len(inside)} tensors of the model, such as "
            f"{inside[0]}, expected all but those of the classifier"
        )


def _classifier_class(config: Any) -> Any:
    """The transformers auto class that makes a classifier of models with this configuration."""
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification
    from transformers.models.auto import modeling_auto

    if config.model_type in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return AutoModelForImageClassification
    if config.model_type in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return AutoModelForSequenceClassification
    raise InputError(f"model.path: found a {config.model_type} model, expected an image or sequence classifier")


def _check_directory(path: str) -> None:
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_absolute() or path.startswith("."):
            raise InputError(f"model.path: found no folder {path!r}, expected a Hugging Face model directory")
        return
    file = folder / "config.json"
    try:
        json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"model.path: {file} is missing or no JSON, expected a model directory") from error
