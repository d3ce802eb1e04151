"""Keeps modules that no run uses out of a command's process: half of what its start takes (`fedra bench start`).

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
from functools import partial, wraps
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from inspect import isfunction
from threading import RLock
from types import ModuleType
from typing import Any

_TORCH = "2.13."
"""What is left out depends on what torch imports of itself."""


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import torch, transformers and what is built on them inside; no more than once, in the process of a command.

    A process of a job of several, or of DeepSpeed's, imports everything; so does one with another torch than this has
    been tried with, or with one that is built for GPUs.
    """
    gc.disable()
    try:
        if _is_alone() and _knows_torch():
            import_compiler_late()
            _leave_out_of_transformers()
        yield
    finally:
        # Modules stay, so the garbage collector need not look through them again and again.
        gc.freeze()
        gc.enable()


def _is_alone() -> bool:
    sharded = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    return os.environ.get("WORLD_SIZE", "1") == "1" and not sharded


def _knows_torch() -> bool:
    import torch

    built_for_gpus = torch.version.cuda is not None or torch.version.hip is not None
    return torch.__version__.startswith(_TORCH) and not built_for_gpus


def import_compiler_late() -> None:
    """Replace torch's compiler and symbolic shapes, unless they are imported, by modules that load when they are used.

    A few of their functions are answered without loading, and mean the same once all is loaded. Importing
    transformers' models and training them needs no others.
    """
    import torch.fx.experimental

    for package, name, substitutes in (
        (torch, "_dynamo", _COMPILER),
        (torch.fx.experimental, "symbolic_shapes", _SHAPES),
    ):
        full = f"{package.__name__}.{name}"
        if full in sys.modules:
            continue
        spec = find_spec(full)
        assert spec is not None
        module: Any = module_from_spec(spec)
        module.__class__ = _LateModule
        vars(module)["substitutes_"] = substitutes
        sys.modules[full] = vars(package)[name] = module
        if name == "_dynamo":
            # The only one of its modules that transformers needs, and one that needs none of the others.
            import_module("torch._dynamo._trace_wrapped_higher_order_op")
            if not _is_loaded(module):
                del module.__path__


def _leave_out_of_transformers() -> None:
    """Let transformers' availability checks say, from now on, that torch.distributed and scipy are not there.

    It remembers the first answer of a check. Its sharding would import torch.distributed.tensor, and this sympy.
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


class _LateModule(ModuleType):
    """A module before it is loaded, of which only `substitutes_`, functions, can be used without loading it."""

    substitutes_: dict[str, Callable[..., Any]]

    def __getattr__(self, name: str) -> Any:
        # What looks at all modules, such as `inspect`, asks for these. A module inside needs `__path__`.
        if name.startswith("__") and (name != "__path__" or _search_path(self) is None):
            raise AttributeError(name)
        if name in self.substitutes_:
            return self.substitutes_[name]
        return getattr(_loaded(self), name)


_LOCK = RLock()
_ALLOWED = list[Callable[..., Any]]()
"""What has been given to `allow_in_graph` before the compiler is loaded."""


def _loaded(module: ModuleType) -> ModuleType:
    """The module after it has been loaded, if it was not. Another thread waits until all is loaded."""
    with _LOCK:
        if type(module) is _LateModule:
            # From here on, what a module that is imported meanwhile misses is an error, as in any circular import.
            module.__class__ = ModuleType  # type: ignore[assignment]
            if (path := _search_path(module)) is not None:
                module.__path__ = path
            assert module.__spec__ is not None
            assert module.__spec__.loader is not None
            module.__spec__.loader.exec_module(module)
            if vars(module).pop("substitutes_") is _COMPILER:
                for function in _ALLOWED:
                    module.allow_in_graph(function)
    return module


def _search_path(module: ModuleType) -> list[str] | None:
    """Where the modules inside `module` are; None if it is no package."""
    return None if module.__spec__ is None else module.__spec__.submodule_search_locations


def _is_loaded(module: ModuleType) -> bool:
    return "substitutes_" not in vars(module)


def _assume_constant_result(function: Any) -> Any:
    # The mark by which the compiler knows such functions.
    function._dynamo_marked_constant = True
    return function


def _allow_in_graph(function: Any) -> Any:
    _ALLOWED.append(function)
    return function


def _disable(function: Any = None, recursive: bool = True, **options: Any) -> Any:
    compiler = sys.modules["torch._dynamo"]
    if function is None:
        return partial(_disable, recursive=recursive, **options)
    if not isfunction(function):
        return _loaded(compiler).disable(function, recursive, **options)
    disabled: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        # Nothing is compiled before the compiler is loaded.
        if not _is_loaded(compiler):
            return function(*arguments, **named)
        if not disabled:
            disabled.append(compiler.disable(function, recursive, **options))
        return disabled[0](*arguments, **named)

    return call


def _expect_true(condition: Any) -> Any:
    return condition if type(condition) is bool else _loaded(_shapes()).expect_true(condition)


def _is_nested_int(size: Any) -> Any:
    return False if type(size) is int else _loaded(_shapes()).is_nested_int(size)


def _shapes() -> ModuleType:
    return sys.modules["torch.fx.experimental.symbolic_shapes"]


_COMPILER: dict[str, Callable[..., Any]] = {
    "assume_constant_result": _assume_constant_result,
    "allow_in_graph": _allow_in_graph,
    "disable": _disable,
}
_SHAPES: dict[str, Callable[..., Any]] = {"expect_true": _expect_true, "is_nested_int": _is_nested_int}
