"""The processes of a job and their collective operations.

The module `launch` or a launcher (`torchrun`, `accelerate launch`) starts the processes, accelerate finds them, and
torch.distributed connects them, by gloo between CPUs and nccl between GPUs. All processes must make the same calls in
the same order.
"""

from __future__ import annotations

import atexit
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fedra_engine.runtime.errors import InputError, ProcessLostError, count_of, one_line

if TYPE_CHECKING:
    from accelerate import Accelerator

Value = TypeVar("Value")

TIMEOUT = timedelta(hours=1)
"""How long a process waits for another one that hangs (one that died is noticed at once); longer than the slowest
process can be behind the fastest."""
_LARGE = 2**25
"""Tensors of at least so many bytes are sent one by one; smaller ones are concatenated."""


def join_job() -> Accelerator:
    """Join the other processes of the job, if a launcher started any, and choose this process's device and threads."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    # Threads of torch.distributed crash a process that ends while they run.
    atexit.register(_leave_job)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not launched_with_deepspeed():
        return Accelerator()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Without a GPU, accelerate does not connect the processes unless it is told to use the CPU.
    cpu, threads = _use_cpu(), max(1, min(torch.get_num_threads(), _cores() // local))
    if not cpu:
        check_places(local, oversubscribe=True)
    try:
        with _raising_process_lost(), warnings.catch_warnings():
            # Without OMP_NUM_THREADS, accelerate takes this machine's cores for those that this process may use.
            warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")
            accelerator = Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)])
    except AttributeError as error:
        # Set by accelerate's launcher; accelerate does not check the file's structure.
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if file is None:
            raise
        raise InputError(
            f"accelerate: found no fields in {file}, or in a section of it, where it looks for some "
            f"({one_line(error)}), expected a DeepSpeed configuration"
        ) from error
    except (ImportError, ValueError) as error:
        raise InputError(
            f"accelerate: found a job that it cannot set up ({one_line(error)}); check the launcher's settings"
        ) from error
    if cpu:
        torch.set_num_threads(threads)
    return accelerator


def check_places(processes: int, threads: int = 1, *, oversubscribe: bool = False) -> None:
    """Raise InputError unless each of `processes` has a core for each thread and, if GPUs are used, a GPU.

    With `oversubscribe` they may share cores, but not GPUs.
    """
    if not _use_cpu() and processes > torch.cuda.device_count():
        gpus = count_of(torch.cuda.device_count(), "GPU")
        raise InputError(
            f"processes: found {processes} on a machine with {gpus}, expected at most one for "
            "each GPU (ACCELERATE_USE_CPU=true runs them on the CPU)"
        )
    if not oversubscribe:
        check_cores("processes", processes, threads, " (--oversubscribe true lets processes share cores)")


def check_cores(option: str, count: int, threads: int = 1, advice: str = "") -> None:
    """Raise InputError unless this process may use a core for each of the `threads` of `count` processes."""
    if count * threads > _cores():
        each = f" with {threads} threads each" if threads > 1 else ""
        cores = count_of(_cores(), "core")
        raise InputError(f"{option}: found {count}{each}, expected no more than this machine's {cores}{advice}")


def _use_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" or not torch.cuda.is_available()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launched_with_deepspeed() -> bool:
    """Whether accelerate's launcher was told to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def _leave_job() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class Processes:
    """The processes of a job, seen from one of them."""

    def __init__(self, index: int, count: int, device: torch.device) -> None:
        """Process `index` of `count`, which exchanges tensors on `device`."""
        self.index = index
        self.count = count
        self._device = device
        self._raised_by_all: InputError | None = None

    @classmethod
    def alone(cls) -> Processes:
        """A job of one process."""
        return cls(0, 1, torch.device("cpu"))

    @classmethod
    def of(cls, accelerator: Accelerator) -> Processes:
        """The processes of an accelerate job."""
        return cls(accelerator.process_index, accelerator.num_processes, accelerator.device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and prints."""
        return self.index == 0

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over all processes, in place; the result is bitwise equal on all."""
        self._apply(tensors, dist.all_reduce)

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by that of the main process, in place."""
        self._apply(tensors, lambda tensor: dist.broadcast(tensor, src=0))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any process."""
        flags = torch.tensor([int(flag)])
        self.all_reduce_([flags])
        return bool(flags[0] > 0)

    def all_gather_object(self, value: Value) -> list[Value]:
        """`value` of every process, by index."""
        if self.count == 1:
            return [value]
        values: list[Value | None] = [None] * self.count
        with _raising_process_lost():
            dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def broadcast_object(self, value: Value) -> Value:
        """The main process's `value`."""
        if self.count == 1:
            return value
        values = [value if self.is_main else None]
        with _raising_process_lost():
            dist.broadcast_object_list(values, device=self._device)
        return values[0]  # type: ignore[return-value]

    @contextmanager
    def raise_on_all(self) -> Iterator[None]:
        """Raise an InputError of one process on all processes, at the end of the `with` block.

        Inside, processes must not wait for one another, except at the end of nested `raise_on_all` blocks.
        """
        if self.count == 1:
            yield
            return
        found: InputError | None = None
        try:
            yield
        except InputError as error:
            if error is self._raised_by_all:
                # From a nested block, so every process raises it.
                raise
            found = error
        if self.any(found is not None):
            messages = self.all_gather_object(None if found is None else str(found))
            self._raised_by_all = InputError(next(message for message in messages if message is not None))
            raise self._raised_by_all from found

    def _apply(self, tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
        """Apply an in-place `collective` to all tensors: large ones one by one, small ones of a dtype together."""
        if self.count == 1:
            return
        small: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            in_place = tensor.is_contiguous() and tensor.device.type == self._device.type
            if in_place and tensor.nbytes >= _LARGE:
                with _raising_process_lost():
                    collective(tensor)
            else:
                small[tensor.dtype].append(tensor)
        for of_type in small.values():
            flat = torch.cat([tensor.flatten().to(self._device) for tensor in of_type])
            with _raising_process_lost():
                collective(flat)
            for tensor, part in zip(of_type, flat.split([tensor.numel() for tensor in of_type]), strict=True):
                tensor.copy_(part.view(tensor.shape))


@contextmanager
def _raising_process_lost() -> Iterator[None]:
    """Turn torch.distributed's errors into `ProcessLostError`."""
    try:
        yield
    except RuntimeError as error:
        raise _lost_process(error) from error


def lost_process(error: RuntimeError) -> ProcessLostError | None:
    """The ProcessLostError for an `error` of torch.distributed, which DeepSpeed also calls directly; else None."""
    # gloo's errors have no type of their own, but name its source files.
    return _lost_process(error) if isinstance(error, dist.DistError) or "/gloo/" in str(error) else None


def _lost_process(error: RuntimeError) -> ProcessLostError:
    reason = str(error).partition("\n")[0]
    return ProcessLostError(
        f"another process of the job died, or did not answer within {TIMEOUT} ({reason}); the rounds in checkpoints/ "
        "are kept"
    )
