"""`stream_block` on the torch path: against its reference, and what it keeps and writes to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedra_kernels import GradientHandOver, stream_block

from .cases import assert_close
from .stream_cases import KINDS, stream_case


@pytest.mark.parametrize("dropout", [None, 0.3])
@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_it_equals_the_reference(name: str, indexed: bool, dropout: float | None) -> None:
    case = stream_case(name, indexed=indexed, dropout=dropout)
    expected = case.expected()
    assert_close(case.run(), expected, 1e-10)
    assert_close(case.run(recompute=True), expected, 1e-10)


@pytest.mark.parametrize("trains", ["A", "B"])
def test_a_frozen_factor_gets_no_gradient(trains: str) -> None:
    case = stream_case("vit")
    assert_close(case.run(trains=trains), case.expected(trains=trains), 1e-10)


def test_adapters_are_trained_where_the_stream_needs_no_gradient() -> None:
    case = stream_case("llama")
    found = case.run(needs_stream=False)
    assert "stream" not in found
    assert_close({"stream": case.expected()["stream"], **found}, case.expected(), 1e-10)


def test_blocks_hand_over_the_gradient_of_the_stream() -> None:
    case = stream_case("vit")
    copies = 0
    hand_over = GradientHandOver()
    take = hand_over.take

    def counted(grad: torch.Tensor) -> torch.Tensor:
        nonlocal copies
        taken = take(grad)
        copies += taken is not grad
        return taken

    hand_over.take = counted  # type: ignore[method-assign]
    assert_close(case.run(times=3, hand_over=hand_over), case.expected(times=3), 1e-10)
    assert copies == 1


def test_a_gradient_that_others_hold_is_not_written_to() -> None:
    """What is done between two blocks gets the same gradient as the first of them."""
    case = stream_case("vit")
    hand_over = GradientHandOver()

    def gradients(hand_over: GradientHandOver | None) -> list[torch.Tensor]:
        leaf, other = case.stream.clone().requires_grad_(), torch.ones_like(case.stream).requires_grad_()
        arguments: Any = (case.index, case.block, case.attend, case.bank, torch.zeros_like(case.bank), case.groups)
        out = stream_block(leaf * 1.0, *arguments, hand_over=hand_over)
        out = out + other
        out = stream_block(out, *arguments, hand_over=hand_over)
        return list(torch.autograd.grad((out * case.upstream).sum(), (leaf, other)))

    for found, expected in zip(gradients(hand_over), gradients(None), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("stream", {"stream": torch.ones(8, 5, 23, dtype=torch.float64)}),
        ("index", {"index": torch.tensor([0, 1, 40])}),
        ("groups", {"index": torch.tensor([0, 1])}),
        ("bank", {"bank": torch.ones(9, 5)}),
        ("gradients", {"gradients": torch.ones(3, 5, dtype=torch.float64)}),
        ("dropout", {"dropout": [None]}),
    ],
)
def test_bad_arguments_are_named(name: str, changes: dict[str, Any]) -> None:
    case = stream_case("vit")
    arguments = {
        "stream": case.stream, "index": case.index, "block": case.block, "attend": case.attend, "bank": case.bank,
        "gradients": None, "groups": case.groups, "dropout": (),
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"^{name}: found .*expected"):
        stream_block(**(arguments | changes))
