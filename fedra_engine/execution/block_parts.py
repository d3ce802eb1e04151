"""The parts of pre-norm blocks of known families, found by the names and types of their modules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from fedra_engine.models.quantization import is_quantized
from fedra_kernels import Norm


@dataclass(frozen=True)
class PreNormParts:
    """The parts of a block.

    Attributes:
        norm1, norm2: the norms before attention and MLP.
        attention: takes norm1's output and the block's other arguments.
        scale1, scale2: LayerScale [features], or None.
        attention_inputs: the attention's Linears that read norm1's output.
        attention_output: the attention's last Linear; None if none is found.
        mlp_inputs: the MLP's Linears that read norm2's output: (fc1), or (gate, up) if it is gated.
        mlp_output: the Linear that reads the activation's output.
        activation: `swiglu` if the MLP is gated.
    """

    norm1: Norm
    attention: nn.Module
    scale1: Tensor | None
    norm2: Norm
    scale2: Tensor | None
    attention_inputs: tuple[nn.Module, ...]
    attention_output: nn.Module | None
    mlp_inputs: tuple[nn.Module, ...]
    mlp_output: nn.Module
    activation: Literal["gelu", "gelu_tanh", "swiglu"]


@dataclass(frozen=True)
class _Family:
    """The module paths of one library's blocks; None for a part that they lack."""

    norm1: str
    attention: str
    norm2: str
    scale1: str | None = None
    scale2: str | None = None
    attention_inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Paths within the attention."""
    mlp_inputs: tuple[str, ...] = ("fc1",)
    """Paths within the module `mlp`, as the next two."""
    activation: str = "activation_fn"
    mlp_output: str = "fc2"
    identities: tuple[str, ...] = ()
    """Parts that must be an nn.Identity in blocks of this family."""


_ATTENTION_OUTPUTS = ("o_proj", "out_proj", "c_proj", "proj", "output.dense")
_DINO = _Family(
    norm1="norm1",
    attention="attention",
    norm2="norm2",
    scale1="layer_scale1",
    scale2="layer_scale2",
    identities=("drop_path",),
)
_FAMILIES = (
    # transformers ViT
    _Family(norm1="layernorm_before", attention="attention", norm2="layernorm_after"),
    # transformers DINOv2
    _DINO,
    # transformers DINOv2 in older versions, such as 5.17
    replace(
        _DINO,
        attention_inputs=("attention.query", "attention.key", "attention.value"),
        activation="activation",
    ),
    # transformers DINOv3
    replace(_DINO, mlp_inputs=("up_proj",), activation="act_fn", mlp_output="down_proj"),
    # transformers CLIP (of those that use GELU) and SigLIP
    _Family(norm1="layer_norm1", attention="self_attn", norm2="layer_norm2"),
    # transformers GPT-2
    _Family(
        norm1="ln_1",
        attention="attn",
        norm2="ln_2",
        attention_inputs=("c_attn",),
        mlp_inputs=("c_fc",),
        activation="act",
        mlp_output="c_proj",
    ),
    # timm ViT
    _Family(
        norm1="norm1",
        attention="attn",
        norm2="norm2",
        scale1="ls1",
        scale2="ls2",
        attention_inputs=("qkv",),
        activation="act",
        identities=("drop_path1", "drop_path2", "mlp.norm"),
    ),
    # transformers LLaMA, Qwen and their like
    _Family(
        norm1="input_layernorm",
        attention="self_attn",
        norm2="post_attention_layernorm",
        mlp_inputs=("gate_proj", "up_proj"),
        activation="act_fn",
        mlp_output="down_proj",
    ),
)


def match_parts(block: nn.Module) -> PreNormParts | None:
    """The parts of `block`, or None if it is of no known family, or has quantized weights.

    Only names and types are compared: the outputs of the fused block must be checked against the block's.
    """
    # A layer that rounds its inputs would turn the least difference of them into a large one.
    if is_quantized(block):
        return None
    return next((parts for family in _FAMILIES if (parts := _match(block, family)) is not None), None)


def _match(block: nn.Module, family: _Family) -> PreNormParts | None:
    try:
        named1, named2, attention, mlp = (
            block.get_submodule(name) for name in (family.norm1, family.norm2, family.attention, "mlp")
        )
        attention_inputs = tuple(attention.get_submodule(name) for name in family.attention_inputs)
        mlp_inputs = tuple(mlp.get_submodule(name) for name in family.mlp_inputs)
        function, mlp_output = mlp.get_submodule(family.activation), mlp.get_submodule(family.mlp_output)
        identities = [block.get_submodule(name) for name in family.identities]
        scalers = [block.get_submodule(name) if name else nn.Identity() for name in (family.scale1, family.scale2)]
        scale1, scale2 = map(_layer_scale, scalers)
    except (AttributeError, TypeError):
        return None
    # Any other parameter has an unknown use: BEiT has ViT's names, and LayerScale's factors without a module.
    parts = (named1, named2, attention, *mlp_inputs, mlp_output, *scalers)
    known = {id(parameter) for part in parts for parameter in part.parameters()}
    if any(id(parameter) not in known for parameter in block.parameters()):
        return None
    norm1, norm2 = _norm(named1), _norm(named2)
    activation = _activation(function, gated=len(mlp_inputs) == 2)
    if norm1 is None or norm2 is None or activation is None:
        return None
    if not all(isinstance(module, nn.Identity) for module in identities):
        return None
    return PreNormParts(
        norm1=norm1,
        attention=attention,
        scale1=scale1,
        norm2=norm2,
        scale2=scale2,
        attention_inputs=attention_inputs,
        attention_output=next((m for n in _ATTENTION_OUTPUTS if (m := getattr(attention, n, None)) is not None), None),
        mlp_inputs=mlp_inputs,
        mlp_output=mlp_output,
        activation=activation,
    )


def _norm(module: nn.Module) -> Norm | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if isinstance(module, nn.LayerNorm):
        return Norm(weight, module.bias, module.eps, "layer")
    if type(module).__name__.endswith("RMSNorm"):
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        return Norm(weight, None, eps, "rms") if isinstance(eps, float) else None
    return None


def _layer_scale(module: nn.Module) -> Tensor | None:
    """The factor of a LayerScale (`lambda1` in transformers, `gamma` in timm); None for an identity."""
    if isinstance(module, nn.Identity):
        return None
    factor = getattr(module, "lambda1", getattr(module, "gamma", None))
    if not isinstance(factor, Tensor):
        raise TypeError
    return factor


def _activation(module: nn.Module, *, gated: bool) -> Literal["gelu", "gelu_tanh", "swiglu"] | None:
    name = type(module).__name__
    if gated:
        return "swiglu" if name in ("SiLU", "SiLUActivation") else None
    if name in ("GELU", "GELUActivation"):
        return "gelu" if getattr(module, "approximate", "none") == "none" else "gelu_tanh"
    return "gelu_tanh" if name in ("GELUTanh", "PytorchGELUTanh", "NewGELUActivation") else None
