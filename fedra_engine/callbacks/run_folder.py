"""The folder that a run leaves behind."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from filelock import AcquireReturnProxy, FileLock, Timeout

from fedra_engine.config import ExperimentConfig
from fedra_engine.config.options import CHOICES, IN_MEMORY
from fedra_engine.config.parsing import imported_modules
from fedra_engine.config.values import dump_yaml
from fedra_engine.runtime.errors import InputError, one_line
from fedra_engine.runtime.files import content_hash, make_folders, whole_folder, write_whole, writing

SUMMARY, COSTS, OUTCOMES, REPORT = "summary.json", "costs.json", "outcomes.json", "report.html"
FACTS, PARTITION = "facts.json", "partition.png"
ADAPTERS, BEST, CHECKPOINTS, TRACE = "adapters", "best", "checkpoints", "trace"
"""Names of files, and of folders, that a run writes into its own, each by a module of its own."""
RESULTS = (SUMMARY, COSTS, OUTCOMES, REPORT)
"""Files that hold only as long as no further round is trained."""
_FILES = (
    *("config.yaml", "run.log", "metrics.jsonl", *RESULTS, PARTITION, FACTS, ".lock"),
    *(f"{CHECKPOINTS}/metrics.jsonl", f"{ADAPTERS}/[!.]*", f"{TRACE}/*.safetensors"),
)
_FOLDERS = (
    *(CHECKPOINTS, "tensorboard", "wandb", ADAPTERS, TRACE, BEST),
    *(f"{folder}/round_*[0-9]" for folder in (CHECKPOINTS, TRACE, BEST)),
)
"""Patterns of all that a run writes."""


class MetricsMark(TypedDict):
    """Length and digest of the records up to a checkpoint's round, which the checkpoint holds."""

    bytes: int
    digest: str


class RunFolder:
    """`<output_dir>/<name>/`, made by `create` or found by `open`.

    The record of a round goes first to a copy in `checkpoints/`, from which a damaged metrics.jsonl is restored; then
    a `MetricsMark` goes into the round's checkpoint; last, the record goes to metrics.jsonl.

    Attributes:
        path: the folder.
        config_file: the resolved configuration; `--config` with it repeats the experiment in a new folder.
        log_file: the run's output, with times.
        metrics_file: the records of the rounds, one JSON object per line.
        kept_metrics_file: the copy of the records.
        summary_file: the results, written at the end.
        best_folder: the best round (`keep_best`): checkpoints, and at the end the adapter.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.log_file = path / "run.log"
        self.metrics_file = path / "metrics.jsonl"
        self.kept_metrics_file = path / CHECKPOINTS / "metrics.jsonl"
        self.summary_file = path / SUMMARY
        self.best_folder = path / BEST
        self._kept = content_hash()
        self._kept_bytes = 0

    @classmethod
    def create(cls, config: ExperimentConfig) -> RunFolder:
        """Make a new folder with `config` in it; InputError if its name is taken or it cannot be made."""
        usual = f"{config.method.name}-{Path(config.model.path).name}-{time.strftime('%Y%m%d-%H%M%S')}"
        path = Path(config.output_dir) / (config.name or usual)
        make_folder(path.parent)
        # Other runs may begin in the same second.
        numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
        for free in itertools.chain([path], numbered if config.name is None else ()):
            try:
                with whole_folder(free) as made:
                    cls(made).write_config(config)
                return cls(free)
            except FileExistsError:
                continue
            except OSError as error:
                raise _not_makable(free, error) from error
        raise _taken(path)

    @classmethod
    def check_name(cls, config: ExperimentConfig) -> None:
        """Raise InputError if the name of a new run is taken, before the run takes time."""
        if config.name is not None and (path := Path(config.output_dir) / config.name).exists():
            raise _taken(path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of an earlier run; InputError if there is none."""
        folder = cls(Path(path))
        if not folder.config_file.is_file():
            raise InputError(f"{path}: found no {folder.config_file.name}, expected the folder of an earlier run")
        return folder

    def locked(self) -> AcquireReturnProxy:
        """Lock the folder while entered, or until this process ends; InputError if another command holds the lock."""
        try:
            return FileLock(self.path / ".lock").acquire(timeout=0)
        except Timeout as error:
            raise InputError(
                f"resume: found another process at work on {self.path}, expected a run that has ended or broken off"
            ) from error

    def written(self) -> dict[str, Path]:
        """The paths that a person may look for, by title, as far as they are there."""
        paths = {
            "run folder": self.path,
            "report": self.path / REPORT,
            "adapters": self.path / ADAPTERS,
            "best round": max(self.best_folder.glob("round_*[0-9]"), default=self.best_folder),
            "metrics": self.metrics_file,
            "trace": self.path / TRACE,
            "tensorboard": self.path / "tensorboard",
            "log": self.log_file,
        }
        return {title: path for title, path in paths.items() if path.exists()}

    def write_config(self, config: ExperimentConfig) -> None:
        """Write the resolved configuration, without the name, which is the folder's."""
        values = dataclasses.asdict(dataclasses.replace(config, name=None))
        write_whole(self.config_file, dump_yaml(values))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the results."""
        write_whole(self.summary_file, json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def check_kinds(self) -> None:
        """Raise InputError if a folder has the name of one of the run's files, or the other way round."""
        for patterns, kind, fits in ((_FILES, "file", Path.is_file), (_FOLDERS, "folder", Path.is_dir)):
            for path in itertools.chain.from_iterable(map(self.path.glob, patterns)):
                if path.exists() and not fits(path):
                    raise InputError(f"{path}: found no {kind} but something else, expected the {kind} of the run")

    def append_metrics(self, *records: Mapping[str, Any]) -> None:
        """Append records to metrics.jsonl."""
        with writing(self.metrics_file), self.metrics_file.open("ab") as file:
            file.write(_as_lines(records))

    def keep_metrics(self, *records: Mapping[str, Any]) -> MetricsMark:
        """Append records to the copy beside the checkpoints. Returns the mark for the last one's checkpoint."""
        content = _as_lines(records)
        make_folders(self.kept_metrics_file.parent)
        with writing(self.kept_metrics_file), self.kept_metrics_file.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._kept.update(content)
        self._kept_bytes += len(content)
        return {"bytes": self._kept_bytes, "digest": self._kept.hexdigest()}

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records, oldest first, except a last line that a crash cut short; InputError if the file is damaged."""
        records = []
        for number, line in enumerate(_read(self.metrics_file).splitlines(keepends=True), 1):
            if line.endswith(b"\n"):
                with reading(f"{self.metrics_file}: line {number}", "the record of a round"):
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise TypeError(f"{type(record).__name__} instead of an object")
                    records.append(record)
        return records

    def find_metrics(self, mark: MetricsMark | None) -> bytes:
        """The records up to the checkpoint with this `mark`, from the file or its copy, whichever is intact.

        Args:
            mark: None if the run has no checkpoint; then there must be no records, either.

        Raises:
            InputError: neither is intact; or there are records or results, and no checkpoint.
        """
        if mark is None:
            if self.summary_file.exists() or _read(self.metrics_file):
                raise InputError(
                    f"{self.path / CHECKPOINTS}: found no checkpoint of a run that has trained, expected the newest "
                    f"(nothing of the run is replaced; --config {shlex.quote(str(self.config_file))} repeats it in "
                    "another folder)"
                )
            return b""
        found = [_read(file)[: mark["bytes"]] for file in (self.metrics_file, self.kept_metrics_file)]
        for content in found:
            if content_hash(content).hexdigest() == mark["digest"]:
                return content
        lines = itertools.zip_longest(*(content.splitlines() for content in found))
        different = [f", which differs from line {n} on" for n, (one, other) in enumerate(lines, 1) if one != other]
        raise InputError(
            f"{self.metrics_file}: found other records than were written, also in {self.kept_metrics_file}"
            f"{''.join(different[:1])}; expected one of them intact (put back a copy, or repeat the run with --config "
            f"{shlex.quote(str(self.config_file))})"
        )

    def rewind(self, last_round: int, metrics: bytes) -> bool:
        """Remove the results, traces and records of rounds after `last_round` (-1: all), which will be repeated.

        `metrics` are the records up to it, from `find_metrics`. Returns whether metrics.jsonl lacked any of them.
        """
        for name in RESULTS:
            (self.path / name).unlink(missing_ok=True)
        for trace in self.path.glob(f"{TRACE}/round_*"):
            number = re.fullmatch(r"round_(\d+)", trace.name)
            if number and int(number[1]) > last_round:
                shutil.rmtree(trace)
        before = _read(self.metrics_file)
        for file in (self.kept_metrics_file, self.metrics_file):
            if _read(file) != metrics:
                write_whole(file, metrics)
        self._kept, self._kept_bytes = content_hash(metrics), len(metrics)
        return not before.startswith(metrics)


def measuring_command(run: Path, settings: Mapping[str, Any]) -> str | None:
    """The command that measures a run's best round on the test samples; None if no command can.

    None can if data or model were passed from Python, or a name of the configuration is registered by a program that
    `--import` has not imported here.

    Args:
        run: its folder.
        settings: the fields of its configuration, by dotted name.
    """
    modules = imported_modules()
    choices = {**CHOICES, "keep_best": CHOICES["early_stopping.measure"]}
    names = {name: choice.names if modules else choice.shipped for name, choice in choices.items()}
    unknown = any(settings.get(name) not in (None, *known) for name, known in names.items())
    if unknown or IN_MEMORY in settings.values():
        return None
    imports = [f"--import={module}" for module in modules]
    options = ["--best", "--data.validation_fraction", "0"]
    return shlex.join(["fedra", "evaluate", *imports, str(run), *options])


def _taken(path: Path) -> InputError:
    return InputError(f"name: found a run in {path}, expected a new name (or --resume {shlex.quote(str(path))})")


def make_folder(path: Path) -> None:
    """Make the folder that holds run folders if there is none; InputError if it cannot be made or written to."""
    try:
        make_folders(path)
        # An existing folder may be read-only.
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise _not_makable(path, error) from error


@contextmanager
def reading(what: Path | str, expected: str) -> Iterator[None]:
    """Turn errors in reading `what` into an InputError that says what was `expected`."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{what}: found no readable file ({error.strerror}), expected {expected}") from error
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{what}: found something else than was written ({one_line(error)}), expected {expected}"
        ) from error


def _as_lines(records: tuple[Mapping[str, Any], ...]) -> bytes:
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()


def _read(file: Path) -> bytes:
    """The content of `file`; empty if there is none."""
    with reading(file, "the records of a run"):
        return file.read_bytes() if file.exists() else b""


def _not_makable(path: Path, error: OSError) -> InputError:
    return InputError(f"output_dir: cannot make {path}: {error.strerror}; expected a writable folder")
