"""`fedra simulate` as a file, for `accelerate launch` and `torchrun`; see its --help."""

from __future__ import annotations

import sys

from fedra_engine.runtime.exit_codes import end, exit_code


def main() -> None:
    """Run the experiment that the command line describes, or resume one, or show what would be trained."""
    from fedra_engine.commands import simulate

    simulate.main(sys.argv[1:])


if __name__ == "__main__":
    end(exit_code(main))
