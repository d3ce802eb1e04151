"""What the command line of `simulate` asks for: a new run, or to go on with one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedra_engine.cli import build_parser, parse_config
from fedra_engine.config import ExperimentConfig
from fedra_engine.errors import InputError
from fedra_engine.reporting.run_folder import RunFolder, setting_digest
from fedra_engine.validation import check_method, validate

if TYPE_CHECKING:
    from fedra_engine.processes import Processes

_SWITCH = ["true", "false"]


@dataclass(frozen=True)
class RunRequest:
    """An experiment, the earlier run to go on with, if any, and whether only to tell what it would be."""

    config: ExperimentConfig
    resumed: RunFolder | None
    dry_run: bool = False

    @contextmanager
    def open_folder(self, processes: Processes | None = None) -> Iterator[RunFolder]:
        """The run's folder. A new one goes away again when the input turns out to be bad before any round.

        Of several `processes` the main one makes the folder, and all get the same.

        Raises:
            InputError: the folder's name is taken; or the earlier run is still going on, is past `config.rounds`
                already, began with other settings, or has no intact checkpoint left.
        """
        # Imports torch.
        from fedra_engine.processes import Processes

        processes = Processes.alone() if processes is None else processes
        with ExitStack() as lock:
            with processes.together():
                made = str(self._make_folder(lock).path) if processes.is_main else ""
            folder = RunFolder(Path(processes.broadcast_object(made)))
            try:
                yield folder
            except InputError:
                if processes.is_main and self.resumed is None and not folder.read_metrics():
                    folder.discard()
                raise

    def _make_folder(self, lock: ExitStack) -> RunFolder:
        """The folder, ready for the rounds to come, and no other command's until `lock` is closed."""
        folder = RunFolder.create(self.config) if self.resumed is None else self.resumed
        lock.enter_context(folder.locked())
        if self.resumed is not None:
            self._prepare(folder)
        return folder

    def _prepare(self, folder: RunFolder) -> None:
        # Imports torch.
        from fedra_engine.checkpoint import latest_checkpoint

        found = latest_checkpoint(folder.path)
        last = -1 if found is None else found.round
        if found is not None and self.config.rounds <= last:
            raise InputError(
                f"rounds: found {self.config.rounds}, expected at least the {last + 1} done in {folder.path}"
            )
        setting = setting_digest(self.config)
        if found is not None and found.state.get("setting", setting) != setting:
            raise InputError(
                f"{folder.config_file}: found other settings than the checkpoints were made with, expected the same "
                "but for rounds, evaluate_every and execution"
            )
        folder.write_config(self.config)
        folder.rewind(last)


def parse_request(arguments: Sequence[str], description: str) -> RunRequest:
    """Read the options of `simulate`: those of the experiment's configuration, `--resume` and `--dry_run`.

    Raises:
        InputError: the options cannot be used.
    """
    parser = build_parser(ExperimentConfig, description)
    parser.add_argument(
        "--resume",
        metavar="FOLDER",
        default=argparse.SUPPRESS,
        help="Go on with the run in FOLDER and its own config.yaml; only a larger --rounds may be given too, "
        "where training.lr_schedule is constant.",
    )
    parser.add_argument(
        "--dry_run",
        choices=_SWITCH,
        default=argparse.SUPPRESS,
        help="Tell what would be trained, by whom, and what it would cost; train nothing.",
    )
    resumed, rounds = _parse_resume(arguments)
    if resumed is None:
        dry_run = _parse_dry_run(arguments)
        config = parse_config(parser, ExperimentConfig, arguments)
        validate(config)
        check_method(config)
        return RunRequest(config, None, dry_run)
    before = parse_config(parser, ExperimentConfig, ["--config", str(resumed.config_file)])
    validate(before)
    if rounds is None:
        return RunRequest(before, resumed)
    config = parse_config(parser, ExperimentConfig, ["--config", str(resumed.config_file), "--rounds", rounds])
    validate(config)
    if config.rounds != before.rounds and config.training.lr_schedule != "constant":
        raise InputError(
            f"rounds: found {config.rounds}, expected {before.rounds} as before, because the "
            f"{config.training.lr_schedule} learning rate schedule depends on it"
        )
    return RunRequest(config, resumed)


def _parse_dry_run(arguments: Sequence[str]) -> bool:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--dry_run", default="false")
    expected = " or ".join(_SWITCH)
    try:
        value = parser.parse_known_args(arguments)[0].dry_run
    except argparse.ArgumentError as error:
        raise InputError(f"dry_run: found no value, expected {expected}") from error
    if value not in _SWITCH:
        raise InputError(f"dry_run: found {value!r}, expected {expected}")
    return bool(value == "true")


def _parse_resume(arguments: Sequence[str]) -> tuple[RunFolder | None, str | None]:
    """The folder to resume and the value of `--rounds` beside it; nothing without `--resume`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--resume")
    parser.add_argument("--rounds")
    try:
        options, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(f"{str(error.argument_name).removeprefix('--')}: found no value, expected one") from error
    if options.resume is None or {"-h", "--help"} & set(others):
        return None, None
    if others:
        raise InputError(f"resume: found {others[0]} beside it, expected no other option than --rounds")
    return RunFolder.open(options.resume), options.rounds
