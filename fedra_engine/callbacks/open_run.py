"""The folder of a run that is about to be trained: made or found, checked, and locked."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedra_engine.callbacks.checkpoint import find_checkpoint
from fedra_engine.callbacks.fingerprint import early_fingerprint
from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.config import ExperimentConfig
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.exit_codes import unwound_by_signals
from fedra_engine.runtime.processes import Processes


@contextmanager
def open_folder(config: ExperimentConfig, earlier: RunFolder | None, processes: Processes) -> Iterator[RunFolder]:
    """Lock the folder of the `earlier` run, or of a new one that the main process makes, for all `processes`.

    A new folder is removed if bad input ends the run before its first round.

    Raises:
        InputError: the folder's name is taken; or the earlier run is still running, has already trained more than
            `config.rounds`, had other settings, or has no intact checkpoint left.
        BaseException: any other interruption within; a note says how to resume.
    """
    with unwound_by_signals(), ExitStack() as lock:
        made = ""
        with processes.raise_on_all():
            if processes.is_main:
                mine = RunFolder.create(config) if earlier is None else earlier
                if earlier is not None:
                    _check_early(config, earlier)
                lock.enter_context(mine.locked())
                made = str(mine.path)
        folder = RunFolder(Path(processes.broadcast_object(made)))
        try:
            yield folder
        except InputError:
            if processes.is_main and earlier is None and not folder.kept_metrics_file.exists():
                shutil.rmtree(folder.path)
            raise
        except BaseException as error:
            error.add_note(f"fedra simulate --resume {shlex.quote(str(folder.path))} resumes it")
            raise


def _check_early(config: ExperimentConfig, folder: RunFolder) -> None:
    """Check before the experiment is built, which may take long: the folder, the settings, and that rounds are left."""
    folder.check_kinds()
    find_checkpoint(folder, early_fingerprint(config), config.rounds)
