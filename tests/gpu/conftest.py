"""What needs a GPU; without one these tests are skipped, and say so."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if "tests/gpu" in item.nodeid]
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device, and torch finds none"))


@pytest.fixture(autouse=True)
def _exact_and_poisoned() -> Iterator[None]:
    """No TF32, and torch.empty is filled with NaN: an entry no kernel writes shows."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.fixture
def large_memory() -> Iterator[Callable[[int], None]]:
    """Call it with the bytes a test needs: it skips where the GPU has fewer free. One such test runs at a time."""

    def need(size: int) -> None:
        free, _ = torch.cuda.mem_get_info()
        if free < size:
            pytest.skip(f"needs {size / 2**30:.0f} GiB of free GPU memory, found {free / 2**30:.0f}")

    with FileLock(Path(tempfile.gettempdir()) / "fedra-engine-large-gpu-memory.lock"):
        yield need
        torch.cuda.empty_cache()
