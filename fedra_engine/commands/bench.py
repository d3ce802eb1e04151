"""`bench`: run the benchmarks, which are beside the package in a clone and are not installed with it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import fedra_engine
from fedra_engine.runtime.errors import InputError


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark named by `arguments`."""
    root = Path(fedra_engine.__file__).parents[1]
    if not (root / "benchmarks" / "microbench.py").is_file():
        raise InputError("bench: found an installed package without its benchmarks, expected a clone of the repository")
    sys.path.insert(0, str(root))
    import_module("benchmarks.microbench").main(arguments)
