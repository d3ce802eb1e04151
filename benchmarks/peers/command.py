"""`fedra bench peers`: run the race, write its page, and fail where a contestant has done other work."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.peers.environments import ROOT
from benchmarks.peers.page import page, records
from benchmarks.peers.processes import ContestantError
from benchmarks.peers.race import Race
from benchmarks.peers.scenes import OVERHEAD, QUICK, SCENES, TRAINING, Scene
from benchmarks.peers.targets import Results
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.exit_codes import unwound_by_signals
from fedra_engine.runtime.files import write_whole

PAGE = ROOT / "docs" / "results" / "peers.md"
USUAL_REPEATS = 5
"""Fewest for the page of the documentation."""


def run_peers(*, quick: bool, only: Sequence[str], repeats: int, out: Path | None) -> None:
    """Race, and write the page to `out` and its figures beside it, with the ending `.json`.

    Without `out`, the page of the documentation is written by a whole race, and that of a smaller one is printed.

    Args:
        quick: race once in small settings, with contestants that need no environment of their own.
        only: names of scenes; all if there are none. One without work also runs those with fewer clients.
        repeats: counted rounds.

    Raises:
        InputError: a scene is unknown, or an environment cannot be made.
        ContestantError: a contestant's process has ended, or it has done other work than the others.
    """
    scenes = QUICK if quick else [*TRAINING, *OVERHEAD]
    if unknown := [name for name in only if name not in {scene.name for scene in scenes}]:
        names = ", ".join(scene.name for scene in scenes)
        raise InputError(f"only: found {unknown[0]!r}, expected some of {names}")
    if quick:
        repeats = 1
    whole = not quick and not only and repeats >= USUAL_REPEATS
    results = race([scene.name for scene in chosen(scenes, only)], repeats)
    options = ["--quick"] * quick + ([f"--only {','.join(only)}"] if only else [])
    options += [f"--repeats {repeats}"] if not quick and repeats != USUAL_REPEATS else []
    text = page(results, repeats, " ".join(["fedra bench peers", *options]))
    if out is None and not whole:
        print(text)
    else:
        file = out or PAGE
        write_whole(file, text)
        write_whole(file.with_suffix(".json"), json.dumps(records(results, repeats), indent=1) + "\n")
        print(f"written: {file}", file=sys.stderr)
    check(results)


def chosen(scenes: Sequence[Scene], only: Sequence[str]) -> list[Scene]:
    """Those named in `only`, or all if it is empty, and what they need.

    Whether a contestant would take too long in a scene without work is told by its time for fewer clients.
    """
    most = max((scene.clients for scene in scenes if scene.name in only and scene.idle), default=0)
    return [scene for scene in scenes if not only or scene.name in only or (scene.idle and scene.clients < most)]


def race(names: Sequence[str], repeats: int) -> Results:
    """Race in the scenes of these names."""
    with unwound_by_signals(), TemporaryDirectory(prefix="peers-") as folder:
        contest = Race(Path(folder), repeats)
        try:
            return {name: contest.run(SCENES[name]) for name in names}
        finally:
            contest.close()


def check(results: Results) -> None:
    """Raise ContestantError if a contestant's work differs from that of the others."""
    for name, standings in results.items():
        for standing in standings:
            found = standing.agreement
            if found is not None and not found.holds:
                raise ContestantError(
                    f"{name}: found a change of {standing.entry.label} in {standing.entry.dtype} that differs from the "
                    f"reference by {found.difference:.2g} (cosine {found.cosine:.4f}), expected the same work"
                )
