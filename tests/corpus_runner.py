"""Runs launchers on malformed input, each in a fork of one process that has done the slow imports.

As a script it reads one JSON object a line ({launcher, arguments, folder, home, stderr}) and answers with the exit
code; one of `STOPPED` where a launcher took longer than `SECONDS`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = ROOT / "launchers"
SECONDS = 10
"""Of the processor; a machine may be busy with other tests. Who only waits has `_PATIENCE` times as long."""
_PATIENCE = 3
STOPPED = (-signal.SIGALRM, -signal.SIGXCPU)
_MEMORY = 12 << 30
"""Bytes of address space, of which libraries reserve some; input that expands without end fails instead of taking
the machine down."""


class CorpusRunner:
    """The process with the imports."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        # Clean of what other tests left in this process: threads, which a fork does not have, and settings.
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )

    def run(self, launcher: str, arguments: list[str], folder: Path, home: Path) -> tuple[int, str]:
        """Run a launcher in `folder`. Returns its exit code and what it wrote on stderr."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        stderr = home / "stderr.txt"
        job = {"launcher": launcher, "arguments": arguments, "folder": str(folder), "home": str(home)}
        print(json.dumps(job | {"stderr": str(stderr)}), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        return code, stderr.read_text(errors="replace")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _serve() -> None:
    # What the launchers import after they have read their options.
    import datasets  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    import fedra_engine.commands.dry_run
    import fedra_engine.simulation
    import fedra_engine.studies.compare
    import fedra_engine.studies.scale  # noqa: F401

    # Forks need not touch, and so copy, what will not be collected.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_run(job))
        _, status = os.waitpid(child, 0)
        # Processes of its own that it left behind, if any.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(job: dict[str, Any]) -> int:
    """Run the launcher as the shell does, in this process. Returns its exit code."""
    os.setsid()
    os.chdir(job["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(job["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.environ |= {"HOME": job["home"], "XDG_CACHE_HOME": job["home"], "HF_HOME": job["home"]}
    file = str(LAUNCHERS / f"{job['launcher']}.py")
    sys.argv = [file, *job["arguments"]]
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    signal.alarm(_PATIENCE * SECONDS)
    code: Any = 0
    try:
        runpy.run_path(file, run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else 1


if __name__ == "__main__":
    _serve()
