"""Every tensor of every op that does not fit is named, with what was found and expected, before any launch."""

from typing import Any

import pytest
import torch

from fedra_kernels import Dropout, RowGroups, dispatch

from .bad_input import ROWS, Call, calls, misfits

CALLS = calls("cpu")
MISFITS = [
    pytest.param(call, name, wrong, id=f"{op}-{name}-{what}")
    for op, call in CALLS.items()
    for name, what, wrong in misfits(call, "meta")
]


@pytest.mark.parametrize("op", CALLS)
def test_a_call_that_fits_is_accepted(op):
    CALLS[op].op(**CALLS[op].arguments)


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize(("call", "name", "wrong"), MISFITS)
def test_a_tensor_that_does_not_fit_is_named(
    call: Call, name: str, wrong: dict[str, Any], triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if triton:
        monkeypatch.setattr(dispatch, "INTERPRETED", True)
    with pytest.raises(ValueError, match=rf"^{name}: found .+, expected .+|: found .+, expected .+ as {name} has$"):
        call.op(**wrong)


@pytest.mark.parametrize("op", [op for op, call in CALLS.items() if "groups" in call.arguments])
def test_groups_that_do_not_fit_are_named(op):
    call = CALLS[op]
    for sizes, slots in (([3, 0, 1], [2, 1, 0]), ([3, 0, 2], [2, 3, 0])):
        groups = RowGroups(sizes, torch.tensor(slots))
        with pytest.raises(ValueError, match=r"^(groups|features|labels): found .+, expected .+"):
            call.op(**{**call.arguments, "groups": groups})


def test_dropout_keys_of_another_number_of_groups_are_named():
    drop = Dropout(0.1, torch.arange(2))
    for op, dropout in (("lora_linear", drop), ("stream_block", [drop] * 6)):
        call = CALLS[op]
        with pytest.raises(ValueError, match=r"^dropout.keys: found shape \[2\], expected \[3\]"):
            call.op(**{**call.arguments, "dropout": dropout})


def test_fp64_tensors_are_for_the_torch_path(monkeypatch):
    """The Triton kernels compute in fp32; they refuse rather than round."""
    call = CALLS["lora_linear"]
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    with pytest.raises(ValueError, match=r"^x: found dtype torch.float64, expected torch.float32"):
        call.op(**{**call.arguments, "x": call.arguments["x"].double()})


def test_weights_with_gaps_are_refused_before_any_launch(monkeypatch):
    call = CALLS["lora_linear"]
    weight = torch.ones(24, 32)[:, ::2]
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    with pytest.raises(ValueError, match=r"^weight: found strides \[32, 2\], expected"):
        call.op(**{**call.arguments, "weight": weight})


@pytest.mark.parametrize("op", ["sgd", "adamw"])
def test_a_slot_given_twice_is_named(op):
    call = CALLS[op]
    with pytest.raises(ValueError, match=r"^slots: found a slot twice in \[1, 1, 0\], expected distinct slots"):
        call.op(**{**call.arguments, "slots": torch.tensor([1, 1, 0])})


@pytest.mark.parametrize(
    ("op", "name", "bound"),
    [
        ("stream_block", "index", 8), ("low_rank_add", "index", 8),
        ("head_cross_entropy", "labels", 6),
        ("sgd", "slots", 4), ("adamw", "slots", 4), ("squared_norms", "slots", 4),
        ("squared_changes", "slots", 4), ("squared_changes", "rows", 3),
        ("aggregate", "slots", 4), ("aggregate", "blocks", 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("below", [False, True])
def test_numbers_out_of_range_are_named(op, name, bound, below):
    call = CALLS[op]
    wrong = call.arguments[name].clone()
    wrong[-1] = -1 if below else bound
    found = -1 if below else bound
    with pytest.raises(ValueError, match=f"^{name}: found {found}, expected 0 to {bound - 1}"):
        call.op(**{**call.arguments, name: wrong})


def test_rows_of_samples_and_tokens_are_checked_flattened():
    call = CALLS["lora_linear"]
    with pytest.raises(ValueError, match=rf"^groups: found {ROWS} rows in sizes, expected {2 * ROWS} as x has"):
        call.op(**{**call.arguments, "x": torch.ones(ROWS, 2, 16)})
