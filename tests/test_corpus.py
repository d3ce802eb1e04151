"""Malformed input, case by case (tests/corpus/*.yaml): one clear line, exit code 2, and every file stays as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import corpus_makers
from tests.corpus_runner import LAUNCHERS, SECONDS, STOPPED, CorpusRunner

pytestmark = pytest.mark.slow

CORPUS = Path(__file__).parent / "corpus"
CASES = [case for file in sorted(CORPUS.glob("*.yaml")) for case in yaml.safe_load(file.read_text())]
OUTPUT_FOLDERS = {"runs", "runs/compare", "runs/scaling"}
"""May be left behind, empty."""


def test_the_corpus_covers_every_launcher() -> None:
    names = [case["name"] for case in CASES]
    assert len(names) == len(set(names))
    assert len(names) >= 300
    assert {case["launcher"] for case in CASES} == {path.stem for path in LAUNCHERS.glob("*.py")}


@pytest.fixture(scope="module")
def runner() -> Iterator[CorpusRunner]:
    runner = CorpusRunner()
    yield runner
    runner.close()


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in CASES])
def test_malformed_input_is_one_line(case: dict[str, Any], runner: CorpusRunner, tmp_path: Path) -> None:
    folder, home = tmp_path / "case", tmp_path / "home"
    folder.mkdir()
    home.mkdir()

    def filled(text: str) -> str:
        return text.replace("{tmp}", str(folder))

    for name, content in case.get("files", {}).items():
        make(folder / name, filled(content) if isinstance(content, str) else content)
    before = snapshot(folder)
    code, stderr = runner.run(case["launcher"], [filled(argument) for argument in case["args"]], folder, home)
    after = snapshot(folder)
    assert code not in STOPPED, f"still running after {SECONDS} s"
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, stderr
    assert code == 2, stderr
    assert all(character.isprintable() for character in lines[0]), repr(lines[0])
    for text in case["says"]:
        assert filled(text) in lines[0]
    assert after == before, sorted(set(after.items()) ^ set(before.items()))


def make(path: Path, content: Any) -> None:
    """Write the file of a case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content)
    else:
        options = dict(content)
        getattr(corpus_makers, options.pop("make"))(path, **options)


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Mode, time of change and content of everything in `folder`; output folders without anything in them are left out.

    A folder's time of change stays out: files that come and go change it.
    """
    found = {}
    for path in folder.rglob("*"):
        name, status = str(path.relative_to(folder)), path.lstat()
        if path.is_dir() and name in OUTPUT_FOLDERS:
            continue
        is_file = path.is_file() and not path.is_symlink()
        # A pipe would be read for ever, and a sparse file can be huge.
        content = path.read_bytes() if is_file and status.st_size < 1 << 24 else b""
        found[name] = (status.st_mode, 0 if path.is_dir() else status.st_mtime_ns, content)
    return found
