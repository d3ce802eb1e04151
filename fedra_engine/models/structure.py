"""Find the parts of a transformer by its module tree: the block list, the head, the Linears that carry adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedra_engine.config import LoraConfig
from fedra_engine.models.adapters import Target
from fedra_engine.models.sharding import parameter_count, parameter_shape
from fedra_engine.runtime.errors import InputError

ALL_LINEAR = "all-linear"
"""PEFT's name for all Linears, as `lora.target_modules`."""


def find_block_path(model: nn.Module, given: str | None) -> str:
    """Dotted path of the block list: `given`, or the largest ModuleList or Sequential of blocks of one class."""
    lists = {name: module for name, module in model.named_modules() if _is_block_list(module)}
    if given is not None and given not in lists:
        raise InputError(f"model.block_path: found {given!r}, expected one of {sorted(lists) or 'none found'}")
    if not lists:
        raise InputError(
            f"model.path: {type(model).__name__} has no list of blocks, expected a ModuleList or Sequential of two "
            "or more transformer blocks of one class (name it by model.block_path)"
        )
    return max(lists, key=lambda name: parameter_count(lists[name])) if given is None else given


def _is_block_list(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
        return False
    # Lists of single Linears or norms are not blocks.
    return len({type(child) for child in module}) == 1 and any(True for _ in module[0].children())


def find_head_path(model: nn.Module, block_path: str, classes: int) -> str:
    """Dotted path of the classifier: the last Linear outside the blocks with `classes` outputs."""
    for name, module in reversed([*model.named_modules()]):
        fits = isinstance(module, nn.Linear) and module.out_features == classes
        if fits and not name.startswith(f"{block_path}."):
            return name
    raise InputError(
        f"model.path: {type(model).__name__} has no classifier, expected a Linear with {classes} outputs "
        "outside the blocks"
    )


def find_output_path(model: nn.Module) -> str:
    """Dotted path of the output layer of a language model, the Linear from features to the vocabulary."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(output, nn.Linear):
        raise InputError(f"model.path: found no output layer in a {type(model).__name__}, expected a language model")
    return next(name for name, module in model.named_modules() if module is output)


def find_norm_path(model: nn.Module, block_path: str, names: list[str]) -> str | None:
    """Dotted path of the norm outside the blocks that `lora.modules_to_save` names; None if it names nothing."""
    norms = [
        path
        for path, module in model.named_modules()
        if not path.startswith(f"{block_path}.") and _is_norm(dict(module.named_parameters()))
    ]
    found = [path for path in norms if any(f".{path}".endswith(f".{name}") for name in names)]
    if names and (len(found) != 1 or len(names) != 1):
        raise InputError(f"lora.modules_to_save: found {', '.join(names)}, expected one of {', '.join(norms)}")
    return found[0] if found else None


def _is_norm(parameters: dict[str, Tensor]) -> bool:
    return "weight" in parameters and parameters.keys() <= {"weight", "bias"} and parameters["weight"].dim() == 1


def find_targets(blocks: nn.ModuleList | nn.Sequential, lora: LoraConfig) -> tuple[Target, ...]:
    """The Linears that `lora.target_modules` matches by PEFT's rules, with their ranks and scales.

    Raises:
        InputError: they are not the same in every block, or a pattern matches none of them.
    """
    target_modules, linears = lora.target_modules, [name for name, part in blocks[0].named_modules() if is_linear(part)]
    if target_modules == ALL_LINEAR:
        target_modules = linears
    for entry in [target_modules] if isinstance(target_modules, str) else target_modules:
        if not _targets_of(blocks[0], target_modules if isinstance(target_modules, str) else [entry]):
            raise InputError(
                f"lora.target_modules: found {entry!r}, which matches nothing in a block; "
                f"expected (endings of) {', '.join(linears)}, or {ALL_LINEAR}"
            )
    per_block = [_targets_of(block, target_modules) for block in blocks]
    if not per_block[0] or any(targets != per_block[0] for targets in per_block):
        raise InputError(
            f"lora.target_modules: found {target_modules!r}, which matches different layers or shapes in different "
            "blocks, expected equal adapters in every block"
        )
    paths = [path for path, *_ in per_block[0]]
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, name):
            if not any(matching_pattern([pattern], path) for path in paths):
                raise InputError(
                    f"lora.{name}: found {pattern!r}, which matches no adapter target, expected endings of "
                    f"{', '.join(paths)}"
                )
    return tuple(Target(path, inputs, outputs, *_rank_and_scale(path, lora)) for path, inputs, outputs in per_block[0])


def _rank_and_scale(path: str, lora: LoraConfig) -> tuple[int, float]:
    """The rank and the scale of a target's adapter, by PEFT's rules."""
    rank, alpha = (
        usual if (pattern := matching_pattern(patterns, path)) is None else patterns[pattern]
        for patterns, usual in ((lora.rank_pattern, lora.rank), (lora.alpha_pattern, lora.alpha))
    )
    return int(rank), alpha / (rank**0.5 if lora.use_rslora else rank)


def _targets_of(block: nn.Module, target_modules: list[str] | str) -> list[tuple[str, int, int]]:
    """Path inside the block, input and output features of each target."""
    targets = list[tuple[str, int, int]]()
    for name, module in block.named_modules():
        if name and is_target(name, target_modules):
            if not is_linear(module):
                raise InputError(f"lora.target_modules: {name!r} is a {type(module).__name__}, expected Linear layers")
            targets.append((name, *linear_shape(module)))
    return targets


def is_target(path: str, target_modules: list[str] | str) -> bool:
    """Whether `target_modules`, endings of paths or a regular expression for a whole one, match a module's `path`.

    These are PEFT's rules, and those of `matching_pattern` too: importing PEFT takes longer than importing torch.
    """
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, path) is not None
    return any(f".{path}".endswith(f".{ending}") for ending in target_modules)


def matching_pattern(patterns: Iterable[str], path: str) -> str | None:
    """The first of `patterns`, regular expressions for the ending of a path, that matches a module's `path`."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", path)), None)


def is_linear(module: nn.Module) -> bool:
    """Whether `module` can carry an adapter: torch's Linear, or GPT-2's Conv1D, which stores its weight [in, out]."""
    return isinstance(module, nn.Linear | Conv1D)


def linear_shape(linear: Any) -> tuple[int, int]:
    """(in features, out features)."""
    rows, columns = parameter_shape(linear.weight)
    return (rows, columns) if stores_input_first(linear) else (columns, rows)


def linear_weight(linear: Any) -> Tensor:
    """The weight as [out, in]; a view, so that writing into it changes the layer."""
    weight: Tensor = linear.weight
    return weight.T if stores_input_first(linear) else weight


def stores_input_first(linear: nn.Module) -> bool:
    """Whether the weight is stored as [in, out] (PEFT's `fan_in_fan_out`)."""
    return isinstance(linear, Conv1D)
