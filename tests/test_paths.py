"""Files that the documentation and comments name are there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMED = re.compile(
    r"\b(?:fedra_engine|kernels|benchmarks|launchers|configs|tests|docs|examples)/[\w./-]+\.(?:py|md|yaml|json|txt)\b"
)
MADE_UP = {"tests/test_some.py"}
"""Names in tests of what handles names."""


def test_files_that_are_named_exist() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    there = set(tracked)
    missing = []
    for name in tracked:
        if not name.endswith((".py", ".md", ".yaml", ".toml")) or name.startswith("tests/corpus/"):
            continue
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
            for path in NAMED.findall(line):
                is_part = any(other.endswith(f"/{path}") for other in there)
                if path not in there and not is_part and path not in MADE_UP:
                    missing.append(f"{name}:{number} names {path}")
    assert not missing
