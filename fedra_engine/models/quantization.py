"""Frozen weights of 8 or 4 bits, by bitsandbytes: how they are asked for, recognised and turned back.

Only the Linears of the blocks are quantized. Such a layer computes its own product, from weights in bitsandbytes'
format; the adapter's product is added to its output.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedra_engine.config import ModelConfig
from fedra_engine.runtime.errors import InputError, one_line


def has_quantized_weight(module: nn.Module) -> bool:
    """Whether `module` itself, and not only a part of it, has a weight that is no plain parameter."""
    return any(type(parameter) is not nn.Parameter for parameter in module.parameters(recurse=False))


def is_quantized(model: nn.Module) -> bool:
    """Whether `model` has layers with quantized weights."""
    return any(has_quantized_weight(module) for module in model.modules())


def require_bitsandbytes(config: ModelConfig, device: torch.device) -> None:
    """Raise InputError unless bitsandbytes can be imported and computes on `device`."""
    # It warns at every product of 8 bits with other inputs than float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except Exception as error:  # Also what a library that does not fit the machine raises.
        raise InputError(
            f"model.load_in: found {config.load_in}, but cannot import bitsandbytes ({one_line(error)}), expected it "
            "to be installed (pip install 'fedra-engine[bitsandbytes]')"
        ) from error
    if device.type not in bitsandbytes.supported_torch_devices:
        raise InputError(
            f"model.load_in: found {config.load_in} on a device of type {device.type}, expected one that bitsandbytes "
            f"computes on ({', '.join(sorted(bitsandbytes.supported_torch_devices))})"
        )


def quantization_settings(config: ModelConfig, block_path: str) -> dict[str, Any]:
    """Arguments of transformers' `BitsAndBytesConfig`, for a model whose blocks are at `block_path`."""
    # A regular expression for the paths of all modules outside the blocks.
    shared = {"llm_int8_skip_modules": [rf"(?!{re.escape(block_path)}\.).*"]}
    if config.load_in == "8bit":
        # With a threshold, the columns that are multiplied in higher precision depend on all rows of a batch, so that a
        # client's update would depend on the clients it is batched with.
        return {"load_in_8bit": True, "llm_int8_threshold": 0.0, **shared}
    return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": config.dtype, **shared}


def use_training_products(model: nn.Module) -> None:
    """Have quantized layers multiply as in training, whatever the mode of the model around them.

    In inference mode, bitsandbytes rounds inputs on a CPU, and keeps the weights in another order from then on.
    """
    for module in model.modules():
        if has_quantized_weight(module):
            module.train()


def scales_of(layer: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a quantized layer's state dict that are no parameters (scales, tables), by `prefix` and name."""
    own = {f"{prefix}{name}" for name, _ in layer.named_parameters(recurse=False)}
    return {name: tensor for name, tensor in layer.state_dict(prefix=prefix).items() if name not in own}


@torch.no_grad()
def dequantized(layer: Any, dtype: torch.dtype) -> nn.Module:
    """A layer with a plain weight in place of a quantized one, of the class that the model had before."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).to(dtype)
    plain: Any
    if issubclass(layer.source_cls, Conv1D):
        plain, weight = Conv1D(layer.out_features, layer.in_features), weight.T.contiguous()
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = layer.bias
    return plain
