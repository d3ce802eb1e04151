"""Names that a test registers are gone after it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fedra_engine.config as configuration
from fedra_engine.methods.allocated import ALLOCATORS
from fedra_engine.methods.base import METHODS


@pytest.fixture
def own_names() -> Iterator[None]:
    """For tests that register methods or allocators: the tables are afterwards as they were before."""
    if not hasattr(configuration, "register_choice"):
        pytest.skip("the configuration takes no names from outside yet")
    kept = [(table, dict(table)) for table in (METHODS, ALLOCATORS)]
    yield
    for table, before in kept:
        table.clear()
        table.update(before)
