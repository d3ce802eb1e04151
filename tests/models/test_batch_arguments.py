from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedra_engine.models.batch_arguments import BatchArguments, probe_batch_arguments
from fedra_engine.runtime.errors import InputError
from tests.tiny import DEPTH, make_model, make_samples

CPU = torch.device("cpu")


class Block(nn.Module):
    """Hidden states [samples, tokens, 4], and whatever else it is called with."""

    def __init__(self, output: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self._output = output

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> object:
        return self._output(self.linear(hidden))


class Model(nn.Module):
    """Calls its first `called` of 3 blocks with what `arguments` makes of the hidden states."""

    def __init__(
        self,
        arguments: Callable[[Tensor], tuple[object, ...]] = lambda x: (x,),
        output: Callable[[Tensor], object] = lambda y: y,
        called: int = 3,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(output) for _ in range(3))
        self._arguments, self._called = arguments, called

    def forward(self, pixel_values: Tensor) -> None:
        for block in self.blocks[: self._called]:
            block(*self._arguments(pixel_values))


def probe(model: Model) -> list[BatchArguments]:
    return probe_batch_arguments(model, model.blocks, lambda n: {"pixel_values": torch.ones(n, 5, 4)})


def of_family(family: str, rows: list[int] | None = None) -> list[BatchArguments]:
    """Probed with samples `rows` over and over again; the first ones when None."""
    model, samples = make_model(family, torch.float64).eval(), make_samples(family, 20)
    blocks = model.get_submodule(
        {"llama": "model.layers", "dinov3": "backbone.model.layer", "beit": "beit.layers"}[family]
    )
    assert isinstance(blocks, nn.ModuleList)
    return probe_batch_arguments(
        model,
        blocks,
        lambda n: samples.inputs(torch.arange(n) if rows is None else torch.tensor(rows * n), CPU, torch.float64),
    )


def test_what_grows_with_the_batch_is_cut_and_the_rest_left_alone() -> None:
    # A shared tensor of two rows looks as if it had the batch of the first probe.
    shared, index = torch.ones(2, 2), torch.tensor([2, 0])
    (first, *_) = probe(Model(lambda x: (x, x.new_ones(1, len(x), 3), shared, None)))
    hidden, mask = torch.randn(3, 5, 4), torch.randn(1, 3, 3)
    (found, cut, same, nothing), _ = first.select((hidden, mask, shared, None), {}, index, hidden[index])
    assert torch.equal(found, hidden[index])
    assert torch.equal(cut, mask[:, index])
    assert same is shared
    assert nothing is None


def test_a_mask_that_a_pass_goes_without_is_left_out() -> None:
    (first, *_) = probe(Model(lambda x: (x, x.new_ones(len(x), 1))))
    hidden = torch.randn(3, 5, 4)
    (_, mask), _ = first.select((hidden, None), {}, torch.tensor([1]), hidden[1:2])
    assert mask is None


@pytest.mark.parametrize("family", ["dinov3", "beit"])
def test_positions_shared_by_all_samples_are_no_batch(family: str) -> None:
    assert [arguments.dimensions.count(0) for arguments in of_family(family)] == [1] * DEPTH


def test_masks_are_found_although_the_probed_text_has_no_padding() -> None:
    full = int(make_samples("llama", 20).tensors["attention_mask"].sum(1).argmax())
    for arguments in of_family("llama", [full]):
        # Hidden states and mask.
        assert arguments.dimensions.count(0) == 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Model(lambda x: (x.flatten(0, 1),)),
            r"argument of block 0 has shape \(10, 4\) for 2 samples and \(15, 4\) for 3",
        ),
        (Model(lambda x: (x.transpose(0, 1),)), "block 0 is not given hidden states with the batch as first dimension"),
        (Model(output=lambda y: y[:, :1]), "block 0 does not return hidden states of the shape it is given"),
        (Model(output=lambda y: (y, y)), "block 0 returns tensors beside its hidden states"),
        (Model(called=2), "the model called 2 of the 3 blocks found"),
        (Model(lambda x: (x @ torch.ones(5),)), "Model cannot take the data's inputs"),
    ],
    ids=["merged", "not first", "other shape", "more", "not all", "wrong input"],
)
def test_blocks_that_cannot_be_cut_are_refused(model: Model, message: str) -> None:
    with pytest.raises(InputError, match=rf"model\.(path|block_path): .*{message}"):
        probe(model)


def test_a_block_that_returns_a_tuple_gets_one_back() -> None:
    (first, *_) = probe(Model(output=lambda y: (y, None)))
    hidden = torch.ones(2, 5, 4)
    assert first.output(hidden) == (hidden, None)
