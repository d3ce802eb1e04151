"""The folder of an accuracy study: a handful of files, each whole at any time, with all that is needed to go on.

`study.json` and `study.md` have the results, `study.log` a line for every round, and `runs_seed<seed>.tar` the run
folders of a seed's methods: metrics of every round, and the newest checkpoint.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.files import check_own, write_whole

RESULTS_FILE = "study.json"
TABLES_FILE = "study.md"
LOG_FILE = "study.log"
SEED_FILE = "seed.json"
"""In the archive of a seed: what is known of it besides its runs."""
LARGEST = 16 * 2**20
"""Largest archive, in bytes."""


def archive(folder: Path, seed: int) -> Path:
    """The file with all runs of `seed`."""
    return folder / f"runs_seed{seed}.tar"


def read_calls(option: str, folder: Path) -> list[dict[str, Any]]:
    """The calls of the earlier study in `folder`, which `option` names.

    Raises:
        InputError: there is none.
    """
    try:
        calls: list[dict[str, Any]] = json.loads((folder / RESULTS_FILE).read_text())["calls"]
        if not isinstance(calls, list):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{option}: found no intact {RESULTS_FILE} in {folder}, expected an earlier study's"
        ) from error
    return calls


def check_output(folder: Path) -> None:
    """Raises InputError if a study would replace files in `folder` that no study wrote."""
    results = folder / RESULTS_FILE
    check_own([folder / TABLES_FILE, folder / LOG_FILE, *folder.glob("runs_seed*.tar")], results)
    if results.exists():
        read_calls("output_dir", folder)


def save_runs(output: Path, seed: int, work: Path, known: dict[str, Any]) -> None:
    """Replace the archive of `seed`.

    Args:
        output: the study's folder.
        seed: of the runs.
        work: folder with a run folder for each method.
        known: what else is to be kept, as JSON.

    Raises:
        InputError: it would be larger than `LARGEST`.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        _add(tar, SEED_FILE, json.dumps(known).encode())
        for run in sorted(work.iterdir()):
            metrics = run / "metrics.jsonl"
            if metrics.exists():
                _add(tar, f"{run.name}/{metrics.name}", metrics.read_bytes())
            for file in sorted(max((run / "checkpoints").glob("round_*"), default=run / "none").glob("*")):
                _add(tar, str(file.relative_to(work)), file.read_bytes())
    content = buffer.getvalue()
    if len(content) > LARGEST:
        raise InputError(
            f"--model: found one whose runs take {len(content) / 2**20:.1f} MiB for a seed, expected at most "
            f"{LARGEST / 2**20:g} (a smaller model)"
        )
    write_whole(archive(output, seed), content)


def restore_runs(earlier: Path, seed: int, work: Path) -> dict[str, Any] | None:
    """Put the run folders of `seed` into the folder `work`, and return what else was kept; None if there are none.

    Raises:
        InputError: the archive is damaged.
    """
    path = archive(earlier, seed)
    if not path.is_file():
        return None
    try:
        with tarfile.open(path) as tar:
            tar.extractall(work, filter="data")
        kept = work / SEED_FILE
        known: dict[str, Any] = json.loads(kept.read_text())
    except (OSError, ValueError, tarfile.TarError) as error:
        raise InputError(f"{path}: found a damaged archive ({error}), expected that of an earlier study") from error
    kept.unlink()
    return known


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
