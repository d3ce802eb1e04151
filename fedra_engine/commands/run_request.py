"""What the command line of `simulate` asks for: a new run, or to go on with one."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.commands.parsing import LauncherOption, Parser, read_config, split_options
from fedra_engine.config import ExperimentConfig
from fedra_engine.config.differences import setting_digest
from fedra_engine.config.validation import validate
from fedra_engine.runtime.errors import InputError, ProcessLostError
from fedra_engine.runtime.exit_codes import unwound_by_signals

if TYPE_CHECKING:
    from fedra_engine.runtime.processes import Processes

_OPTIONS = (
    LauncherOption(
        "resume",
        "FOLDER",
        "Go on with the run in FOLDER, its own config.yaml and the data and model that it began with; only a larger "
        "--rounds may be given too, where training.lr_schedule is constant",
    ),
    LauncherOption(
        "dry_run",
        "[true|false]",
        "Show what would be trained, by whom, and what it would cost; train nothing",
        choices=("true", "false"),
    ),
)
_ROUNDS = LauncherOption("rounds")
"""All that may be given beside `--resume`."""


@dataclass(frozen=True)
class RunRequest:
    """An experiment, the earlier run to go on with, if any, and whether only to show what would be trained."""

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
            KeyboardInterrupt, OSError, ProcessLostError: what was done in the folder was cut short; a note says how to
                go on.
        """
        # Imports torch.
        from fedra_engine.runtime.processes import Processes

        processes = Processes.alone() if processes is None else processes
        with unwound_by_signals(), ExitStack() as lock:
            with processes.together():
                made = str(self._make_folder(lock).path) if processes.is_main else ""
            folder = RunFolder(Path(processes.broadcast_object(made)))
            try:
                yield folder
            except (KeyboardInterrupt, OSError, ProcessLostError) as error:
                error.add_note(f"--resume {shlex.quote(str(folder.path))} goes on")
                raise
            except InputError:
                if processes.is_main and self.resumed is None and not folder.kept_metrics_file.exists():
                    folder.discard()
                raise

    def _make_folder(self, lock: ExitStack) -> RunFolder:
        """The folder, ready for the rounds to come, and no other command's until `lock` is closed."""
        folder = RunFolder.create(self.config) if self.resumed is None else self.resumed
        if self.resumed is not None:
            self._check_early(folder)
        lock.enter_context(folder.locked())
        return folder

    def _check_early(self, folder: RunFolder) -> None:
        """Find out what can be known before the experiment is built, and before anything in the folder is touched.

        `Simulation` checks fingerprint and records again, behind the lock.
        """
        # Import torch.
        from fedra_engine.callbacks.checkpoint import latest_checkpoint
        from fedra_engine.callbacks.fingerprint import check_fingerprint

        folder.check_kinds()
        found = latest_checkpoint(folder.path)
        folder.find_metrics(None if found is None else found.state["metrics"])
        if found is None:
            return
        if self.config.rounds <= found.round:
            raise InputError(
                f"rounds: found {self.config.rounds}, expected at least the {found.round + 1} done in {folder.path}"
            )
        check_fingerprint({"setting": setting_digest(self.config)}, found.state["fingerprint"], folder.path)


def parse_request(arguments: Sequence[str], description: str) -> RunRequest:
    """Read the options of `simulate`: those of the experiment's configuration, `--resume` and `--dry_run`.

    Raises:
        InputError: the options cannot be used.
    """
    options, others = split_options(arguments, _OPTIONS)
    if options.resume is None or {"-h", "--help", "--help-all", "--help_all"} & set(others):
        config = Parser(ExperimentConfig, description, _OPTIONS).parse(others)
        validate(config)
        return RunRequest(config, None, dry_run=options.dry_run == "true")
    more, others = split_options(others, [_ROUNDS])
    if others or options.dry_run is not None:
        other = others[0] if others else "--dry_run"
        raise InputError(f"resume: found {other} beside it, expected no other option than --rounds")
    if not options.resume:
        raise InputError("resume: found '', expected the folder of an earlier run")
    return _resume(RunFolder.open(os.path.expanduser(options.resume)), more.rounds)


def _resume(folder: RunFolder, rounds: str | None) -> RunRequest:
    """Go on with the run in `folder`; `rounds`, if given, replaces its number of rounds."""
    before = read_config(folder.config_file)
    validate(before)
    if rounds is None:
        return RunRequest(before, folder)
    config = read_config(folder.config_file, "--rounds", rounds)
    validate(config)
    if config.rounds != before.rounds and config.training.lr_schedule != "constant":
        raise InputError(
            f"rounds: found {config.rounds}, expected {before.rounds} as before, because the "
            f"{config.training.lr_schedule} learning rate schedule depends on it"
        )
    return RunRequest(config, folder)
