"""Save the tuned adapter in PEFT's format, with Python that loads it without this package."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from safetensors.torch import save_file
from torch import Tensor

from fedra_engine.callback import Outcome
from fedra_engine.config import ExperimentConfig
from fedra_engine.config.values import dump_yaml
from fedra_engine.experiment import Experiment
from fedra_engine.inputs import IN_MEMORY
from fedra_engine.methods.products import decompose, factor_products
from fedra_engine.models.adapters import AdapterLayout
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.loading import ImageClassifier, PooledClassifier, Pooling, own_path, resolve_model_path
from fedra_engine.models.state import GlobalState, head_tensors
from fedra_engine.runtime.errors import count_of
from fedra_engine.runtime.files import whole_files, write_whole

_PREFIX = "base_model.model"


def export(folder: Path, experiment: Experiment, state: GlobalState, outcome: Outcome) -> None:
    """Write the adapter, its model card, and the clients' private factors, if any (`private.safetensors`).

    Each file appears whole or not at all.
    """
    method, foundation, config = experiment.method, experiment.foundation, experiment.config
    depth = len(method.evaluated_model().blocks)
    with whole_files(folder) as made:
        save_adapter(made, foundation, config, state, depth=depth, loaded_base=experiment.initial_state.base)
        if method.personal_states(state) is not None:
            private = {name: tensor.contiguous().cpu() for name, tensor in method.tensors().items()}
            save_file(private, made / "private.safetensors")
        _write_card(made, foundation, config, outcome, depth=depth)


def save_adapter(
    folder: Path,
    foundation: Foundation,
    config: ExperimentConfig,
    state: GlobalState,
    *,
    depth: int,
    loaded_base: tuple[Tensor, ...] = (),
) -> None:
    """Write the adapters of the first `depth` blocks and the trained head in PEFT's format.

    Where the method has changed frozen weights, the adapters include their change since `loaded_base`. Classifiers for
    which the pretrained model has no module get files of their own: the head of a `PooledClassifier`
    (`head.safetensors`) and those of early exits (`exits.safetensors`).
    """
    layout, adapters, alpha = foundation.adapter_layout, state.adapters, config.lora.alpha
    if state.base:
        layout, adapters = _with_change_of_base(layout, state, loaded_base, config.lora.scale)
        alpha = layout.rank
    pooling = _pooling(foundation)
    block_path, head_path = (own_path(foundation.model, path) for path in (foundation.block_path, foundation.head_path))
    tensors = {
        f"{_PREFIX}.{block_path}.{block}.{name}.weight": factor.contiguous().cpu()
        for block, slot in enumerate(adapters[:depth])
        for name, factor in layout.named_factors(slot)
    }
    named = head_tensors([0], state.heads[-1:], foundation.head_layout, exits=1)
    head = {name.removeprefix("head."): tensor.cpu() for name, tensor in named.items()}
    folder.mkdir(parents=True, exist_ok=True)
    if pooling:
        save_file(head, folder / "head.safetensors", metadata={"pooling": pooling})
        head = {}
    if head:
        # PEFT finds saved modules by the end of their names, and would miss these, as DistilBERT's `pre_classifier`.
        tensors |= {
            f"{_PREFIX}.{own_path(foundation.model, name)}": kept.contiguous().cpu()
            for name, kept in foundation.namesakes.items()
        }
    tensors |= {f"{_PREFIX}.{head_path}.{name}": tensor for name, tensor in head.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    if (exits := len(state.heads)) > 1:
        early = head_tensors(range(exits - 1), state.heads[:-1], foundation.head_layout, exits=exits)
        save_file({name: tensor.cpu() for name, tensor in early.items()}, folder / "exits.safetensors")
    settings = PeftLoraConfig(
        base_model_name_or_path=_base_model(config),
        r=layout.rank,
        lora_alpha=alpha,
        lora_dropout=config.lora.dropout,
        fan_in_fan_out=foundation.stores_input_first,
        modules_to_save=[head_path] if head else None,
        inference_mode=True,
    )
    # The constructor would make them a set, whose order differs from process to process.
    settings.target_modules = [f"{block_path}.{b}.{target.path}" for b in range(depth) for target in layout.targets]
    settings.save_pretrained(str(folder))


def _write_card(
    folder: Path, foundation: Foundation, config: ExperimentConfig, outcome: Outcome, *, depth: int
) -> None:
    """Write `README.md`: what the adapter is, Python that loads it, and the accuracy to expect."""
    base = _base_model(config)
    facts = dump_yaml({"base_model": base, "library_name": "peft"} if base else {"library_name": "peft"})
    load_it = "load it" if base else "put it on the model that the run was given, here `my_model`"
    notes = [
        f"With the run's `{foundation.model.main_input_name}`, as the settings in `config.yaml` make them, `logits` "
        f"has the `exported_accuracy` of `summary.json`: {100 * mean(outcome.exported.values()):.1f} % on average over "
        "the domains."
    ]
    if outcome.tuned_is is not None:
        notes.append(f"They cannot reproduce `tuned` in `summary.json`, which is the accuracy of {outcome.tuned_is}.")
    if depth < foundation.depth:
        notes.append(f"The tuned model is only the first {depth} of the pretrained model's {foundation.depth} blocks.")
    if config.model.dtype in ("bfloat16", "float16"):
        notes.append(
            f"The run kept adapters and classifier in float32 beside {config.model.dtype} weights. PEFT rounds in "
            "other places, so a few predictions may differ."
        )
    body = "\n\n".join(notes)
    write_whole(
        folder / "README.md",
        f"---\n{facts}---\n\n"
        f"A LoRA adapter, tuned by fedra-engine in {count_of(outcome.rounds, 'round')} of `{config.method.name}`. "
        f"These lines {load_it}:\n\n```python\n{loading_lines(foundation, config, depth)}```\n\n{body}\n",
    )


def loading_lines(foundation: Foundation, config: ExperimentConfig, depth: int) -> str:
    """Python that loads the saved adapter with transformers and PEFT alone, and defines `logits(**inputs)`.

    A model that was passed from Python is called `my_model`.
    """
    pooling, auto_class = _pooling(foundation), _auto_class(foundation)
    settings: Any = foundation.model.config
    load = ['folder = "."  # where this file is']
    if _base_model(config) is None:
        imports = ["import torch", "from peft import PeftModel"]
        load.append(f"model = my_model.to(torch.{config.model.dtype})  # the model that the run was given")
        if auto_class.endswith("SequenceClassification"):
            load.append(f"model.config.pad_token_id = {settings.pad_token_id}")
    else:
        imports = ["from peft import PeftConfig, PeftModel", f"from transformers import {auto_class}"]
        load += [
            "base = PeftConfig.from_pretrained(folder).base_model_name_or_path",
            f"model = {auto_class}.from_pretrained(\n    base, {_arguments(foundation, config)}\n)",
        ]
    if depth < foundation.depth:
        load.append(f'del model.get_submodule("{own_path(foundation.model, foundation.block_path)}")[{depth}:]')
    load.append("model = PeftModel.from_pretrained(model, folder).eval()")
    define = ["def logits(**inputs):"]
    if isinstance(foundation.model, ImageClassifier):
        define = ["def logits(pixel_values):", "    return model(pixel_values)"]
    elif pooling is None:
        define.append("    return model(**inputs).logits")
    else:
        imports.insert(1, "from safetensors.torch import load_file")
        if any("torch." in line for line in _FEATURES[pooling]):
            imports.insert(0, "import torch")
        load.append('head = load_file(f"{folder}/head.safetensors")')
        define += [f"    {line}" for line in _FEATURES[pooling]]
        define.append('    return features.to(head["weight"].dtype) @ head["weight"].T + head["bias"]')
    return "\n".join([*imports, "", *load, "", "", *define, ""])


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


def _pooling(foundation: Foundation) -> Pooling | None:
    return foundation.model.pooling if isinstance(foundation.model, PooledClassifier) else None


def _base_model(config: ExperimentConfig) -> str | None:
    """The hub name, or the absolute path of a folder, for use from anywhere; None if the model is in memory."""
    if config.model.path == IN_MEMORY:
        return None
    path = resolve_model_path(config.model.path)
    return os.path.abspath(path) if Path(path).is_dir() else path


def _auto_class(foundation: Foundation) -> str:
    if _pooling(foundation):
        return "AutoModel"
    if foundation.model.main_input_name == "pixel_values":
        return "AutoModelForImageClassification"
    return f"AutoModelFor{foundation.task.auto_class}"


def _arguments(foundation: Foundation, config: ExperimentConfig) -> str:
    """Arguments with which `from_pretrained` gives the same model as `load_pretrained`."""
    settings: Any = foundation.model.config
    arguments: dict[str, object] = {"dtype": config.model.dtype}
    if _auto_class(foundation).endswith("Classification"):
        arguments |= {"num_labels": foundation.head_layout.classes, "ignore_mismatched_sizes": True}
        if getattr(settings, "model_args", None):
            arguments["model_args"] = settings.model_args
        if foundation.model.main_input_name == "input_ids":
            # Decoders classify by the last token that is not padding.
            arguments["pad_token_id"] = settings.pad_token_id
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items()).replace("'", '"')


def _with_change_of_base(
    layout: AdapterLayout, state: GlobalState, loaded: tuple[Tensor, ...], scale: float
) -> tuple[AdapterLayout, Tensor]:
    """Adapters of scale 1, and their layout, that equal the state's adapters plus the change of its frozen weights.

    The change is that from the `loaded` weights. The rank is the least whose error is below their rounding.
    """
    changes = [
        after.double() - before.double() + scale * product
        for after, before, product in zip(state.base, loaded, factor_products(state.adapters, layout), strict=True)
    ]
    rounding = [torch.finfo(weights.dtype).eps * weights.double().norm(dim=(1, 2)) for weights in state.base]
    rank = max(
        int((torch.linalg.svdvals(change) > least[:, None]).sum(1).max())
        for change, least in zip(changes, rounding, strict=True)
    )
    merged = AdapterLayout(layout.targets, max(rank, 1))
    return merged, decompose(changes, merged).to(state.adapters)
