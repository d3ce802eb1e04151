"""`fedra bench` as a file: `python launchers/microbench.py executors`, and so on."""

from __future__ import annotations

import sys

from fedra_engine.runtime.exit_codes import end, exit_code


def main() -> None:
    """Run the benchmark that the command line names."""
    from fedra_engine.commands import bench

    bench.main(sys.argv[1:])


if __name__ == "__main__":
    end(exit_code(main))
