"""Frozen Linear layers on a CPU, with weights that are laid out once for the products to come."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_HAS_ONEDNN = torch.backends.mkldnn.is_available()
_HAS_BFLOAT16 = _HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether oneDNN multiplies bfloat16 on this processor; it refuses to without AVX-512."""
_SMALL = 10e6
"""Float32 products of fewer FLOP are left to torch: oneDNN takes about 15 µs to find its code, more than it saves."""


class FrozenLinear:
    """The products of a frozen Linear, forward and backward, outside of autograd.

    In float32 and bfloat16 oneDNN computes them from copies of the weight in its own layout, one for each direction,
    which are made again when the weight has changed. One thread of an EPYC with AVX-512 ran products of ViT-Ti and
    ViT-S sizes 7 to 20 % faster so in float32, and 5 % faster in bfloat16. Other precisions use torch's products.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, input_first: bool = False) -> None:
        """Take the layer's own parameters.

        Args:
            weight: [out, in], or [in, out] with `input_first`.
            bias: [out] or None.
        """
        self._stored, self.bias = weight, bias
        self.weight = weight.detach().T if input_first else weight.detach()
        """The weight as [out, in]."""
        self._packed: tuple[Tensor, Tensor] | None = None
        self._version = -1

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x W^T + b for x [rows, in], plus `residual` [rows, out] if there is one."""
        packed = self._pack(x)
        if packed is None:
            y = F.linear(x, self.weight, self.bias)
            return y if residual is None else y.add_(residual)
        if residual is None:
            return torch.ops.mkldnn._linear_pointwise(x, packed[0], self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed[0], self.bias, "add")

    def backward(self, grad_y: Tensor, other: Tensor | None = None) -> Tensor:
        """dY W for grad_y [rows, out]: the gradient of x; plus `other` [rows, in], which may be overwritten."""
        packed = self._pack(grad_y)
        if packed is None:
            return grad_y @ self.weight if other is None else other.addmm_(grad_y, self.weight)
        if other is None:
            return torch.ops.mkldnn._linear_pointwise(grad_y, packed[1], None, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(grad_y, other, packed[1], None, "add")

    def _pack(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The weight in oneDNN's layout, for forward and for backward; None where x cannot be multiplied by it."""
        weight = self.weight
        if x.dtype == torch.float32:
            if 2 * x.shape[0] * weight.shape[0] * weight.shape[1] < _SMALL:
                return None
        elif x.dtype != torch.bfloat16 or not _HAS_BFLOAT16:
            return None
        if x.device.type != "cpu" or not _HAS_ONEDNN:
            return None
        if self._packed is None or self._version != self._stored._version:
            reorder = torch.ops.mkldnn._reorder_linear_weight
            self._packed = reorder(weight.contiguous()), reorder(weight.T.contiguous())
            self._version = self._stored._version
        return self._packed
