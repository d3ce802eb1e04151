"""The options of the frozen model and of the adapters on it."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Literal

from fedra_engine.config import options as allowed
from fedra_engine.config.options import option
from fedra_engine.runtime.errors import InputError

MEASURED = frozenset({"model.dtype", "model.attention"})
"""Fields whose `auto` a run replaces by what it measures."""


@dataclass
class ModelConfig:
    """The frozen foundation model.

    Args:
        path: `digits_vit` (ships with the package), a Hugging Face model directory, or a hub name.
        dtype: precision of the frozen weights and of the computation; `auto` is bfloat16 where a product shows that the
            processor is fast in it, else float32. Adapters, sums and the optimizer's state have at least float32.
        load_in: quantize the Linear layers of the blocks by bitsandbytes: `8bit` (LLM.int8 without outliers) or `4bit`
            (NF4, as in QLoRA); not quantized when null.
        attention: which attention implementation of transformers to use; `auto` is sdpa, but on a CPU eager where a
            block of the model is measured to be 1.25 times as fast with it.
        block_path: dotted path of the block list inside the model; found by structure when null.
        pooling: which output the classifier reads: whatever the model's own classification layers read (`auto`; see
            docs/models.md for models without any), the model's own pooled output (`pooler`), the `first` token, the
            `mean` over tokens, or the `last` token.
        head_init: where the classifier starts: as `loaded` (random where the model had none for these classes),
            `zeros` (all classes equally likely), or `class_means` (the class with the nearest mean of the frozen
            model's features, taken over equally many training samples of every class).
    """

    path: str = option("digits_vit", allowed.PATH)
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "float32"
    load_in: Literal["8bit", "4bit"] | None = None
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    block_path: str | None = option(None, allowed.TEXT)
    pooling: Literal["auto", "pooler", "first", "mean", "last"] = "auto"
    head_init: Literal["loaded", "zeros", "class_means"] = "loaded"


_ALPHA = allowed.number(0, 1e6, above=True)


@dataclass
class LoraConfig:
    """The adapters.

    Args:
        rank: inner dimension r of A [r, in] and B [out, r].
        alpha: the adapter's product is scaled by alpha / rank.
        use_rslora: scale by alpha / √rank instead (arXiv 2312.03732).
        dropout: probability of zeroing an input feature of the adapter path during training.
        target_modules: Linear layers inside a block that get an adapter, by PEFT's rules: a list of name
            endings, or one string that is a regular expression for the whole path inside the block, or all-linear.
        rank_pattern: ranks of single targets, by endings of their paths inside the block, or regular expressions
            for these, as in {q_proj: 16}.
        alpha_pattern: the same for alpha.
        modules_to_save: the final norm, by the end of its path: clients train it, too, each exit its own.
        layers_to_transform: the blocks that have adapters, counted from 0; all when empty. A client may hold others,
            too, which stay as they were loaded.
    """

    rank: int = option(8, allowed.RANK)
    alpha: float = option(16.0, _ALPHA)
    use_rslora: bool = False
    dropout: float = option(0.0, allowed.BELOW_ONE)
    target_modules: list[str] | str = option(["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"], allowed.TEXT)
    rank_pattern: dict[str, int] = option({}, allowed.RANK)
    alpha_pattern: dict[str, float] = option({}, _ALPHA)
    modules_to_save: list[str] = option([], allowed.TEXT)
    layers_to_transform: list[int] = option([], allowed.NATURAL)

    @property
    def largest_rank(self) -> int:
        """The largest rank that a target may have."""
        return max([self.rank, *self.rank_pattern.values()])

    def check(self) -> None:
        """Raise InputError unless `target_modules` names something, and regular expressions are such."""
        if not self.target_modules:
            raise InputError("lora.target_modules: found nothing, expected name endings or a regular expression")
        if isinstance(self.target_modules, str):
            _check_expression("lora.target_modules", self.target_modules)
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                _check_expression(f"lora.{name}", pattern)


def _check_expression(name: str, text: str) -> None:
    """Raise InputError unless the `text` in field `name` is a regular expression."""
    try:
        with warnings.catch_warnings():
            # Python warns of syntax whose meaning will change.
            warnings.simplefilter("error")
            re.compile(text)
    except (re.error, Warning, RecursionError, OverflowError) as error:
        raise InputError(f"{name}: found {text!r} ({error}), expected a regular expression") from error
