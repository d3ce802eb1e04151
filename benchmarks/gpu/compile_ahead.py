"""Compile kernels on all cores before they are needed, into Triton's cache on disk.

The processes hold no GPU: under `compile_only` a launch compiles and nothing runs, so tensors stay on the CPU and
may be small. Every process makes the calls, each beginning with another one; whoever meets a kernel's variant first
claims and compiles it.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from fedra_engine.runtime.exit_codes import die_with_parent

COMPILED = "kernels compiled in this stage"


@dataclass(frozen=True)
class PreparedCall:
    """A call of ops on CPU tensors, by name: `prepare` makes its inputs and returns the call, which alone compiles."""

    name: str
    prepare: Callable[[], Callable[[], object]]


@dataclass(frozen=True)
class Compiled:
    """What became of the calls: kernels compiled by all processes, and what failed, each in one line."""

    kernels: int
    failures: tuple[str, ...]
    finished: bool


class CompileAhead:
    """Processes that compile while this one does something else."""

    def __init__(
        self,
        make: Callable[[], Sequence[PreparedCall]],
        architecture: str,
        *,
        processes: int,
        method: str,
        launchers: bool = False,
    ) -> None:
        """Start `processes`, each of which makes its own calls.

        By the `method` "fork" (this process must not have used a GPU) or "spawn". `launchers` says whether to build the
        host code that launches each kernel, too (`benchmarks.kernels.aot.build_launcher`): needs an NVIDIA driver.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="claims-"))
        context: Any = multiprocessing.get_context(method)
        # Processes that start anew read it when they import Triton; an interpreter compiles nothing.
        interpreted = os.environ.pop("TRITON_INTERPRET", None) if method == "spawn" else None
        self._processes = [
            context.Process(
                target=_work, args=(make, architecture, self._folder, number, processes, launchers), daemon=True
            )
            for number in range(processes)
        ]
        for process in self._processes:
            process.start()
        if interpreted is not None:
            os.environ["TRITON_INTERPRET"] = interpreted

    def wait(self, seconds: float) -> Compiled:
        """Wait at most so long, then end the processes."""
        end = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(end - time.monotonic(), 0.0))
        finished = all(process.exitcode == 0 for process in self._processes)
        for process in self._processes:
            process.kill()
            process.join()
        kernels = len(list(self._folder.glob("*.compiled")))
        failures = {path.read_text() for path in self._folder.glob("*.failed")}
        shutil.rmtree(self._folder, ignore_errors=True)
        return Compiled(kernels, tuple(sorted(failures)), finished)


def usable_processes() -> int:
    """A process on every core but two, for this one and the system."""
    return max(len(os.sched_getaffinity(0)) - 2, 1)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Collect the names of the kernels that are compiled meanwhile in this process, not found in a cache."""
    names: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            names.append(src.name)

    previous, triton.knobs.compilation.listener = triton.knobs.compilation.listener, listen
    try:
        yield names
    finally:
        triton.knobs.compilation.listener = previous


def _work(
    make: Callable[[], Sequence[PreparedCall]],
    architecture: str,
    claims: Path,
    number: int,
    processes: int,
    launchers: bool,
) -> None:
    from benchmarks.kernels.aot import compile_only

    die_with_parent()
    triton.knobs.runtime.jit_cache_hook = lambda **about: not _claim(claims, about)
    calls = make()
    start = number * len(calls) // processes
    launchable: set[Any] = set()
    with compilations() as compiled:
        for index in range(start, start + len(calls)):
            call = calls[index % len(calls)]
            # Another process has already compiled this call's kernels.
            made = claims / f"{index % len(calls)}.made"
            if made.exists():
                continue
            # A call that cannot be compiled costs the others nothing.
            with _failures_told(claims, call.name):
                run = call.prepare()
                with compile_only(architecture) as compilation:
                    run()
                made.touch()
                if launchers:
                    _build_launchers(claims, compilation.kernels, launchable)
            for count in range(len(compiled)):
                (claims / f"{number}-{count}.compiled").touch()
    sys.stdout.flush()


def _build_launchers(claims: Path, kernels: Sequence[tuple[str, Any]], built: set[Any]) -> None:
    """Build the launcher of every kernel that is not in `built` yet; those of other processes' kernels are theirs."""
    from benchmarks.kernels.aot import build_launcher

    for name, kernel in kernels:
        if kernel is None or kernel in built:
            continue
        built.add(kernel)
        with _failures_told(claims, f"launcher of {name}"):
            build_launcher(kernel)


@contextmanager
def _failures_told(claims: Path, name: str) -> Iterator[None]:
    """Print an error's traceback, leave it in one line for `CompileAhead.wait`, and go on."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        text = f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        (claims / f"{hashlib.sha256(text.encode()).hexdigest()}.failed").write_text(text)


def _claim(claims: Path, about: dict[str, Any]) -> bool:
    """Whether this process is the first to meet a variant, and so compiles it."""
    variant = f"{about['repr']} {about['compile']['constants']} {about['key']}"
    try:
        (claims / hashlib.sha256(variant.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
