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
    """Attribute names of one library's blocks; None for a part that they do not have."""

    norm1: str
    attention: str
    norm2: str
    scale1: str | None = None
    scale2: str | None = None
    attention_inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """In the attention."""
    mlp_inputs: tuple[str, ...] = ("fc1",)
    """In the module `mlp`, as are the next two."""
    activation: str = "activation_fn"
    mlp_output: str = "fc2"
    identities: tuple[str, ...] = ()
    """Parts that must do nothing, or the block is not of this form."""


_FAMILIES = (
    # transformers ViT
    _Family(norm1="layernorm_before", attention="attention", norm2="layernorm_after"),
    # transformers DINOv2
    _Family(
        norm1="norm1",
        attention="attention",
        norm2="norm2",
        scale1="layer_scale1",
        scale2="layer_scale2",
        identities=("drop_path",),
    ),
    # transformers DINOv2 in older versions, such as 5.17
    _Family(
        norm1="norm1",
        attention="attention",
        norm2="norm2",
        scale1="layer_scale1",
        scale2="layer_scale2",
        attention_inputs=("attention.query", "attention.key", "attention.value"),
        activation="activation",
        identities=("drop_path",),
    ),
    # transformers DINOv3
    _Family(
        norm1="norm1",
        attention="attention",
        norm2="norm2",
        scale1="layer_scale1",
        scale2="layer_scale2",
        mlp_inputs=("up_proj",),
        activation="act_fn",
        mlp_output="down_proj",
        identities=("drop_path",),
    ),
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
    """The parts of `block`, or None if it is of no known family.

    Names can deceive: before a block is fused on the word of this function, their outputs must be compared.
    """
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
    # BEiT has ViT's names, and a LayerScale that has none.
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
        mlp_inputs=mlp_inputs,
        mlp_output=mlp_output,
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
