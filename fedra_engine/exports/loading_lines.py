"""Python that loads what a run exports, with transformers and PEFT alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fedra_engine.config import ExperimentConfig
from fedra_engine.inputs import IN_MEMORY
from fedra_engine.models.foundation import Foundation, classifies_text
from fedra_engine.models.loading import (
    HEAD_FILE,
    ImageClassifier,
    PooledClassifier,
    Pooling,
    own_path,
    resolve_model_path,
)
from fedra_engine.models.quantization import quantization_settings

_FOLDER = 'folder = "."  # where this file is'
_LABELS = ['with open(f"{folder}/labels.json") as file:', "    labels = json.load(file)"]
_NAMED = ["id2label=dict(enumerate(labels))", "label2id={label: i for i, label in enumerate(labels)}"]
_HEAD = f'head = load_file(f"{{folder}}/{HEAD_FILE}")'
_LOGITS_OF_FEATURES = 'return features.to(head["weight"].dtype) @ head["weight"].T + head["bias"]'


def loading_lines(foundation: Foundation, config: ExperimentConfig, depth: int) -> str:
    """Python that loads the saved adapter with transformers and PEFT alone, and defines `logits(**inputs)`.

    A model that was passed from Python is called `my_model`.
    """
    auto_class = model_class(foundation)
    settings: Any = foundation.model.config
    load = [_FOLDER, *_quantization(foundation, config)]
    if base_model(config) is None:
        imports = ["import torch", "from peft import PeftModel"]
        load.append(f"model = my_model.to(torch.{config.model.dtype})  # the model that the run was given")
        if auto_class.endswith("SequenceClassification"):
            load.append(f"model.config.pad_token_id = {settings.pad_token_id}")
    else:
        quantizes = config.model.load_in is not None
        names = f"{auto_class}, BitsAndBytesConfig" if quantizes else auto_class
        imports = ["from peft import PeftConfig, PeftModel", f"from transformers import {names}"]
        load.append("base = PeftConfig.from_pretrained(folder).base_model_name_or_path")
        arguments = [f'dtype="{config.model.dtype}"', *loading_arguments(foundation)]
        if quantizes:
            arguments.append("quantization_config=quantization")
        if has_own_head(foundation):
            imports.insert(0, "import json")
            given = ["base", *_NAMED, *arguments]
            load += [*_LABELS, f"model = {auto_class}.from_pretrained(", *(f"    {each}," for each in given), ")"]
        else:
            load.append(f"model = {auto_class}.from_pretrained(base, {', '.join(arguments)})")
    if depth < foundation.depth:
        load.append(f'del model.get_submodule("{own_path(foundation.model, foundation.block_path)}")[{depth}:]')
    load.append("model = PeftModel.from_pretrained(model, folder).eval()")
    return _with_logits(foundation, imports, load)


def _quantization(foundation: Foundation, config: ExperimentConfig) -> list[str]:
    """Python that defines `quantization`, if weights are quantized."""
    if config.model.load_in is None:
        return []
    settings = quantization_settings(config.model, own_path(foundation.model, foundation.block_path))
    arguments = [f"    {name}={value!r},".replace("'", '"') for name, value in settings.items()]
    return ["quantization = BitsAndBytesConfig(", *arguments, ")"]


def merged_loading_lines(foundation: Foundation) -> str:
    """Python that loads a merged model with transformers alone, and defines `logits(**inputs)`."""
    auto_class = model_class(foundation)
    load = [_FOLDER, f"model = {auto_class}.from_pretrained(folder).eval()"]
    return _with_logits(foundation, [f"from transformers import {auto_class}"], load)


def _with_logits(foundation: Foundation, imports: list[str], load: list[str]) -> str:
    """Complete lines that import and lines that load `model` by the definition of `logits`."""
    pooling = pooling_of(foundation)
    define = ["def logits(**inputs):"]
    if isinstance(foundation.model, ImageClassifier):
        define = ["def logits(pixel_values):", "    return model(pixel_values)"]
    elif pooling is None:
        define.append("    return model(**inputs).logits")
    else:
        imports = [*imports, "from safetensors.torch import load_file"]
        if any("torch." in line for line in _FEATURES[pooling]):
            imports.append("import torch")
        load = [*load, _HEAD]
        define += [f"    {line}" for line in [*_FEATURES[pooling], _LOGITS_OF_FEATURES]]
    modules, names = (sorted(line for line in imports if line.startswith(word)) for word in ("import", "from"))
    # As formatters have it: the standard library, then others.
    gap = [""] if "import json" in modules else []
    return "\n".join([*modules, *gap, *names, "", *load, "", "", *define, ""])


_MASK = [
    "states = model(**inputs).last_hidden_state",
    'mask = inputs.get("attention_mask", torch.ones(states.shape[:2])).long()',
]
_FEATURES: dict[Pooling, list[str]] = {
    "pooler": ["features = model(**inputs).pooler_output"],
    "first": ["features = model(**inputs).last_hidden_state[:, 0]"],
    "mean": [
        *_MASK,
        "mask = mask.to(states)",
        "features = (mask[..., None] * states).sum(1) / mask.sum(1, keepdim=True)",
    ],
    "last": [
        *_MASK,
        "last = (mask * torch.arange(1, mask.shape[1] + 1)).argmax(1)",
        "features = states[torch.arange(len(states)), last]",
    ],
}
"""Python that computes the features a `PooledClassifier` reads."""


def pooling_of(foundation: Foundation) -> Pooling | None:
    """What a `PooledClassifier` reads; None for other models."""
    return foundation.model.pooling if isinstance(foundation.model, PooledClassifier) else None


def has_own_head(foundation: Foundation) -> bool:
    """Whether the model is a classifier whose head is part of transformers' class, or of the user's."""
    return foundation.task.trains_head and pooling_of(foundation) is None


def base_model(config: ExperimentConfig) -> str | None:
    """The hub name, or the absolute path of a folder, for use from anywhere; None if the model is in memory."""
    if config.model.path == IN_MEMORY:
        return None
    path = resolve_model_path(config.model.path)
    return os.path.abspath(path) if Path(path).is_dir() else path


def model_class(foundation: Foundation) -> str:
    """The name of transformers' auto class for the model."""
    if pooling_of(foundation):
        return "AutoModel"
    if foundation.model.main_input_name == "pixel_values":
        return "AutoModelForImageClassification"
    return f"AutoModelFor{foundation.task.auto_class}"


def peft_class(foundation: Foundation) -> str:
    """The name of PEFT's auto class for the model and its adapter; PEFT has no task type for images."""
    if foundation.model.main_input_name == "pixel_values":
        return "AutoPeftModel"
    if pooling_of(foundation):
        return "AutoPeftModelForFeatureExtraction"
    return "AutoPeftModelForSequenceClassification" if foundation.task.trains_head else "AutoPeftModelForCausalLM"


def loading_arguments(foundation: Foundation) -> list[str]:
    """Arguments, beside labels and precision, with which `from_pretrained` gives the model that the run has loaded."""
    settings: Any = foundation.model.config
    if not has_own_head(foundation):
        return []
    arguments: dict[str, object] = {"ignore_mismatched_sizes": True}
    if getattr(settings, "problem_type", None) not in (None, "single_label_classification"):
        arguments["problem_type"] = "single_label_classification"
    if getattr(settings, "model_args", None):
        arguments["model_args"] = settings.model_args
    if classifies_text(foundation.model):
        # Decoders classify by the last token that is not padding.
        arguments["pad_token_id"] = settings.pad_token_id
    return [f"{name}={value!r}".replace("'", '"') for name, value in arguments.items()]
