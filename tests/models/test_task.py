"""What distinguishes a classifier from a causal language model: head, loss and scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fedra_engine.data.samples import NOT_LEARNT, Batch
from fedra_engine.models.task import CausalLM, Classification, ExitTable, HeadLayout, PassHeads, Task, exit_losses
from fedra_kernels import RowGroups
from tests.tiny import learnt_tokens

CLASSES, FEATURES = 3, 4
LAYOUT = HeadLayout(CLASSES, FEATURES)


def classifier() -> Classification:
    return Classification(nn.Linear(FEATURES, CLASSES).double(), LAYOUT)


def language_model(vocabulary: int = 7) -> CausalLM:
    head = nn.Linear(FEATURES, vocabulary, bias=False).double().requires_grad_(False)
    return CausalLM(head, HeadLayout(0, FEATURES, has_bias=False))


def groups(sizes: list[int], slots: list[int]) -> RowGroups:
    return RowGroups(sizes, torch.tensor(slots))


def test_a_layout_packs_what_it_loads() -> None:
    torch.manual_seed(0)
    linear_layer, other = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)
    LAYOUT.load(LAYOUT.pack(linear_layer), other)
    assert torch.equal(other.weight, linear_layer.weight)
    assert torch.equal(other.bias, linear_layer.bias)
    without = nn.Linear(FEATURES, CLASSES, bias=False)
    assert not LAYOUT.bias(LAYOUT.pack(without)).any()


def test_of_an_output_layer_nothing_is_trained() -> None:
    task = language_model()
    assert not task.trains_head
    assert task.layout.pack(task.head).shape == (0,)
    assert task.make_head(torch.zeros(0)) is task.head
    assert classifier().trains_head


def test_a_classifier_in_full_precision_takes_features_in_low_precision() -> None:
    values = torch.randn(LAYOUT.size)
    head = classifier().make_head(values)
    features = torch.randn(2, FEATURES).bfloat16()
    assert torch.equal(head(features), linear(features.float(), LAYOUT.weight(values), LAYOUT.bias(values)))


@pytest.mark.parametrize("distillation", [0.0, 0.7])
def test_losses_at_several_exits_are_those_of_each_client_alone(distillation: float) -> None:
    """The first client has three samples and two exits, the second two samples and one."""
    torch.manual_seed(0)
    task, labels = classifier(), torch.tensor([0, 2, 1, 1, 0])
    features = torch.randn(8, FEATURES, dtype=torch.float64, requires_grad=True)
    heads = torch.randn(4, LAYOUT.size, dtype=torch.float64)
    gradients = torch.zeros_like(heads)
    table = ExitTable(
        count=2,
        distillation=distillation,
        rows=torch.tensor([[0, 5], [1, 6], [2, 7], [3, 0], [4, 0]]),
        present=torch.tensor([[True, True]] * 3 + [[True, False]] * 2),
        clients=torch.tensor([0, 0, 0, 1, 1]),
        shares=1 / torch.tensor([3.0, 3, 3, 2, 2], dtype=torch.float64),
    )
    all_labels = torch.cat([labels, labels[:3]])
    batch = Batch({}, all_labels)
    found = task.losses(features, batch, PassHeads(heads, gradients, groups([3, 2, 3], [1, 0, 3]), table))
    found.sum().backward()

    alone = heads.clone().requires_grad_()
    leaf = features.detach().clone().requires_grad_()

    def logits(rows: slice, head: int) -> Tensor:
        return linear(leaf[rows], LAYOUT.weight(alone[head]), LAYOUT.bias(alone[head]))

    first = task.loss_alone([logits(slice(0, 3), 1), logits(slice(5, 8), 3)], labels[:3], distillation)
    second = task.loss_alone([logits(slice(3, 5), 0)], labels[3:], distillation)
    (first + second).backward()
    torch.testing.assert_close(found.detach(), torch.stack([first, second]).detach(), rtol=1e-12, atol=1e-12)
    assert features.grad is not None
    torch.testing.assert_close(features.grad, leaf.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients, alone.grad, rtol=1e-10, atol=1e-12)


def test_a_loss_that_is_not_a_number_stays_with_its_client() -> None:
    logits = torch.randn(3, CLASSES, dtype=torch.float64)
    logits[0] = torch.nan
    table = ExitTable(
        count=2,
        distillation=0.5,
        rows=torch.tensor([[0, 0], [1, 2]]),
        present=torch.tensor([[True, False], [True, True]]),
        clients=torch.tensor([0, 1]),
        shares=torch.ones(2, dtype=torch.float64),
    )
    assert exit_losses(logits, torch.tensor([0, 1, 1]), table).isfinite().tolist() == [False, True]


@pytest.mark.parametrize("make", [classifier, language_model])
def test_losses_of_clients_with_one_head_are_those_of_each_alone(make: type[Task]) -> None:
    torch.manual_seed(0)
    task = make()
    if task.trains_head:
        features, labels, learnt = torch.randn(5, FEATURES, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0]), None
    else:
        features, labels = torch.randn(5, 6, FEATURES, dtype=torch.float64), torch.randint(0, 7, (5, 6))
        labels[torch.rand(5, 6) < 0.3] = NOT_LEARNT
        learnt = learnt_tokens(labels)
    heads = torch.randn(2, task.layout.size, dtype=torch.float64)
    in_pass = PassHeads(heads, torch.zeros_like(heads), groups([3, 2], [1, 0]), None)
    found = task.losses(features, Batch({}, labels, learnt), in_pass)
    expected = [
        task.loss_alone([task.make_head(heads[head])(features[rows])], labels[rows], 0.0)
        for rows, head in ((slice(0, 3), 1), (slice(3, 5), 0))
    ]
    torch.testing.assert_close(found, torch.stack(expected).detach(), rtol=1e-12, atol=1e-12)


def test_logits_of_several_heads_are_averaged_to_a_prediction() -> None:
    heads = torch.zeros(2, LAYOUT.size, dtype=torch.float64)
    LAYOUT.bias(heads).copy_(torch.tensor([[3.0, 0, 1], [0, 0, 3]]))
    features = torch.zeros(6, FEATURES, dtype=torch.float64)
    features[2] = torch.nan
    scores = classifier().scores(features, Batch({}, torch.tensor([2, 0, 2] * 2)), list(heads))
    assert scores[:, :3].tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 1]]
    mean = torch.tensor([1.5, 0, 2], dtype=torch.float64)
    expected = [mean.exp().sum().log() - 2, mean.exp().sum().log() - 1.5, 0]
    assert scores[:, 3].tolist() == pytest.approx([float(loss) for loss in expected])


def test_a_language_model_is_tried_on_a_few_tokens() -> None:
    inputs = {"input_ids": torch.zeros(2, 30), "attention_mask": torch.zeros(2, 30)}
    assert {tensor.shape[1] for tensor in language_model().shortened(inputs).values()} == {8}
    assert classifier().shortened(inputs) is inputs
