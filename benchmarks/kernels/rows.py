"""The steps of a block on the residual stream around its products: norms, activations, and what a read of dY gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.block_shapes import SCALE, BlockShape, vit_shape
from benchmarks.kernels.cases import COMPILED, ENGINE, Case, Sizes, compiled, memory_case, random, rows_of_the_block
from benchmarks.kernels.timing import Call
from benchmarks.kernels.work import Pass, Work, traffic
from fedra_kernels import RowGroups, StreamBlock
from fedra_kernels._kernels.configs import GRADIENT_CHUNK
from fedra_kernels._kernels.stream_steps import NormedRows, StreamRows, StreamSteps
from fedra_kernels._kernels.stream_torch import TorchSteps
from fedra_kernels._kernels.stream_triton import TritonSteps
from fedra_kernels.dispatch import use_triton


@dataclass(frozen=True)
class StepInputs:
    """A block, its rows, and what earlier steps have left.

    Attributes:
        stream: [2 · rows, width], of whose samples every second one holds the block; `index`: int64 [rows], these rows.
        rows, grad: [rows, width], what a norm has read, and a gradient; mean, inverse: float32 [rows], of `rows`.
        wide: [rows, hidden], or gate and up side by side, what the activation reads.
        y, grad_y: [rows, hidden], the activation and its gradient.
        shrunk: [rows, rank], S or dS of an adapter.
        bank: [clients, slot size].
    """

    shape: BlockShape
    block: StreamBlock
    stream: Tensor
    index: Tensor
    rows: Tensor
    grad: Tensor
    mean: Tensor
    inverse: Tensor
    wide: Tensor
    y: Tensor
    grad_y: Tensor
    shrunk: Tensor
    bank: Tensor
    groups: RowGroups

    @cached_property
    def steps(self) -> StreamSteps:
        """Those of the path that the tensors' device takes."""
        kind = TritonSteps if use_triton(self.stream) else TorchSteps
        gradients = torch.zeros_like(self.bank, dtype=torch.float32)
        return kind(self.bank, gradients, True, True, self.groups, (), self.block.first_b)

    @property
    def normed(self) -> NormedRows:
        """`rows` as a norm keeps them."""
        return NormedRows(self.rows, self.mean, self.inverse, self.block.norm1)

    @cached_property
    def outputs(self) -> Sequence[Tensor]:
        """`wide` as the path makes it: on a CPU, gate and up are tensors of their own."""
        if use_triton(self.stream):
            return [self.wide]
        return [part.contiguous() for part in self.block.mlp_inputs.by_member([self.wide])]

    def by_client(self, rows: Tensor) -> Tensor:
        """[clients, rows of a client, features]."""
        return rows.unflatten(0, (len(self.bank), -1))


Function = Callable[[StepInputs], tuple[Tensor, ...]]
"""What a step makes; the engine keeps sums for gradients of adapters, which come last, to itself."""


def row_cases(sizes: Sizes) -> Iterator[Case]:
    """The steps of a ViT's block with adapters on all Linears and LayerScale, and SwiGLU in the place of GELU."""
    width, hidden = sizes.rows * sizes.width * sizes.itemsize, sizes.rows * sizes.hidden * sizes.itemsize
    shrunk = sizes.rows * sizes.rank * sizes.itemsize
    programs = sizes.clients * -(-sizes.samples * sizes.tokens // GRADIENT_CHUNK)
    sums, wide_sums = (4 * programs * sizes.rank * features for features in (sizes.width, sizes.hidden))
    plain = replace(vit_shape(sizes), scaled=True)
    gated = replace(plain, gated=True)
    # Rows that are read through an index are also written one after another, for backward.
    for kernel, mode, shape, features, moved, functions in (
        ("norm + 3 S", "forward", plain, sizes.width, 3 * width + 3 * shrunk, _NORM),
        ("norm + 3 S", "backward", plain, sizes.width, 4 * width, _NORM_BACKWARD),
        ("GELU + S", "forward", plain, sizes.hidden, 2 * hidden + shrunk, _GELU),
        ("GELU + S", "backward", plain, sizes.hidden, 3 * hidden + shrunk + wide_sums, _GELU_BACKWARD),
        ("SwiGLU + S", "forward", gated, sizes.hidden, 3 * hidden + shrunk, _SWIGLU),
        ("SwiGLU + S", "backward", gated, sizes.hidden, 5 * hidden + shrunk + wide_sums, _SWIGLU_BACKWARD),
        ("dS + dB of the stream's rows", "backward", plain, sizes.width, 2 * width + 2 * shrunk + sums, _OUTPUT),
    ):
        inputs = partial(_inputs, sizes, shape)
        yield memory_case(kernel, mode, str(features), traffic(moved), sizes.device, inputs, _providers(functions))
    rows, rank = sizes.rows, sizes.rank
    low_rank, product = 2.0 * rows * rank, 2.0 * rows * sizes.width * sizes.hidden
    work = Work(
        (
            Pass(2 * low_rank * sizes.hidden, 3 * hidden + 2 * shrunk + 2 * wide_sums),
            Pass(
                product + low_rank * (sizes.hidden + sizes.width),
                hidden + width + shrunk + sizes.width * sizes.hidden * sizes.itemsize,
            ),
            Pass(low_rank * sizes.width, width + shrunk + sums),
        )
    )
    yield _linear_before_gelu(sizes, plain, work)


def _linear_before_gelu(sizes: Sizes, shape: BlockShape, work: Work) -> Case:
    """From the gradient of GELU to that of the input of the Linear before it, and dA and dB of the Linears around."""
    providers = _providers(_LINEAR_BEFORE_GELU) | {"frozen": partial(_timed, _frozen_linear)}
    x = f"{sizes.width}→{sizes.hidden}"
    return Case("GELU + the Linear before it", "backward", x, work, "frozen", partial(_inputs, sizes, shape), providers)


def _providers(functions: Mapping[str, Function]) -> dict[str, Callable[[StepInputs], Call]]:
    made = {name: partial(_timed, function) for name, function in functions.items()}
    return {**made, f"{COMPILED} of eager": lambda inputs: _timed(compiled(functions["eager"]), inputs)}


def _timed(function: Function, inputs: StepInputs) -> Call:
    return lambda: function(inputs)


def _inputs(sizes: Sizes, shape: BlockShape, generator: torch.Generator) -> StepInputs:
    draw = partial(random, generator, dtype=sizes.dtype)
    rows = draw(sizes.rows, sizes.width)
    exact, block = rows.float(), shape.block(draw)
    bank = draw(sizes.clients, shape.slot_size, scale=sizes.hidden**-0.5)
    return StepInputs(
        shape=shape,
        block=block,
        stream=draw(2 * sizes.rows, sizes.width),
        index=rows_of_the_block(sizes),
        rows=rows,
        grad=draw(sizes.rows, sizes.width),
        mean=exact.mean(1),
        inverse=torch.rsqrt(exact.var(1, correction=0) + block.norm1.eps),
        wide=draw(sizes.rows, sizes.hidden * (2 if shape.gated else 1)),
        y=draw(sizes.rows, sizes.hidden),
        grad_y=draw(sizes.rows, sizes.hidden),
        shrunk=draw(sizes.rows, sizes.rank),
        bank=bank,
        groups=sizes.groups(),
    )


def _norm(i: StepInputs) -> tuple[Tensor, ...]:
    x, normed, shrunk = i.steps.normalize(StreamRows(i.stream, i.index), i.block.norm1, i.block.attention_inputs)
    return x, normed.rows, *shrunk


def _eager_norm(i: StepInputs) -> tuple[Tensor, ...]:
    norm, rows = i.block.norm1, i.stream[i.index]
    x = F.layer_norm(rows, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    of_clients = i.by_client(x)
    shrunk = (torch.bmm(of_clients, a.transpose(1, 2)).flatten(0, 1) for a in i.block.attention_inputs.lora_a(i.bank))
    return x, rows, *shrunk


def _norm_backward(i: StepInputs) -> tuple[Tensor, ...]:
    return (i.steps.norm_gradient(i.grad, i.normed, StreamRows(i.rows), StreamRows(i.stream, i.index)),)


def _eager_norm_backward(i: StepInputs) -> tuple[Tensor, ...]:
    norm = i.block.norm1
    grad, *_ = torch.ops.aten.native_layer_norm_backward(
        i.grad, i.rows, norm.weight.shape, i.mean[:, None], i.inverse[:, None], norm.weight, norm.bias,
        [True, False, False],
    )  # fmt: skip
    return (i.stream.index_copy_(0, i.index, grad + i.rows),)


def _activate(i: StepInputs) -> tuple[Tensor, ...]:
    y, shrunk = i.steps.activate(i.outputs, i.block.activation, i.block.mlp_output)
    return y, *shrunk


def _with_shrink(i: StepInputs, y: Tensor) -> tuple[Tensor, ...]:
    (lora_a,) = i.block.mlp_output.lora_a(i.bank)
    return y, torch.bmm(i.by_client(y), lora_a.transpose(1, 2)).flatten(0, 1)


def _eager_gelu(i: StepInputs) -> tuple[Tensor, ...]:
    return _with_shrink(i, F.gelu(i.wide))


def _eager_swiglu(i: StepInputs) -> tuple[Tensor, ...]:
    gate, up = i.wide.chunk(2, dim=1)
    return _with_shrink(i, F.silu(gate) * up)


def _activation_backward(i: StepInputs) -> tuple[Tensor, ...]:
    block = i.block
    return tuple(i.steps.activation_gradient(i.grad_y, i.outputs, block.activation, block.mlp_output, [i.shrunk]))


def _eager_gelu_backward(i: StepInputs) -> tuple[Tensor, ...]:
    """`y` has been kept."""
    return torch.ops.aten.gelu_backward(i.grad_y, i.wide), _outer(i, i.shrunk, i.y)


def _eager_swiglu_backward(i: StepInputs) -> tuple[Tensor, ...]:
    gate, up = i.wide.chunk(2, dim=1)
    of_gate = torch.ops.aten.silu_backward(i.grad_y * up, gate)
    of_up = i.grad_y * F.silu(gate)
    grads = (torch.cat([of_gate, of_up], dim=1),) if len(i.outputs) == 1 else (of_gate, of_up)
    return *grads, _outer(i, i.shrunk, i.y)


def _outer(i: StepInputs, left: Tensor, right: Tensor) -> Tensor:
    """The sums of a factor's gradient, [clients, features of left, features of right]."""
    return torch.bmm(i.by_client(left).transpose(1, 2), i.by_client(right))


def _output(i: StepInputs) -> tuple[Tensor, ...]:
    (grad,), (grad_shrunk, *_) = i.steps.output_gradient(
        [i.stream], i.block.mlp_output, [i.shrunk], i.index, i.block.scale2
    )
    return grad, grad_shrunk


def _eager_output(i: StepInputs) -> tuple[Tensor, ...]:
    assert i.block.scale2 is not None
    grad = i.stream[i.index] * i.block.scale2
    (lora_b,) = i.block.mlp_output.lora_b(i.bank)
    return grad, torch.bmm(i.by_client(grad), lora_b).flatten(0, 1) * SCALE, _outer(i, grad, i.shrunk)


def _linear(i: StepInputs) -> tuple[Tensor, ...]:
    block = i.block
    around = block.mlp_output, [i.shrunk], block.mlp_inputs, [i.shrunk]
    return (i.steps.mlp_gradient(i.grad_y, i.outputs, block.activation, *around, i.normed),)


def _eager_linear(i: StepInputs) -> tuple[Tensor, ...]:
    """The norm of `rows`, which has been kept, is taken to be `grad`."""
    layer = i.block.mlp_inputs
    (lora_a,), (lora_b,) = layer.lora_a(i.bank), layer.lora_b(i.bank)
    of_wide = torch.ops.aten.gelu_backward(i.grad_y, i.wide)
    grad_shrunk = torch.bmm(i.by_client(of_wide), lora_b) * SCALE
    of_x = torch.baddbmm(i.by_client(of_wide @ layer.weight), grad_shrunk, lora_a).flatten(0, 1)
    grad_a = _outer(i, i.shrunk, i.y), _outer(i, grad_shrunk.flatten(0, 1), i.grad)
    return of_x, *grad_a, _outer(i, of_wide, i.shrunk)


def _frozen_linear(i: StepInputs) -> tuple[Tensor, ...]:
    return (i.grad_y @ i.block.mlp_inputs.weight,)


_NORM: dict[str, Function] = {ENGINE: _norm, "eager": _eager_norm}
_NORM_BACKWARD: dict[str, Function] = {ENGINE: _norm_backward, "eager": _eager_norm_backward}
_GELU: dict[str, Function] = {ENGINE: _activate, "eager": _eager_gelu}
_GELU_BACKWARD: dict[str, Function] = {ENGINE: _activation_backward, "eager": _eager_gelu_backward}
_SWIGLU: dict[str, Function] = {ENGINE: _activate, "eager": _eager_swiglu}
_SWIGLU_BACKWARD: dict[str, Function] = {ENGINE: _activation_backward, "eager": _eager_swiglu_backward}
_OUTPUT: dict[str, Function] = {ENGINE: _output, "eager": _eager_output}
_LINEAR_BEFORE_GELU: dict[str, Function] = {ENGINE: _linear, "eager": _eager_linear}
