"""Which blocks can be fused: the parts of pre-norm transformer blocks, by the names that libraries give them.

h += scale1 · attention(norm1(h));  h += scale2 · mlp(norm2(h))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class Norm:
    """A LayerNorm or RMSNorm: weight and bias [features]."""

    kind: Literal["layer", "rms"]
    weight: Tensor
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class PreNormParts:
    """The parts of a block.

    Attributes:
        norm1, norm2: the norms before attention and MLP.
        attention: takes norm1's output and the block's other arguments.
        scale1, scale2: LayerScale [features], or None.
        attention_inputs: Linears inside the attention that read norm1's output.
        mlp_inputs: Linears that read norm2's output: (fc1) of a plain MLP, (gate, up) of a gated one.
        mlp_output: the Linear that reads the activation's output.
        activation: of a plain MLP, `gelu` or `gelu_tanh`; of a gated one, `swiglu`.
    """

    norm1: Norm
    attention: nn.Module
    scale1: Tensor | None
    norm2: Norm
    scale2: Tensor | None
    attention_inputs: tuple[nn.Module, ...]
    mlp_inputs: tuple[nn.Module, ...]
    mlp_output: nn.Module
    activation: Literal["gelu", "gelu_tanh", "swiglu"]


@dataclass(frozen=True)
class _Family:
    """Attribute names of one library's blocks; an empty name for a part it does not have."""

    norm1: str
    attention: str
    scale1: str
    norm2: str
    scale2: str
    attention_inputs: tuple[str, ...]
    mlp_inputs: tuple[str, ...]
    activation: str
    mlp_output: str
    identities: tuple[str, ...] = ()
    """Parts that must do nothing, or the block is not of this form."""


_FAMILIES = (
    # transformers ViT
    _Family(
        "layernorm_before",
        "attention",
        "",
        "layernorm_after",
        "",
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        ("mlp.fc1",),
        "mlp.activation_fn",
        "mlp.fc2",
    ),
    # transformers DINOv2
    _Family(
        "norm1",
        "attention",
        "layer_scale1",
        "norm2",
        "layer_scale2",
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        ("mlp.fc1",),
        "mlp.activation_fn",
        "mlp.fc2",
        identities=("drop_path",),
    ),
    # transformers DINOv3
    _Family(
        "norm1",
        "attention",
        "layer_scale1",
        "norm2",
        "layer_scale2",
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        ("mlp.up_proj",),
        "mlp.act_fn",
        "mlp.down_proj",
        identities=("drop_path",),
    ),
    # transformers CLIP (of those that use GELU) and SigLIP
    _Family(
        "layer_norm1",
        "self_attn",
        "",
        "layer_norm2",
        "",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.fc1",),
        "mlp.activation_fn",
        "mlp.fc2",
    ),
    # transformers GPT-2
    _Family(
        "ln_1",
        "attn",
        "",
        "ln_2",
        "",
        ("attn.c_attn",),
        ("mlp.c_fc",),
        "mlp.act",
        "mlp.c_proj",
    ),
    # timm ViT
    _Family(
        "norm1",
        "attn",
        "ls1",
        "norm2",
        "ls2",
        ("attn.qkv",),
        ("mlp.fc1",),
        "mlp.act",
        "mlp.fc2",
        identities=("drop_path1", "drop_path2", "mlp.norm"),
    ),
    # transformers LLaMA, Qwen and their like
    _Family(
        "input_layernorm",
        "self_attn",
        "",
        "post_attention_layernorm",
        "",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.act_fn",
        "mlp.down_proj",
    ),
)


def match_parts(block: nn.Module) -> PreNormParts | None:
    """The parts of `block`, or None if it is of no known family.

    Names can deceive: whoever fuses a block on the word of this function must compare its output with the block's.
    """
    return next((parts for family in _FAMILIES if (parts := _match(block, family)) is not None), None)


def _match(block: nn.Module, family: _Family) -> PreNormParts | None:
    try:
        modules = {
            name: block.get_submodule(name)
            for name in (
                family.norm1,
                family.attention,
                family.norm2,
                family.activation,
                family.mlp_output,
                *family.attention_inputs,
                *family.mlp_inputs,
            )
        }
        identities = [block.get_submodule(name) for name in family.identities]
        scalers = [block.get_submodule(name) if name else nn.Identity() for name in (family.scale1, family.scale2)]
        scales = [_layer_scale(scaler) for scaler in scalers]
    except (AttributeError, TypeError):
        return None
    # BEiT has ViT's names, and a LayerScale that has none.
    known = {id(parameter) for module in (*modules.values(), *scalers) for parameter in module.parameters()}
    if any(id(parameter) not in known for parameter in block.parameters()):
        return None
    norm1, norm2 = _norm(modules[family.norm1]), _norm(modules[family.norm2])
    activation = _activation(modules[family.activation], gated=len(family.mlp_inputs) == 2)
    if norm1 is None or norm2 is None or activation is None:
        return None
    if not all(isinstance(module, nn.Identity) for module in identities):
        return None
    return PreNormParts(
        norm1=norm1,
        attention=modules[family.attention],
        scale1=scales[0],
        norm2=norm2,
        scale2=scales[1],
        attention_inputs=tuple(modules[name] for name in family.attention_inputs),
        mlp_inputs=tuple(modules[name] for name in family.mlp_inputs),
        mlp_output=modules[family.mlp_output],
        activation=activation,
    )


def _norm(module: nn.Module) -> Norm | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if isinstance(module, nn.LayerNorm):
        return Norm("layer", weight, module.bias, module.eps)
    if type(module).__name__.endswith("RMSNorm"):
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        return Norm("rms", weight, None, eps) if isinstance(eps, float) else None
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
