"""Measures executors, methods, lanes, batches and kernels: `python launchers/microbench.py executors`, and so on."""

from __future__ import annotations

import sys
from pathlib import Path

from fedra_engine.runtime.exit_codes import end, exit_code


def main() -> None:
    """Run the benchmark that the command line names."""
    # The benchmarks lie beside the package and are not installed with it.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks import microbench

    microbench.main(sys.argv[1:])


if __name__ == "__main__":
    end(exit_code(main))
