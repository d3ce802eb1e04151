"""Compares methods: runs every method with every seed, and puts accuracies and costs side by side.

python launchers/compare.py --methods fedra,inclusivefl --seeds 0,1,2
"""

from __future__ import annotations

import sys

from fedra_engine.runtime.exit_codes import end, exit_code


def main() -> None:
    """As `fedra compare`."""
    from fedra_engine.commands import compare

    compare.main(sys.argv[1:])


if __name__ == "__main__":
    end(exit_code(main))
