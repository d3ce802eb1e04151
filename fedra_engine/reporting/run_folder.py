"""The folder that a run leaves behind."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from fedra_engine.config import ExperimentConfig
from fedra_engine.errors import InputError
from fedra_engine.files import make_folders, whole_folder, write_whole, writing


class RunFolder:
    """`<output_dir>/<name>/`: config.yaml, run.log, metrics.jsonl, summary.json and what others add."""

    def __init__(self, path: Path) -> None:
        """For `create` and `open`."""
        self.path = path

    @classmethod
    def create(cls, config: ExperimentConfig) -> RunFolder:
        """A new folder with `config` in it.

        Raises:
            InputError: `config.name` is taken, or the folder cannot be made.
        """
        path = Path(config.output_dir) / (config.name or _default_name(config))
        for free in [path] if config.name is not None else _numbered(path):
            try:
                make_folders(free.parent)
                with whole_folder(free) as made:
                    cls(made).write_config(config)
            except FileExistsError as error:
                if error.filename != str(free):
                    raise _not_makable(free.parent, error) from error
            except OSError as error:
                raise _not_makable(free, error) from error
            else:
                return cls(free)
        raise InputError(f"name: found a run in {path}, expected a new name (or --resume {shlex.quote(str(path))})")

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of an earlier run.

        Raises:
            InputError: there is no run at `path`.
        """
        folder = cls(Path(path))
        if not folder.config_file.is_file():
            raise InputError(f"{path}: found no {folder.config_file.name}, expected the folder of an earlier run")
        return folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other commands from writing here; a lock goes with the process that holds it, however that ends.

        Raises:
            InputError: another command holds it.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(
                f"resume: found another process at work on {self.path}, expected a run that has ended or broken off"
            ) from error
        try:
            yield
        finally:
            lock.release()

    @property
    def config_file(self) -> Path:
        """The resolved configuration; `--config` with it repeats the experiment in a new folder."""
        return self.path / "config.yaml"

    @property
    def log_file(self) -> Path:
        """The run's output, with times."""
        return self.path / "run.log"

    @property
    def metrics_file(self) -> Path:
        """One JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        """The results, written at the end."""
        return self.path / "summary.json"

    def write_config(self, config: ExperimentConfig) -> None:
        """Write the resolved configuration, without the name, which is this folder's."""
        values = dataclasses.asdict(dataclasses.replace(config, name=None))
        write_whole(self.config_file, yaml.safe_dump(values, sort_keys=False))

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add a record; it is in the file when this returns."""
        with writing(self.metrics_file), self.metrics_file.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete records, oldest first; a line cut short by a crash does not count."""
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def rewind(self, last_round: int) -> None:
        """Forget the results and what was written of rounds after `last_round` (-1: all), as they will be repeated."""
        self.summary_file.unlink(missing_ok=True)
        for trace in self.path.glob("trace/round_*"):
            number = re.fullmatch(r"round_(\d+)", trace.name)
            if number and int(number[1]) > last_round:
                shutil.rmtree(trace)
        kept = [record for record in self.read_metrics() if record["round"] <= last_round]
        write_whole(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the results."""
        write_whole(self.summary_file, json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def discard(self) -> None:
        """Remove the folder and what is in it."""
        shutil.rmtree(self.path)


def make_folder(path: Path) -> None:
    """Make the folder that holds run folders if there is none.

    Raises:
        InputError: it cannot be made.
    """
    try:
        make_folders(path)
        # A folder that was there before may be one to read only.
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise _not_makable(path, error) from error


def _default_name(config: ExperimentConfig) -> str:
    model = Path(config.model.path).name
    return f"{config.method.name}-{model}-{time.strftime('%Y%m%d-%H%M%S')}"


def _numbered(path: Path) -> Iterator[Path]:
    """`path`, then with numbers after it: other runs may begin in the same second."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}")


def _not_makable(path: Path, error: OSError) -> InputError:
    return InputError(f"output_dir: cannot make {path}: {error.strerror}; expected a writable folder")
