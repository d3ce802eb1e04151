"""Keeps what is never used out of a process that imports torch and transformers: half of what a run's start takes.

Only for the processes of this package's commands: what a program of the user's imports is not changed. What is left out
can still be used, in every way but one: transformers' own sharding and losses of object detection, which the engine
has no use for, are told that torch.distributed and scipy are not there.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec
from inspect import isfunction
from threading import RLock
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import torch, transformers and what is built on them inside; no more than once, in the process of a command.

    A process of a job of several, or of DeepSpeed's, imports everything.
    """
    gc.disable()
    try:
        if os.environ.get("WORLD_SIZE", "1") == "1" and "ACCELERATE_USE_DEEPSPEED" not in os.environ:
            import_compiler_late()
            _leave_out_of_transformers()
        yield
    finally:
        # Modules stay, so the garbage collector need not look through them again and again.
        gc.freeze()
        gc.enable()


def import_compiler_late() -> None:
    """Let `torch._dynamo`, unless it is imported already, be a module that is loaded when it is first used.

    Its three decorators for functions that are not to be compiled, or not as others are, work without loading it, and
    mean the same once it is loaded. Importing transformers' models needs no more.
    """
    if _COMPILER in sys.modules:
        return
    import torch

    spec = find_spec(_COMPILER)
    assert spec is not None
    module = module_from_spec(spec)
    module.__class__ = _LateCompiler
    sys.modules[_COMPILER] = module
    vars(torch)["_dynamo"] = module


def _leave_out_of_transformers() -> None:
    """Let transformers' availability checks say, from now on, that torch.distributed and scipy are not there.

    It keeps the first answer of a check. Its sharding would import torch.distributed.tensor and so sympy.
    """
    if "transformers.modeling_utils" in sys.modules:
        return
    import torch
    from transformers.utils import is_scipy_available, is_torch_distributed_available

    scipy, available = sys.modules.get("scipy"), torch.distributed.is_available
    # An entry that is None means that there is no such module.
    sys.modules["scipy"] = None  # type: ignore[assignment]
    torch.distributed.is_available = lambda: False
    try:
        for check in (is_scipy_available, is_torch_distributed_available):
            check.cache_clear()
            check()
    finally:
        torch.distributed.is_available = available
        del sys.modules["scipy"]
        if scipy is not None:
            sys.modules["scipy"] = scipy


class _LateCompiler(ModuleType):
    """`torch._dynamo` before it is loaded: a package whose modules can be imported, and three decorators."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if (decorator := _DECORATORS.get(name)) is not None and not _Loading.begun:
            return decorator
        _load(self)
        return getattr(self, name)


class _Loading:
    """The functions to tell the compiler of when it is loaded."""

    lock = RLock()
    begun = False
    allowed = list[Callable[..., Any]]()


def _load(module: ModuleType) -> None:
    # Another thread waits until all is loaded.
    with _Loading.lock:
        if _Loading.begun:
            return
        _Loading.begun = True
        spec = module.__spec__
        assert spec is not None and spec.loader is not None
        # From here on, what a module that is imported meanwhile misses is an error, as in any circular import.
        module.__class__ = ModuleType
        spec.loader.exec_module(module)
        for function in _Loading.allowed:
            module.allow_in_graph(function)


def _assume_constant_result(function: Any) -> Any:
    # The mark by which the compiler knows such functions.
    function._dynamo_marked_constant = True
    return function


def _allow_in_graph(function: Any) -> Any:
    _Loading.allowed.append(function)
    return function


def _disable(function: Any = None, recursive: bool = True, **options: Any) -> Any:
    from torch._compile import _disable_dynamo

    if (function is None or isfunction(function)) and "wrapping" not in options:
        # The same, but torch uses this one in its own modules, as it loads the compiler at the first call.
        return _disable_dynamo(function, recursive)
    module = sys.modules[_COMPILER]
    _load(module)
    return module.disable(function, recursive, **options)


_DECORATORS = {
    "assume_constant_result": _assume_constant_result,
    "allow_in_graph": _allow_in_graph,
    "disable": _disable,
}
