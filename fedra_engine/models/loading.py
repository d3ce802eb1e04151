"""Load a pretrained transformer with the layers that its task needs."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutput

from fedra_engine.config import ModelConfig
from fedra_engine.models.sharding import Sharding, gathered
from fedra_engine.models.structure import find_block_path, find_head_path
from fedra_engine.runtime.errors import InputError, one_line

Pooling = Literal["pooler", "first", "mean", "last"]

_SEED = 0
"""A new layer is the same in every run: its seed is a constant of the model, not of the experiment."""


def resolve_model_path(path: str) -> str:
    """`path`; if no folder of that name is here, the folder of the model of that name which ships with the package."""
    shipped = files("fedra_engine") / "assets" / path
    return str(shipped) if path.isidentifier() and not Path(path).is_dir() and shipped.is_dir() else path


def load_pretrained(
    config: ModelConfig, *, classes: int | None, sharding: Sharding | None = None
) -> PreTrainedModel | PooledClassifier:
    """Load a model from a Hugging Face or timm directory or hub name.

    With `classes` it is an image or text classifier; its last layer is new where none fits the number of classes,
    but nothing before that. A model whose own classification layers lack weights gets a `PooledClassifier`'s. Without
    `classes` it is a causal language model. With `sharding` each process keeps its shard of the weights only.

    Raises:
        InputError: no such model, or one that lacks weights or cannot be used for this.
    """
    path = resolve_model_path(config.path)
    _check_directory(path)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            if classes is None:
                model = _load_causal_lm(config, path, sharding)
            else:
                model = _load_classifier(config, path, classes, sharding)
    except InputError:
        raise
    except Exception as error:  # Whatever a file can make transformers raise.
        hint = "; expected one that can, or model.attention eager" if "attn_implementation" in str(error) else ""
        raise InputError(f"model.path: cannot load {config.path!r}: {one_line(error)}{hint}") from error
    _settle_padding(model.config.get_text_config())
    return model


def adopt_model(model: nn.Module, config: ModelConfig) -> nn.Module:
    """A copy of a `model` in memory, in the precision of `config`; the model itself stays as it is.

    One that is not of transformers must be a classifier of images, which takes pixels and returns logits.

    Raises:
        InputError: it is no torch module.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: found {model!r}, expected a torch module (model.path takes names and folders)")
    adopted = copy.deepcopy(model).to(getattr(torch, config.dtype))
    if not hasattr(adopted, "main_input_name") or not hasattr(adopted, "config"):
        return ImageClassifier(adopted)
    settings: Any = adopted.config
    _settle_padding(settings.get_text_config())
    return adopted


class ImageClassifier(nn.Module):
    """A torch module that maps images to logits, called as transformers calls its own."""

    main_input_name = "pixel_values"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        sizes = {name: getattr(module, name, None) for name in ("image_size", "num_channels")}
        self.config = PretrainedConfig(**{name: size for name, size in sizes.items() if isinstance(size, int)})

    def forward(self, pixel_values: Tensor) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.module(pixel_values))


def own_path(model: nn.Module, path: str) -> str:
    """A dotted `path` in `model` as the user's own model has it, without what this package puts around that."""
    if isinstance(model, ImageClassifier):
        return path.removeprefix("module.")
    return path.removeprefix("backbone.") if isinstance(model, PooledClassifier) else path


def _settle_padding(settings: Any) -> None:
    """Make sure that there is a padding token, by which a model that classifies a text by its last token finds that."""
    padding, vocabulary = getattr(settings, "pad_token_id", None), getattr(settings, "vocab_size", None)
    if padding is None or (vocabulary is not None and not 0 <= padding < vocabulary):
        end = getattr(settings, "eos_token_id", None)
        # Chat models may end a text with any of several tokens.
        settings.pad_token_id = end[0] if isinstance(end, list) else end


def _load_causal_lm(config: ModelConfig, path: str, sharding: Sharding | None) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto import modeling_auto

    if config.pooling != "auto":
        raise InputError(
            f"model.pooling: found {config.pooling} with a causal language model, which classifies nothing; expected "
            "auto"
        )
    model_type = _settings(path).model_type
    if model_type not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(f"model.path: found a {model_type} model, expected a causal language model")
    model, unfit = _load(AutoModelForCausalLM, config, path, sharding)
    _refuse_unfit(unfit, config)
    return model


def _load_classifier(
    config: ModelConfig, path: str, classes: int, sharding: Sharding | None
) -> PreTrainedModel | PooledClassifier:
    settings = _settings(path)
    own_class = _own_class(settings) if config.pooling == "auto" else None
    if own_class is not None:
        model, unfit = _load(own_class, config, path, sharding, num_labels=classes, **_without_classes(settings))
        head = find_head_path(model, find_block_path(model, config.block_path), classes)
        unfit = [name for name in unfit if not name.startswith(f"{head}.")]
        if not unfit:
            return model
        _refuse_unfit([name for name in unfit if name.startswith(f"{model.base_model_prefix}.")], config)
    # The model has no classification layers, or the weights lack more of them than the last one, such as RoBERTa's
    # after pretraining; what stays frozen must not be random.
    from transformers import AutoModel

    if not hasattr(settings, "hidden_size"):
        raise InputError(
            f"model.pooling: found {config.pooling} with a {settings.model_type} model, which has no one hidden size, "
            "expected auto, or model.path to be one tower of the model, such as its vision tower"
        )
    backbone, unfit = _load(AutoModel, config, path, sharding)
    _refuse_unfit(unfit, config)
    return PooledClassifier(backbone, classes, _pooling(config, backbone, unfit))


def _pooling(config: ModelConfig, backbone: PreTrainedModel, unfit: list[str]) -> Pooling:
    if config.pooling == "pooler" and unfit:
        raise InputError(
            f"model.pooling: found pooler, but no weights of {unfit[0]} in {config.path!r}, "
            "expected first, mean or last"
        )
    if config.pooling != "auto":
        return config.pooling
    if backbone.main_input_name != "pixel_values":
        return "mean"
    return "first" if unfit else "pooler"


def _settings(path: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except ImportError as error:
        if "timm" in str(error) and find_spec("timm") is None:
            raise InputError(
                f"model.path: found a timm model at {path!r} but not the package timm, expected it to be installed "
                "(pip install 'fedra-engine[timm]')"
            ) from error
        raise


def _without_classes(settings: Any) -> dict[str, Any]:
    """timm writes the number of classes a second time, which wins over the one that is asked for."""
    arguments = getattr(settings, "model_args", None)
    if not arguments:
        return {}
    return {"model_args": {name: value for name, value in arguments.items() if name != "num_classes"}}


def _own_class(settings: Any) -> Any | None:
    """The auto class that makes a classifier of models with these settings, if there is one."""
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification
    from transformers.models.auto import modeling_auto

    if settings.model_type in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return AutoModelForImageClassification
    if settings.model_type in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return AutoModelForSequenceClassification
    return None


def _load(
    auto_class: Any, config: ModelConfig, path: str, sharding: Sharding | None, **settings: Any
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of its tensors that the weights do not have in this shape."""
    settings |= {
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": config.attention,
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
    }
    if sharding is None:
        model, report = auto_class.from_pretrained(path, **settings)
        return model, _unfit(report)
    # transformers cannot pass over tensors of another shape while it loads into shards, nor report which they are. A
    # model without memory shows it; and under another name they are not found.
    _, report = auto_class.from_pretrained(path, device_map="meta", **settings)
    hidden = {f"^{re.escape(name)}$": f"unfit.{name}" for name, *_ in report["mismatched_keys"]}
    with sharding.loading():
        model, _ = auto_class.from_pretrained(path, key_mapping=hidden, **settings)
    unfit = _unfit(report)
    _draw_again(model, unfit)
    return model, unfit


@torch.no_grad()
def _draw_again(model: PreTrainedModel, unfit: list[str]) -> None:
    """Give Linears of a sharded model that have no weights those that they have in one that is not sharded."""
    torch.manual_seed(_SEED)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in unfit:
            size, bias = (module.in_features, module.out_features), module.bias is not None
            drawn = skip_init(nn.Linear, *size, bias=bias, dtype=module.weight.dtype)
            model._init_weights(drawn)
            with gathered(module, writes=True):
                module.load_state_dict(drawn.state_dict())


def _unfit(report: Any) -> list[str]:
    return [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]


def _refuse_unfit(names: Iterable[str], config: ModelConfig) -> None:
    """A frozen part must not be random. A pooler may be: another pooling can do without it."""
    inside = [name for name in names if "pooler" not in name.split(".")]
    if inside:
        raise InputError(
            f"model.path: found no fitting weights in {config.path!r} for {len(inside)} tensors of the model, such as "
            f"{inside[0]}, expected all but those of the classifier"
        )


def _check_directory(path: str) -> None:
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_absolute() or path.startswith("."):
            raise InputError(f"model.path: found no folder {path!r}, expected a Hugging Face model directory")
        return
    file = folder / "config.json"
    try:
        json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"model.path: {file} is missing or no JSON, expected a model directory") from error


class PooledClassifier(nn.Module):
    """Logits of one vector per sample.

    The vector is what the backbone itself gives as `pooler_output` (`pooler`), the output of the `first` token (a
    class token), the `mean` over all tokens that are not padding, or the output of the `last` of these.
    """

    def __init__(self, backbone: PreTrainedModel, classes: int, pooling: Pooling) -> None:
        """The new Linear is drawn as transformers draws those of its classifiers."""
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        features = backbone.config.hidden_size
        self.classifier = nn.Linear(features, classes, dtype=backbone.dtype)
        nn.init.normal_(self.classifier.weight, std=getattr(backbone.config, "initializer_range", 0.02))
        nn.init.zeros_(self.classifier.bias)

    @property
    def config(self) -> Any:
        """The backbone's transformers configuration."""
        return self.backbone.config

    @property
    def main_input_name(self) -> str:
        """`pixel_values` or `input_ids`."""
        return self.backbone.main_input_name

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        """`logits` [samples, classes].

        Raises:
            InputError: the backbone does not give what the pooling reads.
        """
        output = self.backbone(**inputs)
        return SequenceClassifierOutput(logits=self.classifier(self._pool(output, inputs.get("attention_mask"))))

    def _pool(self, output: ModelOutput, mask: Tensor | None) -> Tensor:
        name = "pooler_output" if self.pooling == "pooler" else "last_hidden_state"
        states = output.get(name)
        if not isinstance(states, Tensor) or states.dim() != (2 if self.pooling == "pooler" else 3):
            raise InputError(
                f"model.pooling: found {self.pooling} with a {type(self.backbone).__name__}, which gives no {name} of "
                "one vector per sample or token, expected another pooling"
            )
        if self.pooling == "pooler":
            return states
        if self.pooling == "first":
            return states[:, 0]
        present = torch.ones_like(states[..., 0], dtype=torch.int64) if mask is None else mask.long()
        if self.pooling == "mean":
            weights = present.to(states.dtype)
            return (weights[:, None] @ states)[:, 0] / weights.sum(1, keepdim=True)
        # Whichever side is padded.
        last = (present * torch.arange(1, states.shape[1] + 1, device=states.device)).argmax(1)
        return states[torch.arange(len(states), device=states.device), last]
