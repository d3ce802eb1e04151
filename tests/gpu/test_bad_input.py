"""On a GPU too, what does not fit is named before any launch."""

from typing import Any

import pytest
import torch
import triton

from ..kernels.bad_input import Call, calls, misfits

# Made where there is no GPU as well, so that the tests are collected there; the device of a call is set in the test.
CASES = [(op, name, what) for op, call in calls("cpu").items() for name, what, _ in misfits(call, "meta")]


def _wrong(op: str, name: str, what: str) -> tuple[Call, dict[str, Any]]:
    call = calls("cuda")[op]
    return call, next(args for found, way, args in misfits(call, "cpu") if (found, way) == (name, what))


def _launched(*_: Any, **__: Any) -> None:
    raise AssertionError("a kernel was launched")


@pytest.mark.parametrize(("op", "name", "what"), CASES)
def test_a_tensor_that_does_not_fit_is_named_before_any_launch(
    op: str, name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, wrong = _wrong(op, name, what)
    monkeypatch.setattr(triton.JITFunction, "run", _launched)
    with pytest.raises(ValueError, match=rf"^{name}: found .+, expected .+|: found .+, expected .+ as {name} has$"):
        call.op(**wrong)


@pytest.mark.parametrize("op", calls("cpu"))
def test_a_call_that_fits_is_accepted(op: str) -> None:
    call = calls("cuda")[op]
    call.op(**call.arguments)
    torch.cuda.synchronize()
