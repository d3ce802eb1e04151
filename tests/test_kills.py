"""A run that is killed, wherever that happens, goes on to end with the bits of one that was not."""

from __future__ import annotations

import builtins
import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import ViTConfig, ViTForImageClassification

from fedra_engine import run as run_module
from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.callbacks.saved_rounds import load_newest_intact
from fedra_engine.config import ExperimentConfig
from fedra_engine.experiment import build_experiment
from fedra_engine.models.loading import resolve_model_path
from fedra_engine.run import run
from fedra_engine.runtime.exit_codes import exit_code
from fedra_engine.runtime.tables import PlainConsole
from tests.running import small_config

pytestmark = pytest.mark.slow

FIRST = 40
"""File operations before each of which a run is killed; of the later ones, before every `STRIDE`th."""
STRIDE = 3
EVERY = 8
"""Of the operations, so many lie between two at which the disk begins to fail."""
MOMENTS = 10
"""Times at which a run is killed whatever it is doing."""
OPERATIONS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate")
"""Audit events of what changes a folder, beside opening a file to write."""
SECONDS = 60


@pytest.fixture
def config(tmp_path: Path) -> ExperimentConfig:
    """Up to 3 rounds of a tiny model whose server optimizer has a memory; its `run` is in the working directory."""
    shape = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=10,
    )
    torch.manual_seed(0)
    model = tmp_path / "vit"
    ViTForImageClassification(shape).save_pretrained(model)
    shutil.copy(Path(resolve_model_path("digits_vit"), "preprocessor_config.json"), model)
    return small_config(
        Path(),
        rounds=3,
        evaluate_every=1,
        keep_best="test_loss",
        early_stopping={"patience": 1},
        model={"path": str(model)},
        data={"domains": ["clean"], "clients_per_domain": 2, "validation_fraction": 0.2},
        clients={"capacities": [2]},
        server={"optimizer": "fedadam"},
    )


class Fault:
    """Counts operations on files below the working directory, and has the one of a number go wrong."""

    def __init__(self, number: int, *, log: bool) -> None:
        """Operation `number`, from 1; lines of `run.log` count only with `log`."""
        self._number = number
        self._log = log
        self._count = 0
        self._root = ""
        self._open = io.open
        self._fsync = os.fsync

    def go_wrong(self, event: str) -> None:
        """Called before the operation, or half-way through it where it writes."""
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Begin, for the rest of this process's life."""
        self._root = os.getcwd()
        sys.addaudithook(self._see)
        io.open = builtins.open = self._opened  # type: ignore[assignment]
        os.fsync = self._synced

    def _due(self) -> bool:
        self._count += 1
        return self._count == self._number

    def _next(self, event: str) -> None:
        if self._due():
            self.go_wrong(event)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in OPERATIONS:
            return
        path = arguments[0]
        # What is below an open folder has a name only.
        if isinstance(path, str | Path) and os.path.join(self._root, path).startswith(self._root):
            self._next(event)

    def _synced(self, descriptor: int) -> None:
        self._next("fsync")
        self._fsync(descriptor)

    def _opened(self, *arguments: Any, **options: Any) -> Any:
        file = self._open(*arguments, **options)
        name = str(file.name)
        if file.writable() and name.startswith(self._root) and (self._log or not name.endswith("run.log")):
            write = file.write

            def cut_short(content: Any) -> int:
                if self._due():
                    write(content[: len(content) // 2])
                    file.flush()
                    self.go_wrong("write")
                return write(content)

            file.write = cut_short
        return file


class Disk(Fault):
    """From some operation on, the disk is full, or can only be read."""

    def __init__(self, number: int, error: int) -> None:
        super().__init__(number, log=True)
        self._error = error

    def _due(self) -> bool:
        super()._due()
        return self._count >= self._number

    def go_wrong(self, event: str) -> None:
        """Raise OSError, but for what a full disk can still do."""
        if self._error != errno.ENOSPC or event not in ("os.remove", "os.rmdir", "os.chmod"):
            raise OSError(self._error, os.strerror(self._error))


class Runs:
    """Runs an experiment in forked processes, each with the working directory `folder`."""

    def __init__(self, folder: Path, config: ExperimentConfig) -> None:
        folder.mkdir()
        self.folder = folder
        self._config = config

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def begin(self, prepare: Callable[[], object] = lambda: None) -> int:
        """Begin the run after `prepare`, or go on with what there is of it. Returns the exit code."""
        process = multiprocessing.get_context("fork").Process(target=self._execute, args=(prepare,))
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
        assert process.exitcode is not None
        return process.exitcode

    def finish(self) -> None:
        """Do what a user does after a kill, and expect no complaint."""
        assert self.begin() == 0, self.errors()

    def errors(self) -> str:
        """What the last process wrote to stderr."""
        return (self.folder / "errors").read_text()

    def result(self) -> dict[str, object]:
        """What is to be equal to the last bit."""
        checkpoint = load_newest_intact(self.run)
        assert checkpoint is not None
        records = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        for record in records:
            del record["seconds"]
        return {
            "config": (self.run / "config.yaml").read_text(),
            "metrics": records,
            "summary": json.loads((self.run / "summary.json").read_text()),
            "round": checkpoint.round,
            "tensors": {name: tensor.numpy().tobytes() for name, tensor in checkpoint.tensors.items()},
            "files": sorted(str(path.relative_to(self.run)) for path in self.run.rglob("*")),
            "adapters": {path.name: path.read_bytes() for path in (self.run / "adapters").iterdir()},
            "best": {path.name: path.read_bytes() for path in self.run.glob("best/*/*") if path.name != "state.json"},
        }

    def _execute(self, prepare: Callable[[], object]) -> None:
        os.chdir(self.folder)
        errors = os.open("errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(errors, 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - as long as the process
        prepare()

        def main() -> None:
            earlier = RunFolder.open("run") if self.run.exists() else None
            run(self._config, earlier, accelerator=Accelerator(cpu=True), console=PlainConsole(quiet=True))

        # An exception that is none of the expected ends the process with 1, too, but not with one line.
        os._exit(exit_code(main))


@pytest.fixture
def start(
    tmp_path: Path, config: ExperimentConfig, quick_runs: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Runs]:
    """A function that makes `Runs` in a new folder of a name.

    What takes the time of so short a run, and changes no file, happens once: forked processes have copies of it.
    """
    experiment = build_experiment(config, torch.device("cpu"))
    monkeypatch.setattr(run_module, "build_experiment", lambda *_: experiment)
    return lambda name: Runs(tmp_path / name, config)


def test_a_run_killed_anywhere_goes_on_to_the_same_bits(start: Callable[[str], Runs]) -> None:
    whole = start("whole")
    started = time.monotonic()
    whole.finish()
    seconds = time.monotonic() - started
    expected = whole.result()

    def kill(name: str, prepare: Callable[[], object]) -> bool:
        """Kill a run, and finish it. Returns whether it did not end before."""
        killed = start(name)
        code = killed.begin(prepare)
        assert code in (0, -signal.SIGKILL, -signal.SIGALRM), killed.errors()
        if code != 0:
            killed.finish()
        assert killed.result() == expected, f"killed at {name}"
        return code != 0

    operation = 1
    while kill(f"operation_{operation}", Fault(operation, log=False).watch):
        operation += 1 if operation < FIRST else STRIDE
    assert operation > FIRST
    # The signal's own action ends the process at once.
    kills = [
        kill(f"moment_{moment}", partial(signal.setitimer, signal.ITIMER_REAL, seconds * (moment + 1) / (MOMENTS + 1)))
        for moment in range(MOMENTS)
    ]
    assert any(kills)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS], ids=["full", "read_only"])
def test_a_disk_that_fails_is_one_line_and_the_run_goes_on_later_to_the_same_bits(
    error: int, start: Callable[[str], Runs]
) -> None:
    whole = start("whole")
    whole.finish()
    expected = whole.result()
    operation, told = 1, set[str]()
    while (failed := start(f"operation_{operation}")).begin(Disk(operation, error).watch) != 0:
        said = failed.errors()
        assert said.startswith("error: "), said
        assert said.count("\n") == 1, said
        assert os.strerror(error).lower() in said.lower(), said
        told.add(Path(said.removeprefix("error: ").partition(":")[0]).name)
        failed.finish()
        assert failed.result() == expected, f"failed at operation {operation}"
        operation += EVERY
    assert {"output_dir", "run.log", "adapters"} <= told
