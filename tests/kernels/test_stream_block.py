"""`stream_block` on the torch path: against its reference, and what it keeps and writes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedra_engine.execution.memory import saved_bytes
from fedra_kernels import AdapterColumns, Dropout, GradientHandOver, RowGroups, stream_block, stream_block_reference
from fedra_kernels.dispatch import StandIn, launches_taken_by

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


class CountingHandOver(GradientHandOver):
    """Counts the gradients that had to be copied."""

    copies = 0

    def take(self, grad: torch.Tensor) -> torch.Tensor:
        taken = super().take(grad)
        self.copies += taken is not grad
        return taken


def test_blocks_hand_over_the_gradient_of_the_stream() -> None:
    case = stream_case("vit")
    hand_over = CountingHandOver()
    assert_close(case.run(times=3, hand_over=hand_over), case.expected(times=3), 1e-10)
    assert hand_over.copies == 1


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


@pytest.mark.parametrize("late", [False, True])
def test_a_gradient_that_a_hook_holds_is_not_written_to(late: bool) -> None:
    case = stream_case("vit")
    all_rows = RowGroups([case.stream[..., 0].numel()], torch.tensor(case.groups.host_slots[:1]))
    arguments: Any = (case.block, case.attend, case.bank, torch.zeros_like(case.bank))
    # A block that has all rows leaves its input as it was, so that a hook can be registered afterwards.
    second: Any = (None, *arguments, all_rows) if late else (case.index, *arguments, case.groups)

    def held_gradient(hand_over: GradientHandOver | None) -> torch.Tensor:
        held: list[torch.Tensor] = []
        start = case.stream.clone().requires_grad_() * 1.0
        out = stream_block(start, case.index, *arguments, case.groups, hand_over=hand_over)
        if not late:
            out.register_hook(held.append)
        last = stream_block(out, *second, hand_over=hand_over)
        if late:
            out.register_hook(held.append)
        last.sum().backward()
        return held[0]

    assert torch.equal(held_gradient(GradientHandOver()), held_gradient(None))


def test_an_attention_need_not_use_all_that_it_is_given() -> None:
    case = stream_case("vit")

    def gradient(of: Any) -> torch.Tensor:
        leaf = case.stream.clone().requires_grad_()
        (of(leaf * 1.0) * case.upstream).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    def attend(projected: Sequence[torch.Tensor]) -> torch.Tensor:
        return projected[0] * 1.0

    found = gradient(lambda x: stream_block(x, case.index, case.block, attend, case.bank, None, case.groups))
    expected = gradient(lambda x: stream_block_reference(x, case.index, case.block, attend, case.bank, case.groups))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_inference_mode_gives_the_same() -> None:
    case = stream_case("llama")
    arguments: Any = (case.index, case.block, case.attend, case.bank, None, case.groups)
    with torch.no_grad():
        expected = stream_block(stream_block(case.stream.clone(), *arguments), *arguments)
    hand_over = GradientHandOver()
    with torch.inference_mode():
        once = stream_block(case.stream.clone(), *arguments, hand_over=hand_over)
        assert torch.equal(stream_block(once, *arguments, hand_over=hand_over), expected)


def test_what_an_attention_keeps_besides_is_counted() -> None:
    """An attention whose graph keeps neither what it is given nor its result."""
    case = stream_case("vit", dtype=torch.float32)
    stream = case.stream.clone().requires_grad_() * 1.0

    def attend(projected: Sequence[torch.Tensor]) -> torch.Tensor:
        return projected[0] + projected[1] * 2.0 + projected[2]

    def run() -> torch.Tensor:
        return stream_block(stream, case.index, case.block, attend, case.bank, None, case.groups)

    kept = saved_bytes(run, [case.bank, *(layer.weight for layer in case.block.layers)])
    # Rows in and between, query, key and value, what attention made of them, and fc1's outputs.
    assert kept >= 4 * case.groups.rows * (2 * 24 + 72 + 24 + 40)


def test_a_second_backward_pass_is_refused() -> None:
    case = stream_case("vit")
    out = stream_block(
        case.stream.clone().requires_grad_() * 1.0, case.index, case.block, case.attend, case.bank, None, case.groups
    )
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="found a second backward pass"):
        out.sum().backward()


def test_without_a_backward_pass_nothing_is_kept() -> None:
    case = stream_case("vit")
    needed = []

    def attend(projected: Sequence[torch.Tensor]) -> torch.Tensor:
        needed.extend(part.requires_grad for part in projected)
        return case.attend(projected)

    arguments = (case.index, case.block, attend, case.bank.requires_grad_(), None, case.groups)
    with torch.no_grad():
        stream_block(case.stream.clone(), *arguments)
    stream_block(case.stream.clone(), *arguments)
    assert needed == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("stream", {"stream": torch.ones(8, 5, 23, dtype=torch.float64)}),
        ("index", {"index": torch.tensor([0, 1, 40])}),
        ("groups", {"index": torch.tensor([0, 1])}),
        ("bank", {"bank": torch.ones(9, 5)}),
        ("gradients", {"gradients": torch.ones(3, 5, dtype=torch.float64)}),
        ("dropout", {"dropout": [None]}),
        ("dropout", {"dropout": [Dropout(0.1, torch.arange(4))] * 5 + [None]}),
        ("dropout", {"dropout": [Dropout(0.1, torch.arange(4))] * 5 + [Dropout(0.2, torch.arange(4))]}),
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


@pytest.mark.parametrize(
    ("name", "part", "changes"),
    [
        ("activation", "", {"activation": "relu"}),
        ("norm1.weight", "norm1", {"weight": torch.ones(3, 24)}),
        ("norm2.weight", "norm2", {"weight": torch.ones(23)}),
        ("norm2.bias", "norm2", {"bias": torch.ones(24)}),
        ("scale1", "", {"scale1": torch.ones(24, device="meta", dtype=torch.float64)}),
        ("mlp_inputs", "", {"activation": "swiglu"}),
        ("attention_inputs.weight", "attention_inputs", {"weight": torch.ones(71, 24)}),
        ("mlp_output.bias", "mlp_output", {"bias": torch.ones(23)}),
        ("outputs of the last Linears", "attention_output", {"widths": (12, 12), "adapters": (None, None)}),
        ("widths", "attention_inputs", {"widths": (18,) * 4, "adapters": (None,) * 4}),
        ("adapters", "mlp_inputs", {"adapters": (AdapterColumns(0, 0, 129, 1.0),)}),
        ("adapters", "mlp_inputs", {"adapters": (AdapterColumns(0, 0, 8, 1.0, trains_a=False),)}),
        ("adapters", "mlp_inputs", {"adapters": (AdapterColumns(9999, 9999, 8, 1.0),)}),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_named(name: str, part: str, changes: dict[str, Any]) -> None:
    block = stream_case("dinov2").block
    with pytest.raises(ValueError, match=f"^{name}: found .*expected"):
        replace(block, **({part: replace(getattr(block, part), **changes)} if part else changes))


def test_a_bank_of_other_slots_is_refused() -> None:
    case = stream_case("vit")
    wider = torch.cat([case.bank, case.bank[:, :7]], dim=1)
    with pytest.raises(ValueError, match=r"^bank: found \d+ entries of a slot, expected \d+$"):
        stream_block(case.stream, case.index, case.block, case.attend, wider, None, case.groups)


@pytest.mark.parametrize(("name", "wide"), [("vit", 40), ("llama", 80)])
@pytest.mark.parametrize("recompute", [False, True])
def test_only_what_cannot_be_computed_again_is_kept(name: str, wide: int, recompute: bool) -> None:
    """Rows that went in, query, key and value, what attention made of them, the rows between, and the MLP's first
    outputs; not the outputs of norms, nor that of the activation."""
    case = stream_case(name, dtype=torch.bfloat16)
    rows, rank, bank = case.groups.rows, case.kind.rank, case.bank.requires_grad_()
    stream = case.stream.requires_grad_() * 1.0
    # torch's own attention keeps its operands and its result.
    attend = case.flash_attend
    parameters = [part for layer in case.block.layers for part in (layer.weight, layer.bias)]
    norms = [part for norm in (case.block.norm1, case.block.norm2) for part in (norm.weight, norm.bias)]
    excluded = [tensor for tensor in (*parameters, *norms, case.index, case.bank) if tensor is not None]

    def run() -> torch.Tensor:
        return stream_block(
            stream, case.index, case.block, attend, bank, torch.zeros(bank.shape), case.groups, recompute=recompute
        )

    with launches_taken_by(StandIn("sm_90")):
        kept = saved_bytes(run, excluded)
    features, queries, projected = 24, 24, sum(case.block.attention_inputs.widths)
    of_rows = 2 * features if recompute else 2 * (2 * features + projected + queries + wide)
    moments, shrunk = 4 * 4, 2 * rank * sum(len(layer.present) for layer in case.block.layers)
    log_sums = 4 * 3
    expected = of_rows if recompute else of_rows + moments + shrunk + log_sums
    assert kept == rows * expected
