"""Load a pretrained transformer as a classifier or a causal language model."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils import skip_init
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutput

from fedra_engine.config import ModelConfig
from fedra_engine.models.quantization import is_quantized, quantization_settings, require_bitsandbytes
from fedra_engine.models.sharding import Sharding, gathered
from fedra_engine.models.structure import find_block_path, find_head_path
from fedra_engine.runtime.errors import InputError, one_line

Pooling = Literal["pooler", "first", "mean", "last"]
_Load = Callable[..., tuple[PreTrainedModel, list[str]]]
"""`_load` from its argument `auto_class` on."""

HEAD_FILE = "head.safetensors"
"""Weight and bias of an exported `PooledClassifier`'s Linear, with its pooling as metadata."""
_CPU = torch.device("cpu")
_SEED = 0
"""Of new layers, which are the same in every experiment."""


def resolve_model_path(path: str) -> str:
    """The folder of a model that ships with the package, if `path` is its name and no local folder; else `path`."""
    shipped = files("fedra_engine") / "assets" / path
    return str(shipped) if path.isidentifier() and not Path(path).is_dir() and shipped.is_dir() else path


@contextmanager
def hidden_loading_bars() -> Iterator[None]:
    """Show no bar while transformers loads weights from the disk; those of downloads stay."""
    from transformers.utils import logging

    # transformers' switch for its bars would switch those of the hub, too.
    before = logging.set_tqdm_hook(lambda bar, args, options: bar(*args, **{**options, "disable": True}))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


@hidden_loading_bars()
def load_pretrained(
    config: ModelConfig,
    *,
    classes: int | None,
    sharding: Sharding | None = None,
    device: torch.device = _CPU,
) -> PreTrainedModel | PooledClassifier:
    """Load a model from a Hugging Face or timm directory or hub name; InputError if it cannot be used.

    Args:
        config: path, precision, quantization, pooling and block path.
        classes: of an image or text classifier; None for a causal language model. The last layer of a classifier is
            new if the pretrained one has another size. A model without classification layers, or without weights for
            those before the last, becomes a `PooledClassifier`, and one that was exported as such stays one.
        sharding: if given, each process keeps only its shard of the weights.
        device: where it is to be; a quantized model cannot be moved later.
    """
    if config.load_in is not None:
        require_bitsandbytes(config, device)
    path = resolve_model_path(config.path)
    _check_directory(path)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            settings, load = _settings(path), partial(_load, config, path, sharding, device)
            _refuse_quantized_weights(settings, config)
            if classes is None:
                model = _load_causal_lm(config, settings, load)
            else:
                model = _load_classifier(config, settings, classes, load)
    except InputError:
        raise
    except Exception as error:  # Whatever a file can make transformers raise.
        hint = "; expected one that can, or model.attention eager" if "attn_implementation" in str(error) else ""
        raise InputError(f"model.path: cannot load {config.path!r}: {one_line(error)}{hint}") from error
    _settle_padding(model.config.get_text_config())
    if config.load_in is None:
        return model.to(device)
    if isinstance(model, PooledClassifier):
        model.classifier.to(device)
    return model


def adopt_model(model: nn.Module, config: ModelConfig) -> nn.Module:
    """Copy a torch module in memory, in the precision of `config`.

    If it is not a model of transformers, it must be a classifier that maps pixels to logits.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: found {model!r}, expected a torch module (model.path takes names and folders)")
    if config.load_in is not None:
        raise InputError(f"model.load_in: found {config.load_in} with a model in memory, expected null")
    if is_quantized(model):
        raise InputError("model: found quantized weights in memory, expected a model.path and model.load_in")
    adopted: Any = copy.deepcopy(model).to(getattr(torch, config.dtype))
    if not hasattr(adopted, "main_input_name") or not hasattr(adopted, "config"):
        return ImageClassifier(adopted)
    _settle_padding(adopted.config.get_text_config())
    return adopted


class ImageClassifier(nn.Module):
    """A torch module that maps images to logits, with the interface of transformers."""

    main_input_name = "pixel_values"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        sizes = {name: getattr(module, name, None) for name in ("image_size", "num_channels")}
        self.config = PretrainedConfig(**{name: size for name, size in sizes.items() if isinstance(size, int)})

    def forward(self, pixel_values: Tensor) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.module(pixel_values))


def own_path(model: nn.Module, path: str) -> str:
    """The dotted `path` of a module in the user's own model, without this package's wrapper."""
    return path.removeprefix({ImageClassifier: "module.", PooledClassifier: "backbone."}.get(type(model), ""))


def without_pooling(model: nn.Module) -> Any:
    """What a `PooledClassifier` pools, a model of transformers; any other `model` itself."""
    return model.backbone if isinstance(model, PooledClassifier) else model


def _settle_padding(settings: Any) -> None:
    """Set a padding token if there is none: models that classify a text by its last token find it by the padding."""
    padding, vocabulary = getattr(settings, "pad_token_id", None), getattr(settings, "vocab_size", None)
    if padding is None or (vocabulary is not None and not 0 <= padding < vocabulary):
        end = getattr(settings, "eos_token_id", None)
        # Chat models may have several end tokens.
        settings.pad_token_id = end[0] if isinstance(end, list) else end


def _load_causal_lm(config: ModelConfig, settings: Any, load: _Load) -> PreTrainedModel:
    from transformers.models.auto import modeling_auto

    if config.pooling != "auto":
        raise InputError(
            f"model.pooling: found {config.pooling} with a causal language model, which classifies nothing; expected "
            "auto"
        )
    if settings.model_type not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(f"model.path: found a {settings.model_type} model, expected a causal language model")
    model, unfit = load(modeling_auto.AutoModelForCausalLM)
    _refuse_unfit(unfit, config)
    return model


def _load_classifier(
    config: ModelConfig, settings: Any, classes: int, load: _Load
) -> PreTrainedModel | PooledClassifier:
    exported = Path(resolve_model_path(config.path)) / HEAD_FILE
    if config.pooling == "auto" and exported.is_file():
        return _load_exported(exported, classes, load)
    if config.pooling == "auto" and (own_class := _own_class(settings)) is not None:
        arguments: dict[str, Any] = {"num_labels": classes}
        # timm has the number of classes a second time, which would take precedence.
        if of_timm := getattr(settings, "model_args", None):
            arguments["model_args"] = {name: value for name, value in of_timm.items() if name != "num_classes"}
        model, unfit = load(own_class, **arguments)
        head = find_head_path(model, find_block_path(model, config.block_path), classes)
        unfit = [name for name in unfit if not name.startswith(f"{head}.")]
        if not unfit:
            return model
        _refuse_unfit([name for name in unfit if name.startswith(f"{model.base_model_prefix}.")], config)
    # The model has no classification layers, or weights of a layer before the last are missing, as in pretrained
    # RoBERTa; frozen layers must not be random.
    from transformers import AutoModel

    if not hasattr(settings, "hidden_size"):
        raise InputError(
            f"model.pooling: found {config.pooling} with a {settings.model_type} model, which has no one hidden size, "
            "expected auto, or model.path to be one tower of the model, such as its vision tower"
        )
    backbone, unfit = load(AutoModel)
    _refuse_unfit(unfit, config)
    return PooledClassifier(backbone, classes, _pooling(config, backbone, unfit))


def _load_exported(file: Path, classes: int, load: _Load) -> PooledClassifier:
    """A `PooledClassifier` that was exported, with the head in `file` if that is for as many classes."""
    from transformers import AutoModel

    with safe_open(file, "pt") as opened:
        head, pooling = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()["pooling"]  # noqa: SIM118
    backbone, _ = load(AutoModel)
    model = PooledClassifier(backbone, classes, pooling)
    if len(head["bias"]) == classes:
        model.classifier.load_state_dict(head)
    return model


def _pooling(config: ModelConfig, backbone: PreTrainedModel, unfit: list[str]) -> Pooling:
    """The configured pooling; `auto` is `mean` for texts, and for images `pooler` if it has weights, else `first`."""
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


def attention_argument(config: ModelConfig) -> str | None:
    """The name for transformers; without one it takes sdpa if the model has it, which `choose_attention` may change."""
    return None if config.attention == "auto" else config.attention


def _own_class(settings: Any) -> Any | None:
    """The auto class for a classifier of this model type, if there is one."""
    from transformers.models.auto import modeling_auto

    if settings.model_type in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return modeling_auto.AutoModelForImageClassification
    if settings.model_type in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return modeling_auto.AutoModelForSequenceClassification
    return None


def _load(
    config: ModelConfig,
    path: str,
    sharding: Sharding | None,
    device: torch.device,
    auto_class: Any,
    **arguments: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of its tensors that are missing in the weights or have another shape there."""
    arguments |= {
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": attention_argument(config),
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
    }
    if config.load_in is not None:
        from transformers import BitsAndBytesConfig

        outline, _ = auto_class.from_pretrained(path, device_map="meta", **arguments)
        # Given for the `PooledClassifier` that will be around it.
        given = None if config.block_path is None else config.block_path.removeprefix("backbone.")
        settings = quantization_settings(config, find_block_path(outline, given))
        arguments |= {"quantization_config": BitsAndBytesConfig(**settings), "device_map": {"": device}}
    if sharding is None:
        model, report = auto_class.from_pretrained(path, **arguments)
        return model, _unfit(report)
    # transformers neither ignores nor reports tensors of another shape when it loads into shards. So a model on the
    # meta device reports them, and they are renamed to be ignored.
    _, report = auto_class.from_pretrained(path, device_map="meta", **arguments)
    hidden = {f"^{re.escape(name)}$": f"unfit.{name}" for name, *_ in report["mismatched_keys"]}
    with sharding.loading():
        model, _ = auto_class.from_pretrained(path, key_mapping=hidden, **arguments)
    unfit = _unfit(report)
    _draw_again(model, unfit)
    return model, unfit


@torch.no_grad()
def _draw_again(model: PreTrainedModel, unfit: list[str]) -> None:
    """Initialise the Linears in `unfit` as transformers initialises them in a model that is not sharded."""
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
    """Raise InputError if a frozen part would be random; a pooler may be, as other poolings do without it."""
    inside = [name for name in names if "pooler" not in name.split(".")]
    if inside:
        raise InputError(
            f"model.path: found no fitting weights in {config.path!r} for {len(inside)} tensors of the model, such as "
            f"{inside[0]}, expected all but those of the classifier"
        )


def _refuse_quantized_weights(settings: Any, config: ModelConfig) -> None:
    """Raise InputError if the weights in the files are quantized."""
    if getattr(settings, "quantization_config", None) is not None:
        raise InputError(
            f"model.path: found quantized weights in {config.path!r}, expected those that they were made of "
            "(model.load_in quantizes them)"
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
    """A Linear on one vector per sample, initialised as in transformers' classifiers.

    The vector is the backbone's `pooler_output` (`pooler`), the output of the `first` token (a class token), the `mean`
    over all tokens without padding, or the output of the `last` token before the padding.
    """

    def __init__(self, backbone: PreTrainedModel, classes: int, pooling: Pooling) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.config: Any = backbone.config
        self.main_input_name = backbone.main_input_name
        features = backbone.config.hidden_size
        self.classifier = nn.Linear(features, classes, dtype=backbone.dtype)
        nn.init.normal_(self.classifier.weight, std=getattr(backbone.config, "initializer_range", 0.02))
        nn.init.zeros_(self.classifier.bias)

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        pooled = self._pool(self.backbone(**inputs), inputs.get("attention_mask"))
        return SequenceClassifierOutput(logits=self.classifier(pooled))

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
        # Padding may be on either side.
        last = (present * torch.arange(1, states.shape[1] + 1, device=states.device)).argmax(1)
        return states[torch.arange(len(states), device=states.device), last]
