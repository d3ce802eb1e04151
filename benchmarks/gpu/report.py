"""Run the stages one after another, tell what they find as they find it, and keep the output folder current."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.gpu.findings import read_stage
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.packing import check_output, refresh
from benchmarks.gpu.stage_process import Stage, StageProcess
from benchmarks.gpu.summary import Outcome, Report, figure_line, markdown, short_table
from fedra_engine.callbacks.run_folder import make_folder
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.exit_codes import unwound_by_signals

_POLL_SECONDS = 0.2
_LEAST_SECONDS = 5.0
"""Below which a stage for the time that is left does not start."""
_SECONDS_TO_PACK = 3.0
"""Left for the last write of the output."""


@dataclass(frozen=True)
class Settings:
    """How a report is run.

    Attributes:
        total: seconds of the whole report, from `started`, a time of `time.monotonic()`.
        refresh: seconds between two writes of the output while a stage runs.
        notice: what every line that is printed begins with.
        command: what was typed, for the report.
    """

    total: float
    started: float
    refresh: float
    notice: str
    command: str


@dataclass
class _Run:
    """A report under way: the folder in which stages work, the output, and how the stages have ended."""

    settings: Settings
    machine: Machine
    folder: Path
    output: Path
    outcomes: list[Outcome] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Print lines, each with the notice and the seconds since the start."""
        elapsed = time.monotonic() - self.settings.started
        for line in text.splitlines():
            print(f"{self.settings.notice}[{elapsed:5.0f} s] {line}", flush=True)

    def report(self) -> Report:
        """All that is known so far."""
        found = {outcome.stage: read_stage(self.folder, outcome.stage) for outcome in self.outcomes}
        return Report(self.settings.notice, self.settings.command, self.machine, tuple(self.outcomes), found)

    def write(self) -> None:
        """Bring the output up to date.

        Raises:
            OSError: it cannot be written.
        """
        report = self.report()
        refresh(self.folder, self.output, report.as_dict(), markdown(report))

    def write_if_possible(self) -> None:
        """Bring the output up to date; where that cannot be, say so in one line: it may be possible later."""
        try:
            self.write()
        except OSError as error:
            self.say(f"cannot write {self.output}: {error.strerror}")


def run_report(stages: Sequence[Stage], machine: Machine, output: Path, settings: Settings) -> int:
    """Run `stages` and leave four files in `output`, written anew after each and while one runs.

    Returns:
        The exit code: 0 where every stage went well, else 1.

    Raises:
        InputError: the output folder cannot be written, at first or at last.
        Interrupted: on SIGTERM, after the output was written.
    """
    check_output(output)
    make_folder(output)
    folder = Path(tempfile.mkdtemp(prefix="gpu-report-"))
    # What one stage compiles, the later ones find, and nothing else.
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    run = _Run(settings, machine, folder, output)
    run.say(f"{machine.device}; {machine.versions}")
    with unwound_by_signals():
        try:
            _run_stages(run, stages)
        finally:
            _write_for_good(run)
    return 1 if any(outcome.failed for outcome in run.outcomes) else 0


def _write_for_good(run: _Run) -> None:
    try:
        run.write()
    except OSError as error:
        raise InputError(
            f"output_dir: cannot write {run.output}: {error.strerror}; what was found is in {run.folder}"
        ) from error
    shutil.rmtree(run.folder, ignore_errors=True)


def _run_stages(run: _Run, stages: Sequence[Stage]) -> None:
    broken = ""
    for stage in stages:
        left = run.settings.started + run.settings.total - _SECONDS_TO_PACK - time.monotonic()
        seconds = left if stage.seconds is None else stage.seconds
        if broken or seconds < _LEAST_SECONDS:
            reason = f"not run: {broken} failed" if broken else "not run: the time was up"
            run.outcomes.append(Outcome(stage.name, 0.0, "left out", reason))
            continue
        outcome = _run_stage(run, stage, seconds)
        if outcome.failed and stage.essential:
            broken = stage.name
    for line in short_table(run.report()):
        print(f"{run.settings.notice}{line}", flush=True)


def _run_stage(run: _Run, stage: Stage, seconds: float) -> Outcome:
    process = StageProcess(stage, run.folder, seconds)
    run.outcomes.append(Outcome(stage.name, 0.0, "running", ""))
    told, written = 0, time.monotonic()
    ended = False
    try:
        while not ended and time.monotonic() < process.until:
            ended = process.wait(_POLL_SECONDS)
            told = _tell(run, stage.name, told)
            if not ended and time.monotonic() - written > run.settings.refresh:
                run.outcomes[-1] = replace(run.outcomes[-1], seconds=process.seconds)
                run.write_if_possible()
                written = time.monotonic()
    finally:
        # Also where this process is interrupted.
        error = process.error() if ended else ""
        process.kill()
    taken = process.seconds
    if ended:
        outcome = Outcome(stage.name, taken, "failed" if error else "done", error)
    else:
        error = f"stopped after {seconds:.0f} s; what it had found is kept"
        # A stage for the time that is left has failed in nothing.
        outcome = Outcome(stage.name, taken, "done" if stage.seconds is None else "failed", error)
    run.outcomes[-1] = outcome
    _tell(run, stage.name, told)
    left_out = read_stage(run.folder, stage.name)["left_out"]
    for what in left_out:
        run.say(f"{stage.name}: no time for {what}")
    run.say(f"{stage.name}: {outcome.verdict}, {taken:.1f} s")
    run.write_if_possible()
    return outcome


def _tell(run: _Run, stage: str, told: int) -> int:
    """Print the figures that were not printed yet. Returns how many there are."""
    figures = read_stage(run.folder, stage)["figures"]
    for figure in figures[told:]:
        run.say(f"{stage}: {figure_line(figure)}")
    return len(figures)
