"""`lora_linear` against the frozen product alone, PEFT client by client, batched and grouped products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.kernels.cases import COMPILED, ENGINE, Case, Sizes, compiled, random
from benchmarks.kernels.timing import Call
from benchmarks.kernels.work import lora_backward, lora_forward
from fedra_engine.models.peft_library import PeftLoraConfig, inject_adapter_in_model
from fedra_kernels import RowGroups, lora_linear
from fedra_kernels._kernels import lora_torch
from fedra_kernels._kernels.lora_gemm import gemm_tile, lora_gemm, lora_gemm_onto
from fedra_kernels.dispatch import use_triton

KERNEL, PRODUCT = "lora_linear", "lora_gemm"
FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class LoraInputs:
    """x [rows, in], weight [out, in], banks [clients, rank, in] and [clients, out, rank], upstream gradient."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    lora_a: Tensor
    lora_b: Tensor
    grad_y: Tensor
    groups: RowGroups

    @property
    def x3(self) -> Tensor:
        """[clients, rows of a client, in]."""
        return self.x.unflatten(0, (len(self.groups), -1))

    @property
    def grad_y3(self) -> Tensor:
        """[clients, rows of a client, out]."""
        return self.grad_y.unflatten(0, (len(self.groups), -1))

    @property
    def ends(self) -> Tensor:
        """int32 [clients], where each client's rows end."""
        rows = self.groups.sizes[0]
        return torch.arange(1, len(self.groups) + 1, dtype=torch.int32, device=self.x.device) * rows


def lora_cases(sizes: Sizes, layers: Sequence[tuple[int, int]] | None = None) -> Iterator[Case]:
    """`lora_linear` forward and backward, and its product alone, for each Linear of a block, or of `layers`.

    The product is given S = drop(x) A^T, as it is in a block whose norms and activation make it.
    """
    for inputs, outputs in sizes.layers if layers is None else layers:

        def make(generator: torch.Generator, inputs: int = inputs, outputs: int = outputs) -> LoraInputs:
            return _inputs(sizes, inputs, outputs, generator)

        shape = (sizes.rows, inputs, outputs, sizes.rank, sizes.clients, sizes.itemsize)
        x = layer_name(inputs, outputs)
        forward, given = lora_forward(*shape, given=False), lora_forward(*shape, given=True)
        yield Case(KERNEL, FORWARD, x, forward, "frozen", make, _FORWARD)
        yield Case(PRODUCT, FORWARD, x, given, "frozen", make, _given_providers(sizes.device))
        yield Case(KERNEL, BACKWARD, x, lora_backward(*shape), "frozen", make, _BACKWARD)


def layer_name(inputs: int, outputs: int) -> str:
    """How the tables call a Linear."""
    return f"{inputs}→{outputs}"


def _inputs(sizes: Sizes, inputs: int, outputs: int, generator: torch.Generator) -> LoraInputs:
    # As in the engine: strided views of one bank whose rows are slots.
    bank = random(generator, sizes.clients, sizes.rank * (inputs + outputs), dtype=sizes.dtype, scale=0.05)
    split = sizes.rank * inputs
    return LoraInputs(
        x=random(generator, sizes.rows, inputs, dtype=sizes.dtype),
        weight=random(generator, outputs, inputs, dtype=sizes.dtype, scale=inputs**-0.5),
        bias=random(generator, outputs, dtype=sizes.dtype),
        lora_a=bank[:, :split].unflatten(1, (sizes.rank, inputs)),
        lora_b=bank[:, split:].unflatten(1, (outputs, sizes.rank)),
        grad_y=random(generator, sizes.rows, outputs, dtype=sizes.dtype),
        groups=sizes.groups(),
    )


def _engine(i: LoraInputs) -> Call:
    return _lora_linear(i, i.x)


def _engine_given(i: LoraInputs) -> Call:
    shrunk = torch.bmm(i.x3, i.lora_a.transpose(1, 2)).flatten(0, 1)
    if not use_triton(i.x):

        def call() -> Tensor:
            y = F.linear(i.x, i.weight, i.bias)
            lora_torch.expand(y, shrunk, i.lora_b, i.groups, 1.0)
            return y

        return call
    spans = i.groups.spans(gemm_tile(i.x, i.lora_a.shape[1]).rows)
    return lambda: lora_gemm([i.x], i.weight, i.bias, shrunk, [i.lora_b], [len(i.weight)], spans, i.groups.filled, 1.0)


def _given_providers(device: torch.device) -> dict[str, Callable[[LoraInputs], Call]]:
    providers: dict[str, Callable[[LoraInputs], Call]] = {"frozen": _frozen, ENGINE: _engine_given}
    if device.type != "cpu":
        providers["F.linear + grouped expand"] = _library_then_expand
    return providers


def _library_then_expand(i: LoraInputs) -> Call:
    """The frozen product by the library, whose choice among its algorithms depends on the number of rows."""
    shrunk, rank = torch.bmm(i.x3, i.lora_a.transpose(1, 2)).flatten(0, 1), i.lora_a.shape[1]
    spans = i.groups.spans(gemm_tile(i.x, rank).rows)

    def call() -> Tensor:
        y = F.linear(i.x, i.weight, i.bias)
        lora_gemm_onto(
            y, None, [i.x[:, :0]], i.weight[:, :0], None, shrunk, [i.lora_b], [len(i.weight)],
            spans, i.groups.filled, 1.0, residual=y,
        )  # fmt: skip
        return y

    return call


def _engine_backward(i: LoraInputs) -> Call:
    x = i.x.detach().requires_grad_()
    with torch.enable_grad():
        y = _lora_linear(i, x)()
    return lambda: torch.autograd.grad(y, x, i.grad_y, retain_graph=True)


def _lora_linear(i: LoraInputs, x: Tensor) -> Callable[[], Tensor]:
    grad_a, grad_b = (torch.zeros(bank.shape, device=bank.device) for bank in (i.lora_a, i.lora_b))
    return lambda: lora_linear(x, i.weight, i.bias, i.lora_a, i.lora_b, i.groups, 1.0, grad_a, grad_b)


def _frozen(i: LoraInputs) -> Call:
    return lambda: F.linear(i.x, i.weight, i.bias)


def _frozen_backward(i: LoraInputs) -> Call:
    return lambda: i.grad_y @ i.weight


def _peft_layers(i: LoraInputs) -> list[nn.Module]:
    """A PEFT LoRA layer for each client around one frozen Linear; adapters in the model's own dtype."""
    rank = i.lora_a.shape[1]
    layers = []
    for lora_a, lora_b in zip(i.lora_a, i.lora_b, strict=True):
        linear = nn.Linear(i.weight.shape[1], i.weight.shape[0], device="meta")
        linear.weight, linear.bias = (nn.Parameter(t, requires_grad=False) for t in (i.weight, i.bias))
        holder = nn.Sequential(linear)
        inject_adapter_in_model(PeftLoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]), holder)
        layer = holder[0]
        layer.get_submodule("lora_A.default").weight = nn.Parameter(lora_a.clone())
        layer.get_submodule("lora_B.default").weight = nn.Parameter(lora_b.clone())
        layers.append(layer)
    return layers


def _peft(i: LoraInputs) -> Call:
    layers = _peft_layers(i)
    return lambda: [layer(x) for layer, x in zip(layers, i.x3, strict=True)]


def _peft_backward(i: LoraInputs) -> Call:
    layers = _peft_layers(i)
    xs = [x.detach().requires_grad_() for x in i.x3]
    with torch.enable_grad():
        ys = [layer(x) for layer, x in zip(layers, xs, strict=True)]
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(ys, [*xs, *parameters], list(i.grad_y3), retain_graph=True)


def _matmul_addmm(i: LoraInputs) -> Call:
    factors = list(zip(i.lora_a.contiguous(), i.lora_b.contiguous(), i.x3, strict=True))

    def call() -> Tensor:
        y = F.linear(i.x, i.weight, i.bias)
        for part, (lora_a, lora_b, x) in zip(y.chunk(len(factors)), factors, strict=True):
            part.addmm_(x @ lora_a.T, lora_b.T)
        return y

    return call


def _matmul_addmm_backward(i: LoraInputs) -> Call:
    lora_a, lora_b = i.lora_a.contiguous(), i.lora_b.contiguous()
    shrunk = torch.bmm(i.x3, lora_a.transpose(1, 2))

    def call() -> Tensor:
        grad_x = i.grad_y @ i.weight
        for k, part in enumerate(grad_x.chunk(len(lora_a))):
            grad_y = i.grad_y3[k]
            grad_shrunk = grad_y @ lora_b[k]
            torch.mm(grad_y.T, shrunk[k])
            torch.mm(grad_shrunk.T, i.x3[k])
            part.addmm_(grad_shrunk, lora_a[k])
        return grad_x

    return call


def _bmm_products(x: Tensor, weight: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    y = F.linear(x, weight, bias)
    shrunk = torch.bmm(x, lora_a.transpose(1, 2))
    return torch.baddbmm(y, shrunk, lora_b.transpose(1, 2))


def _bmm_gradients(
    grad_y: Tensor, x: Tensor, shrunk: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_shrunk = torch.bmm(grad_y, lora_b)
    grad_b = torch.bmm(grad_y.transpose(1, 2), shrunk)
    grad_a = torch.bmm(grad_shrunk.transpose(1, 2), x)
    return torch.baddbmm(grad_y @ weight, grad_shrunk, lora_a), grad_a, grad_b


def _bmm(i: LoraInputs, compile: bool = False) -> Call:
    products = compiled(_bmm_products) if compile else _bmm_products
    lora_a, lora_b, x = i.lora_a.contiguous(), i.lora_b.contiguous(), i.x3
    return lambda: products(x, i.weight, i.bias, lora_a, lora_b)


def _bmm_backward(i: LoraInputs, compile: bool = False) -> Call:
    gradients = compiled(_bmm_gradients) if compile else _bmm_gradients
    lora_a, lora_b, x, grad_y = i.lora_a.contiguous(), i.lora_b.contiguous(), i.x3, i.grad_y3
    shrunk = torch.bmm(x, lora_a.transpose(1, 2))
    return lambda: gradients(grad_y, x, shrunk, i.weight, lora_a, lora_b)


def _grouped_mm(i: LoraInputs) -> Call:
    lora_a, lora_b, ends = i.lora_a.contiguous(), i.lora_b.contiguous(), i.ends

    def call() -> Tensor:
        shrunk = F.grouped_mm(i.x, lora_a.transpose(1, 2), offs=ends)
        return F.linear(i.x, i.weight, i.bias).add_(F.grouped_mm(shrunk, lora_b.transpose(1, 2), offs=ends))

    return call


_FORWARD = {
    "frozen": _frozen,
    ENGINE: _engine,
    "PEFT, client by client": _peft,
    "matmul + addmm_": _matmul_addmm,
    "torch.bmm": _bmm,
    "F.grouped_mm": _grouped_mm,
    f"{COMPILED} of torch.bmm": lambda i: _bmm(i, compile=True),
}
_BACKWARD = {
    "frozen": _frozen_backward,
    ENGINE: _engine_backward,
    "PEFT, client by client": _peft_backward,
    "matmul + addmm_": _matmul_addmm_backward,
    "torch.bmm": _bmm_backward,
    f"{COMPILED} of torch.bmm": lambda i: _bmm_backward(i, compile=True),
}
