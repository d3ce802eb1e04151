"""These tests run the Triton kernels on a CPU, in Triton's interpreter: `TRITON_INTERPRET=1 pytest <here>`.

Triton reads the variable when it is imported, so they need a process of their own.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedra_kernels.dispatch import INTERPRETED

GUARD = 64
"""Entries before and after every buffer the ops allocate that no kernel may write."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The hook is given every test of the run, not those of this folder alone.
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.slow)
        if not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 when Triton is imported"))


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    """In torch's deterministic mode torch.empty is filled with NaN: an entry no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _guarded_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A kernel that writes outside its output is out of bounds: the interpreter would not notice."""
    new_empty = Tensor.new_empty
    guards: list[tuple[Tensor, Tensor]] = []

    def guarded(self: Tensor, *size: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        wanted = self.dtype if dtype is None else dtype
        if options or type(self) is not Tensor or self.device.type != "cpu":
            return new_empty(self, shape, dtype=wanted, **options)
        buffer = new_empty(self, (shape.numel() + 2 * GUARD,), dtype=wanted)
        inner = buffer[GUARD : GUARD + shape.numel()]
        for border in (buffer[:GUARD], buffer[GUARD + shape.numel() :]):
            guards.append((border, border.clone()))
        return inner.view(shape)

    monkeypatch.setattr(Tensor, "new_empty", guarded)
    yield
    for border, before in guards:
        assert torch.equal(border.view(torch.uint8), before.view(torch.uint8)), "a kernel wrote out of bounds"
