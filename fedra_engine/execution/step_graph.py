"""Local steps as CUDA graphs: what a step launches is captured once, and launched again by one call.

On a GPU, a step of small models or few images takes as long as the host needs to launch its hundreds of kernels. Steps
of the same clients with batches of the same sizes launch the same kernels at the same addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Protocol

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from fedra_engine.data.samples import Batch
from fedra_engine.runtime.errors import InputError, one_line

FEWEST_STEPS = 4
"""Steps that must be left for a capture, which costs the host about as much as two steps. Nothing has been measured."""


class GraphCapture(Protocol):
    """Captures the steps of one round."""

    def stream(self) -> AbstractContextManager[None]:
        """Run all steps of the round inside, captured or not.

        They come after what was launched before, and before what is launched later.
        """

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Capture what `step` launches, without running it; the result runs it.

        `step` must wait for nothing and copy nothing from the host. Graphs captured earlier must not run any more.
        """


def require_graphs(device: torch.device) -> None:
    """Raise InputError unless steps on `device` can be captured."""
    if device.type != "cuda":
        raise InputError(f"execution.cuda_graphs: found on with the device {device}, expected off")


class CudaGraphCapture(GraphCapture):
    """Captures on a CUDA device. The graphs share the memory of their steps, as only the newest of them runs."""

    def __init__(self, device: torch.device) -> None:
        """Raises InputError on another device."""
        require_graphs(device)
        self._stream = torch.cuda.Stream(device)
        self._newest: torch.cuda.CUDAGraph | None = None

    @contextmanager
    def stream(self) -> Iterator[None]:
        # One stream for all, since the libraries' workspaces and autograd's nodes belong to a stream: those that a step
        # made must be there for a capture.
        outer = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outer.wait_stream(self._stream)

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        # Not `torch.cuda.graph`, which gives back all cached memory at every capture, also the page-locked memory: each
        # is then asked for anew, while the GPU waits.
        graph, pool = torch.cuda.CUDAGraph(), None
        if self._newest is None:
            # What the steps before have cached is of no use to a capture.
            torch.cuda.synchronize(self._stream.device)
            torch.cuda.empty_cache()
        else:
            # A pool ends with the last of its graphs.
            pool = self._newest.pool()
        graph.capture_begin(pool=pool)
        try:
            step()
        except BaseException:
            # The reason, such as too little memory, and not that the capture has failed.
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
        self._newest = graph
        return graph.replay


class RepeatedStep:
    """A local step of the same clients, run on batches of the same shapes."""

    def __init__(self, train: Callable[[Batch], None], times: int, capture: GraphCapture | None) -> None:
        """`train` trains on a batch, and runs `times` times.

        With `capture`, it runs as it is once, which compiles kernels and makes tables, and is captured then if at least
        `FEWEST_STEPS` are left.
        """
        self._train = train
        self._left = times
        self._capture = capture
        self._inputs: Batch | None = None
        """The batch that is captured, into which others are copied."""
        self._replay: Callable[[], None] | None = None

    def run(self, batch: Batch) -> None:
        """Train on `batch`.

        Raises:
            InputError: the step cannot be captured.
        """
        if self._capture is None:
            self._train(batch)
            return
        with self._capture.stream():
            self._run(batch, self._capture)

    def _run(self, batch: Batch, capture: GraphCapture) -> None:
        left, self._left = self._left, self._left - 1
        if self._inputs is None or (self._replay is None and left < FEWEST_STEPS):
            self._inputs = batch
            self._train(batch)
            return
        for mine, other in zip(_tensors(self._inputs), _tensors(batch), strict=True):
            mine.copy_(other)
        if self._replay is None:
            try:
                self._replay = capture.capture(partial(self._train, self._inputs))
            except RuntimeError as error:
                if should_reduce_batch_size(error):
                    raise
                raise InputError(
                    f"execution.cuda_graphs: found a local step that cannot be captured ({one_line(error)}), "
                    "expected off"
                ) from error
        self._replay()


def _tensors(batch: Batch) -> list[Tensor]:
    return [*batch.inputs.values(), batch.labels]
