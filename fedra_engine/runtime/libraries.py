"""What other libraries say to a user while the engine uses them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext


@contextmanager
def without_advice(*, bars: bool = True) -> Iterator[None]:
    """Silence transformers' warnings about the models it loads and, without `bars`, all bars of these libraries."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with nullcontext() if bars else _without_bars():
            yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def _without_bars() -> Iterator[None]:
    import datasets
    from transformers.utils import logging

    of_models, of_data = logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if of_models:
            logging.enable_progress_bar()
        if of_data:
            datasets.enable_progress_bars()
