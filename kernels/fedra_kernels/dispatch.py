"""Which path an op takes, how its kernels are registered with torch, and how they are launched.

CUDA, ROCm and meta tensors take the Triton path; CPU tensors take torch, or Triton's interpreter where
TRITON_INTERPRET=1 was set before the import.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any, TypeVar, cast

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime import interpreter as triton_interpreter

Launcher = TypeVar("Launcher", bound=Callable[..., Any])

INTERPRETED: bool = triton.knobs.runtime.interpret

LIBRARY = torch.library.Library("fedra_kernels", "DEF")


class StandIn:
    """Takes the launches in place of a GPU: nothing runs, outputs stay as they were allocated, on the CPU."""

    def __init__(self, architecture: str) -> None:
        """`architecture` is the column of the configuration tables that the launches are made for."""
        self.architecture = architecture

    def take(self, kernel: Any, grid: tuple[int, ...], args: Sequence[Any], options: Mapping[str, Any]) -> None:
        """Do what is to be done with a launch."""


_stand_in: StandIn | None = None
_observers: list[Callable[[str], None]] = []


@contextmanager
def launches_taken_by(stand_in: StandIn) -> Iterator[None]:
    """Have `stand_in` take every launch; ops on CPU tensors take the Triton path."""
    global _stand_in
    previous, _stand_in = _stand_in, stand_in
    try:
        yield
    finally:
        _stand_in = previous


@contextmanager
def launches_observed_by(observer: Callable[[str], None]) -> Iterator[None]:
    """Call `observer` with the kernel's name at every launch, whoever takes it."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def use_triton(tensor: Tensor) -> bool:
    """Whether an op on this tensor runs its Triton kernels."""
    return tensor.device.type != "cpu" or INTERPRETED or _stand_in is not None


def nothing_runs(device: torch.device) -> bool:
    """Whether nothing is computed on a device, so that values mean nothing: a meta tensor has none, a stand-in's are
    as they were allocated."""
    return _stand_in is not None or device.type == "meta"


def architecture(device: torch.device) -> str:
    """The column of the configuration tables for a device."""
    if _stand_in is not None:
        return _stand_in.architecture
    if device.type != "cuda":
        return "interpreter"
    return _device_architecture(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _device_architecture(index: int) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(index)
    return {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get((major, minor), "small")


def dot_precision(tensor: Tensor) -> str:
    """How tl.dot treats fp32 operands, after torch's own switch; for other dtypes always the same: they ignore it."""
    on_gpu = tensor.is_cuda or _stand_in is not None
    exact = tensor.dtype != torch.float32 or not torch.backends.cuda.matmul.allow_tf32
    return "tf32" if on_gpu and not exact else "ieee"


def register(schema: str, fake: Callable[..., Any]) -> Callable[[Launcher], Launcher]:
    """Register a launcher as the torch.library op `fedra_kernels::<schema>` with a fake implementation."""
    name = schema.partition("(")[0]

    def decorate(launcher: Launcher) -> Launcher:
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, untraced(launcher), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fedra_kernels::{name}", fake, lib=LIBRARY)
        op: Launcher = getattr(torch.ops.fedra_kernels, name).default
        return op

    return decorate


def in_place(*_: Any) -> None:
    """The fake implementation of an op that returns nothing and only writes to its arguments."""


def untraced(launcher: Launcher) -> Launcher:
    """The launcher, or what calls it, which torch.compile must not trace when a compiled graph calls it."""
    disabled: list[Launcher] = []

    @wraps(launcher)
    def run(*args: Any) -> Any:
        # Loading dynamo takes seconds; where nothing is compiled it is not loaded.
        if "torch._dynamo" not in sys.modules:
            return launcher(*args)
        if not disabled:
            disabled.append(torch.compiler.disable(launcher))
        return disabled[0](*args)

    return cast(Launcher, run)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a Triton kernel on the device of its first tensor; an empty grid launches nothing."""
    if 0 in grid:
        return
    # Said aloud, so that an environment variable cannot change the numbers.
    options["enable_fp_fusion"] = True
    for observer in _observers:
        observer(kernel.fn.__name__)
    if _stand_in is not None:
        _stand_in.take(kernel, grid, args, options)
        return
    run = partial(kernel[grid], *args, **options)
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            run()
    else:
        run()


def _repair_interpreter() -> None:
    """Repair Triton's interpreter, which is silently wrong otherwise or fails.

    Versions 3.6 to 3.9 hold bf16 blocks as 16-bit integers, and `tl.dot` multiplies those integers. It also takes
    a BLAS product, which rounds a row differently at different places of a block, as no GPU does. Version 3.6 makes
    a loop bound that was loaded from memory with int(array of one element), which NumPy 2.4 refuses.
    """
    triton_interpreter.InterpreterBuilder.create_dot = _create_dot
    patch_tensor = triton_interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = _index

    triton_interpreter._patch_lang_tensor = patch_tensor_and_index


def _create_dot(_: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    left, right = (_widen(operand).astype(d.data.dtype, copy=False) for operand in (a, b))
    with np.errstate(all="ignore"):
        # Summed over an outer axis: one addition after the other, the same for every row and column.
        product = np.multiply(left[:, :, None], right[None, :, :]).sum(axis=1)
    return triton_interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _widen(handle: Any) -> np.ndarray:
    """The block in a dtype NumPy can multiply: bf16 is the upper half of fp32."""
    if handle.dtype.is_bf16():
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def _index(tensor: Any) -> int:
    return int(tensor.handle.data.item())


if INTERPRETED:
    _repair_interpreter()
