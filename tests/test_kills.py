"""A run that is killed, wherever that happens, goes on to end with the bits of one that was not."""

from __future__ import annotations

import builtins
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from transformers import ViTConfig, ViTForImageClassification

from fedra_engine.checkpoint import latest_checkpoint
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.sources import load_source
from fedra_engine.models.loading import resolve_model_path
from fedra_engine.reporting import partition_report
from fedra_engine.reporting.console import Reporter
from fedra_engine.run_request import parse_request
from fedra_engine.simulation import Simulation

FIRST = 40
"""File operations before each of which a run is killed; of the later ones, before every `STRIDE`th."""
STRIDE = 3
MOMENTS = 10
"""Times at which a run is killed whatever it is doing."""
OPERATIONS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate")
"""Audit events of what changes a folder, beside opening a file to write."""
SECONDS = 60


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two rounds of a tiny model whose server optimizer has a memory."""
    folder = tmp_path_factory.mktemp("vit")
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
    ViTForImageClassification(shape).save_pretrained(folder)
    shutil.copy(Path(resolve_model_path("digits_vit"), "preprocessor_config.json"), folder)
    return [
        "--rounds=2",
        "--evaluate_every=1",
        f"--model.path={folder}",
        "--data.domains=[clean]",
        "--data.clients_per_domain=2",
        "--clients.capacities=[2]",
        "--training.max_local_steps=2",
        "--server.optimizer=fedadam",
    ]


class Killer:
    """Counts operations on files below the working directory, and kills this process before, or in, the last one."""

    def __init__(self, last: int | None) -> None:
        self.count = 0
        self._last = last
        self._root = os.getcwd()
        self._open = io.open

    def watch(self) -> None:
        """Begin, for the rest of this process's life."""
        sys.addaudithook(self._see)
        io.open = builtins.open = self._opened  # type: ignore[assignment]
        fsync = os.fsync
        os.fsync = lambda descriptor: (self._next(), fsync(descriptor))[1]

    def _next(self) -> None:
        if self._is_last():
            os.kill(os.getpid(), signal.SIGKILL)

    def _is_last(self) -> bool:
        self.count += 1
        return self.count == self._last

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in OPERATIONS:
            return
        path = arguments[0]
        # What is below an open folder has a name only.
        if isinstance(path, str | Path) and os.path.join(self._root, path).startswith(self._root):
            self._next()

    def _opened(self, *arguments: Any, **options: Any) -> Any:
        file = self._open(*arguments, **options)
        # Of the log's many lines none matters; times of their own fall among them.
        if file.writable() and str(file.name).startswith(self._root) and not str(file.name).endswith("run.log"):
            write = file.write

            def cut_short(content: Any) -> int:
                if self._is_last():
                    write(content[: len(content) // 2])
                    file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
                return write(content)

            file.write = cut_short
        return file


class Runs:
    """Runs the experiment of some options in forked processes, each with the working directory `folder`."""

    def __init__(self, folder: Path, options: list[str], data: DomainData) -> None:
        self.folder = folder
        self._options = [*options, "--output_dir=.", "--name=run"]
        self._data = data

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def fork(self, *arguments: str, prepare: Callable[[], object] = lambda: None) -> int:
        """Run with these arguments, or as a new run, after `prepare`. Returns the exit code."""
        target = multiprocessing.get_context("fork").Process(target=self._execute, args=(arguments, prepare))
        target.start()
        target.join(SECONDS)
        if target.exitcode is None:
            target.kill()
        target.join()
        assert target.exitcode is not None
        return target.exitcode

    def finish(self) -> None:
        """Do what a user does after a kill: go on, or start again where there is nothing to go on with."""
        arguments = ["--resume=run"] if self.run.exists() else []
        assert self.fork(*arguments) == 0, (self.folder / "errors").read_text()

    def result(self) -> dict[str, object]:
        """What is to be equal to the last bit."""
        checkpoint = latest_checkpoint(self.run)
        assert checkpoint is not None
        records = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        for record in records:
            del record["seconds"]
        files = {path.name: path.read_bytes() for path in (self.run / "adapters").iterdir()}
        return {
            "round": checkpoint.round,
            "tensors": {name: tensor.numpy().tobytes() for name, tensor in checkpoint.tensors.items()},
            "metrics": records,
            "summary": json.loads((self.run / "summary.json").read_text()),
            "config": (self.run / "config.yaml").read_text(),
            "checkpoints": sorted(path.name for path in (self.run / "checkpoints").iterdir()),
            **files,
        }

    def _execute(self, arguments: tuple[str, ...], prepare: Callable[[], object]) -> None:
        os.chdir(self.folder)
        errors = os.open("errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(errors, 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - as long as the process
        prepare()
        request = parse_request(arguments or self._options, description="")
        with request.open_folder() as folder, Reporter(folder.log_file, Console(quiet=True)) as reporter:
            Simulation(request.config, folder, reporter, Accelerator(cpu=True), self._data).run()


@pytest.fixture(scope="module")
def data(options: list[str]) -> DomainData:
    """Read once, as reading takes longer than training."""
    config = parse_request(options, description="").config
    return load_source(config.data, config.seed)


@pytest.fixture(autouse=True)
def _quick_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition_report, "plot_partition", lambda counts, file: file.write_bytes(b"plot"))


def test_a_run_killed_anywhere_goes_on_to_the_same_bits(
    tmp_path: Path, options: list[str], data: DomainData
) -> None:
    def runs(name: str) -> Runs:
        (tmp_path / name).mkdir()
        return Runs(tmp_path / name, options, data)

    whole = runs("whole")
    started = time.monotonic()
    assert whole.fork() == 0, (whole.folder / "errors").read_text()
    seconds = time.monotonic() - started
    expected = whole.result()
    last, ended = 1, False
    while not ended:
        killed = runs(f"operation_{last}")
        code = killed.fork(prepare=Killer(last).watch)
        ended = code == 0
        assert ended or code == -signal.SIGKILL, (killed.folder / "errors").read_text()
        if not ended:
            killed.finish()
        assert killed.result() == expected, f"killed before operation {last}"
        last += 1 if last < FIRST else STRIDE
    assert last > FIRST
    print(last, seconds, time.monotonic()-started)
