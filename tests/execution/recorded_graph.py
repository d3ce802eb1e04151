"""A stand-in for CUDA graphs on a CPU: the ops of a step, with their tensors, which run again without its Python.

As with a graph, a capture changes no values, a replay reads and writes the same memory each time, and what Python
computed in the capture stays as it was then.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

Call = tuple[Callable[..., Any], Any, Any, Any]
"""A function, its arguments, and what it returned in the capture."""


class RecordedGraph(TorchDispatchMode):
    """Records the ops inside, and undoes at the end what they wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = [value for value, argument in _given(func, args, kwargs or {}) if _writes(argument)]
        return self.call(func, args, kwargs or {}, written)

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any, written: Any) -> Any:
        """Call a function and record the call; `written` are the tensors that it writes to."""
        with _disable_current_modes():
            for tensor in _tensors(written):
                whole = tensor.detach().new_empty(0).set_(tensor.untyped_storage())
                self._before.setdefault(whole.data_ptr(), (whole, whole.clone()))
            result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        return result

    def restore(self) -> None:
        """Give everything that was written to its values from before."""
        for whole, values in self._before.values():
            whole.copy_(values)

    @torch.no_grad()
    def replay(self) -> None:
        """Make all calls again, and put their results where they were in the capture."""
        for function, args, kwargs, result in self.calls:
            for mine, found in zip(_tensors(result), _tensors(function(*args, **kwargs)), strict=True):
                if mine.data_ptr() != found.data_ptr():
                    mine.copy_(found)


class RecordedCapture:
    """Captures steps as `RecordedGraph`.

    Attributes:
        replays: of each graph, how often it ran.
        between: called with the inputs of a captured step after each of its runs.
    """

    def __init__(self, between: Callable[[list[Tensor]], None] = lambda inputs: None) -> None:
        self.replays: list[int] = []
        self.between = between

    def stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def capture(self, step: Any) -> Callable[[], None]:
        graph, number = RecordedGraph(), len(self.replays)
        with graph:
            step()
        graph.restore()
        self.replays.append(0)

        def replay() -> None:
            # Graphs share their memory, so only the newest may run.
            assert number == len(self.replays) - 1
            self.replays[number] += 1
            graph.replay()
            self.between(_tensors(step.args[0]))

        return replay


def as_one_op(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that reads values of its tensors on a CPU, but is one launch on a GPU, as one call in a graph.

    It may write to all its tensors.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        mode = torch.utils._python_dispatch._get_current_dispatch_mode()
        if isinstance(mode, RecordedGraph):
            return mode.call(function, args, kwargs, (args, kwargs))
        return function(*args, **kwargs)

    return call


def _given(func: Any, args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    """The arguments that an op was given, with what its schema says of them."""
    arguments = func._schema.arguments
    named = {argument.name: argument for argument in arguments}
    return [*zip(args, arguments, strict=False), *((value, named[name]) for name, value in kwargs.items())]


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
