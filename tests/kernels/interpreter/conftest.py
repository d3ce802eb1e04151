"""These tests run the Triton kernels on a CPU, in Triton's interpreter: `TRITON_INTERPRET=1 pytest <here>`.

Triton reads the variable when it is imported, so they need a process of their own.
"""

from collections.abc import Iterator

import pytest
import torch

from fedra_kernels.dispatch import INTERPRETED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 when Triton is imported"))


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    """In torch's deterministic mode torch.empty is filled with NaN: an entry no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
