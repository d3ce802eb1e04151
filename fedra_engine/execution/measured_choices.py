"""Choices that depend on the processor, and are measured once: the precision and the attention of `auto`.

The main process measures, all processes take its choice, and it is written into the run's config.yaml, so that a
resumed run measures nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fedra_engine.config import ExperimentConfig
from fedra_engine.config.model import MEASURED
from fedra_engine.data.samples import Samples
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.loading import without_pooling
from fedra_engine.models.sharding import is_sharded
from fedra_engine.runtime.processes import Processes
from fedra_engine.runtime.stages import Stage

Attention = Literal["sdpa", "eager"]

_REPEATS = 5
_PRODUCT = (1024, 768, 768)
"""Rows, inputs and outputs of the product that decides the precision: a Linear of a ViT-B for five images."""
_DTYPE_SPEEDUP = 1.5
"""How many times as fast bfloat16 must be: norms, softmax and what is summed up gain less from it than products."""
_TOKENS = 1024
"""About as many go through the block that decides the attention, in at most `_SAMPLES` samples."""
_SAMPLES = 64
_ATTENTION_SPEEDUP = 1.25
"""How many times as fast another attention than sdpa must be, so that noise does not decide. For 17 to 197
tokens, attention by eager took 0.9 to 1.4 times as long as by sdpa in float32, and a seventh to a half in bfloat16."""


def with_earlier_choices(config: ExperimentConfig, earlier: ExperimentConfig) -> ExperimentConfig:
    """`config` with what the run with the configuration `earlier` chose, wherever it says `auto`."""
    own = {field: getattr(config.model, field) for field in (name.removeprefix("model.") for name in MEASURED)}
    kept = {field: getattr(earlier.model, field) if value == "auto" else value for field, value in own.items()}
    return replace(config, model=replace(config.model, **kept))


def choose_dtype(config: ExperimentConfig, device: torch.device, processes: Processes) -> tuple[ExperimentConfig, str]:
    """`config` with a precision in place of `auto`, and the precision with the reason for it, in words."""
    if config.model.dtype != "auto":
        return config, config.model.dtype
    measured: tuple[Literal["float32", "bfloat16"], str] = "float32", ""
    # A process that has found bad input would not be there when the others wait for the choice.
    with processes.raise_on_all():
        if config.execution.deterministic:
            measured = "float32", "auto, without measuring, as execution.deterministic asks"
        elif processes.is_main:
            measured = _measured_dtype(device)
    dtype, reason = processes.broadcast_object(measured)
    return replace(config, model=replace(config.model, dtype=dtype)), f"{dtype} ({reason})"


def _measured_dtype(device: torch.device) -> tuple[Literal["float32", "bfloat16"], str]:
    if device.type != "cpu":
        able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bfloat16", "auto, a GPU that has it") if able else ("float32", "auto, a GPU without bfloat16")
    rows, inputs, outputs = _PRODUCT
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    of_float32, of_bfloat16 = _shortest(
        *(
            partial(torch.nn.functional.linear, x.to(dtype), weight.to(dtype))
            for dtype in (torch.float32, torch.bfloat16)
        )
    )
    faster = of_float32 / of_bfloat16
    return (
        "bfloat16" if faster >= _DTYPE_SPEEDUP else "float32",
        f"auto, a product of bfloat16 is {faster:.1f} times as fast as one of float32",
    )


def choose_attention(
    config: ExperimentConfig, foundation: Foundation, samples: Samples, processes: Processes
) -> tuple[ExperimentConfig, str]:
    """`config` with an attention in place of `auto`, and the attention with the reason for it, in words.

    The model is given that attention. Models that have only one keep it.
    """
    model = _model_with_choice(foundation)
    if config.model.attention != "auto":
        if model is not None and model.config._attn_implementation != config.model.attention:
            # The caller has made it with another one.
            model.set_attn_implementation(config.model.attention)
        return config, config.model.attention
    chosen: tuple[Attention, str] | None
    with processes.raise_on_all():
        chosen = _attention_without_measuring(foundation, repeatable=config.execution.deterministic)
        if chosen is None and processes.is_main:
            chosen = _measured_attention(foundation, samples)
    attention, reason = processes.broadcast_object(chosen or ("sdpa", ""))
    if model is not None:
        model.set_attn_implementation(attention)
    return replace(config, model=replace(config.model, attention=attention)), f"{attention} ({reason})"


def _model_with_choice(foundation: Foundation) -> Any | None:
    """The model of transformers, if its attention can be set."""
    model = without_pooling(foundation.model)
    return model if hasattr(model, "set_attn_implementation") else None


def _attention_without_measuring(foundation: Foundation, *, repeatable: bool) -> tuple[Attention, str] | None:
    """The attention where nothing is to be measured, with the reason."""
    loaded = getattr(foundation.model.config, "_attn_implementation", None)
    if loaded != "sdpa" or _model_with_choice(foundation) is None:
        return "sdpa" if loaded == "sdpa" else "eager", "auto, that of the model"
    if foundation.device.type != "cpu":
        return "sdpa", "auto, on a GPU"
    if is_sharded(foundation.model):
        return "sdpa", "auto, with a sharded model"
    if foundation.dtype == torch.float64:
        return "sdpa", "auto, with float64, in which runs are compared"
    return ("sdpa", "auto, without measuring, as execution.deterministic asks") if repeatable else None


def _measured_attention(foundation: Foundation, samples: Samples) -> tuple[Attention, str]:
    """The faster of two for a block of the model, forward and backward."""
    model: Any = _model_with_choice(foundation)
    with Stage("choosing the attention"):
        tokens = _block_call(foundation, samples, 1)[0].shape[1]
        hidden, run = _block_call(foundation, samples, max(min(_TOKENS // tokens, _SAMPLES), 2))
        hidden.requires_grad_()

        def run_with(attention: Attention) -> None:
            model.set_attn_implementation(attention)
            run(hidden).sum().backward()

        of_sdpa, of_eager = _shortest(partial(run_with, "sdpa"), partial(run_with, "eager"))
    faster = of_sdpa / of_eager
    if faster >= _ATTENTION_SPEEDUP:
        return "eager", f"auto, {faster:.1f} times as fast as sdpa for a block of the model"
    if faster > 1:
        return "sdpa", f"auto, eager is not {_ATTENTION_SPEEDUP} times as fast for a block of the model"
    return "sdpa", f"auto, {1 / faster:.1f} times as fast as eager for a block of the model"


def _block_call(foundation: Foundation, samples: Samples, count: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The first block's hidden states for `count` times a sample, and a function that runs the block on them."""
    block: Any = next(iter(foundation.blocks.children()))
    calls: list[tuple[Any, Any]] = []
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        with torch.no_grad():
            foundation.model(
                **samples.inputs(torch.zeros(count, dtype=torch.int64), foundation.device, foundation.dtype)
            )
    finally:
        hook.remove()
    args, kwargs = calls[0]

    def run(hidden: Tensor) -> Tensor:
        output = block(hidden, *args[1:], **kwargs) if args else block(**{**kwargs, "hidden_states": hidden})
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    return (args[0] if args else kwargs["hidden_states"]).detach(), run


def _shortest(*runs: Callable[[], object]) -> list[float]:
    """CPU-seconds of the fastest call of each of `runs`, after one that is not counted.

    Other work on the machine lengthens the fastest call least; the calls take turns, so that it lengthens all of them.
    """
    seconds: list[list[float]] = []
    for _ in range(1 + _REPEATS):
        seconds.append([])
        for run in runs:
            started = time.process_time()
            run()
            seconds[-1].append(time.process_time() - started)
    return [min(of_one) for of_one in zip(*seconds[1:], strict=True)]
