"""Groups on a GPU that is called `cuda`, whose tensors say `cuda:0`: tried on fake tensors, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from fedra_kernels import Dropout, RowGroups, StreamBlock, dispatch, groups

from .bad_input import calls
from .stream_cases import with_tensors

MODE = FakeTensorMode(allow_non_fake_inputs=True)


def there(tensor: Tensor) -> Tensor:
    """A fake tensor on the GPU of the same shape, strides and dtype."""
    with MODE:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda:0")


def moved(argument: Any) -> Any:
    if isinstance(argument, list):
        return [moved(each) for each in argument]
    if isinstance(argument, StreamBlock):
        return with_tensors(argument, there)
    if isinstance(argument, Dropout):
        return Dropout(argument.p, there(argument.keys))
    if isinstance(argument, RowGroups):
        return RowGroups(argument.sizes, torch.tensor(argument.host_slots), "cuda")
    return there(argument) if isinstance(argument, Tensor) else argument


@pytest.fixture(autouse=True)
def _fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(groups, "to_device", lambda tables, _: [there(torch.from_numpy(table)) for table in tables])
    monkeypatch.setattr(dispatch, "_device_architecture", lambda _: "sm_90")


@pytest.mark.parametrize("op", [op for op, call in calls("meta").items() if "groups" in call.arguments])
def test_an_op_takes_groups_of_a_device_without_an_index(op: str) -> None:
    call = calls("meta")[op]
    arguments = {name: moved(argument) for name, argument in call.arguments.items()}
    # Without a GPU, autograd ends the process where it looks for the stream of a tensor there.
    with MODE, torch.no_grad():
        results = tree_leaves(call.op(**arguments))
    assert all(tensor is None or tensor.device == torch.device("cuda:0") for tensor in results)
