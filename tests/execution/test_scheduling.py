"""Samples are shared out among processes in equally many portions."""

import pytest
import torch

from fedra_engine.execution.scheduling import portions
from fedra_engine.runtime.processes import Processes


@pytest.mark.parametrize("count", [1, 3, 8, 9, 25])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_process_has_equally_many_portions_and_every_sample_is_in_one(count: int, processes: int) -> None:
    rows, size = 10 + torch.arange(count), 4
    shares = [portions(rows, size, Processes(index, processes, torch.device("cpu"))) for index in range(processes)]
    assert {len(share) for share in shares} == {-(-count // (size * processes))}
    real = [portion.rows for share in shares for portion in share if not portion.is_padding]
    assert sorted(torch.cat(real).tolist()) == rows.tolist()
    assert max(map(len, real)) <= size
    padding = [portion.rows.tolist() for share in shares for portion in share if portion.is_padding]
    assert all(sample == rows[:1].tolist() for sample in padding)
