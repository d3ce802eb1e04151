"""Python that loads what a run exports, with transformers and PEFT alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedra_engine.config import ExperimentConfig
from fedra_engine.config.options import IN_MEMORY
from fedra_engine.data.preprocessing import Preprocessing
from fedra_engine.data.tokenization import Tokenization
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

Processing = Preprocessing | Tokenization
"""How images or texts become a model's inputs."""
_FOLDER = 'folder = "."  # where this file is'
_LABELS = ['with open(f"{folder}/labels.json") as file:', "    labels = json.load(file)"]
_NAMED = ["id2label=dict(enumerate(labels))", "label2id={label: i for i, label in enumerate(labels)}"]
_HEAD = f'head = load_file(f"{{folder}}/{HEAD_FILE}")'
_LOGITS_OF_FEATURES = 'return features.to(head["weight"].dtype) @ head["weight"].T + head["bias"]'


def loading_lines(foundation: Foundation, config: ExperimentConfig, depth: int, processing: Processing) -> str:
    """Python that loads the saved adapter with transformers and PEFT alone, and defines `logits(**inputs)`.

    A model that was passed from Python is called `my_model`. As an example, the last lines make the inputs of an image
    or a text as the run's `processing` does, with what is saved beside the adapter, and print the model's answer.
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
    by_name, quantized = base_model(config) is not None, config.model.load_in is not None
    example = _example(foundation, processing, by_name=by_name, quantized=quantized)
    return _complete(foundation, imports, load, example)


def _quantization(foundation: Foundation, config: ExperimentConfig) -> list[str]:
    """Python that defines `quantization`, if weights are quantized."""
    if config.model.load_in is None:
        return []
    settings = quantization_settings(config.model, own_path(foundation.model, foundation.block_path))
    arguments = [f"    {name}={value!r},".replace("'", '"') for name, value in settings.items()]
    return ["quantization = BitsAndBytesConfig(", *arguments, ")"]


def merged_loading_lines(foundation: Foundation, processing: Processing) -> str:
    """Python that loads a merged model with transformers alone; the rest as in `loading_lines`."""
    auto_class = model_class(foundation)
    load = [_FOLDER, f"model = {auto_class}.from_pretrained(folder).eval()"]
    example = _example(foundation, processing, by_name=True)
    return _complete(foundation, [f"from transformers import {auto_class}"], load, example)


class _Example(NamedTuple):
    """Lines that run a model on a sample, and those that import what they need."""

    imports: list[str]
    lines: list[str]


def _example(foundation: Foundation, processing: Processing, *, by_name: bool, quantized: bool = False) -> _Example:
    """How the model is run on an image or a text.

    Args:
        foundation: the model.
        processing: how images or texts become its inputs.
        by_name: whether the lines load it from a folder or by its name, and not from Python.
        quantized: whether its weights are quantized, and may lie on a GPU.
    """
    moved = ".to(model.device)" if quantized else ""
    if isinstance(processing, Preprocessing):
        side, mode = processing.image_size, "RGB" if processing.channels == 3 else "L"
        name, maker, loader = "image", "processor", "AutoImageProcessor"
        sample = f'Image.new("{mode}", ({side}, {side}))  # replace by your image'
        imports, arguments = ["from PIL import Image", f"from transformers import {loader}"], 'return_tensors="pt"'
        if foundation.dtype != torch.float32:
            moved += ".to(model.dtype)" if by_name else f".to({foundation.dtype})"
    else:
        name, maker, loader, sample = "text", "tokenizer", "AutoTokenizer", '"a text of yours"'
        # Not every model takes the types that some tokenizers make, and the run's had none.
        imports, arguments = (
            [f"from transformers import {loader}"],
            'return_token_type_ids=False, return_tensors="pt"',
        )
        if foundation.task.trains_head:
            arguments = f"truncation=True, {arguments}"
    answer = "logits(**inputs)"
    if by_name and has_own_head(foundation):
        answer = f"model.config.id2label[{answer}.argmax().item()]"
    lines = [
        f"{maker} = {loader}.from_pretrained(folder)",
        f"{name} = {sample}",
        f"inputs = {maker}({name}, {arguments}){moved}",
        f"print({answer})",
    ]
    return _Example(imports, lines)


def _complete(foundation: Foundation, imports: list[str], load: list[str], example: _Example) -> str:
    """Complete lines that import and lines that load `model` by the definition of `logits`, and by an `example`."""
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
    imports = _sorted([*imports, *example.imports])
    return "\n".join([*imports, "", *load, "", "", *define, "", "", *example.lines, ""])


def _sorted(imports: Sequence[str]) -> list[str]:
    """Lines of imports as formatters have them: modules, then names from modules, a line for each module."""
    modules, names = {line for line in imports if line.startswith("import")}, dict[str, set[str]]()
    for line in set(imports) - modules:
        module, _, found = line.removeprefix("from ").partition(" import ")
        names.setdefault(module, set()).update(found.split(", "))
    # The standard library is apart.
    gap = [""] if "import json" in modules else []
    by_name = sorted(names, key=str.lower)
    return [*sorted(modules), *gap, *(f"from {module} import {', '.join(sorted(names[module]))}" for module in by_name)]


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
