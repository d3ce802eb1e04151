"""How a launcher ends: bad input is one line and exit code 2, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from fedra_engine.errors import InputError

BAD_INPUT = 2
INTERRUPTED = 130


def exit_code(main: Callable[[], None]) -> int:
    """Run `main`; bad input becomes one line on stderr and 2, an interrupt 130, as shells have it."""
    try:
        main()
    except InputError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0
