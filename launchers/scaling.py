"""Measures rounds of more and more clients, on one or several processes.

python launchers/scaling.py --clients 10,100,1000,10000 --processes 1,2
"""

from __future__ import annotations

import sys

from fedra_engine.runtime.exit_codes import end, exit_code


def main() -> None:
    """As `fedra scale`."""
    from fedra_engine.commands import scale

    scale.main(sys.argv[1:])


if __name__ == "__main__":
    end(exit_code(main))
