"""The grouped classifier and loss against autograd through the reference."""

import pytest
import torch

from fedra_kernels import head_cross_entropy, head_cross_entropy_reference, head_logits, head_logits_reference

from .helpers import make_groups, randn, relative_error

SLOTS, CLASSES, INPUTS = 6, 5, 9
GROUPS = {"equal": ([4, 4, 4], [1, 2, 3]), "ragged": ([3, 0, 1, 1, 6], [5, 0, 2, 4, 1])}


@pytest.mark.parametrize("shape", GROUPS)
@pytest.mark.parametrize("features_need_gradient", [True, False])
def test_losses_and_gradients_equal_autograd(shape, features_need_gradient):
    groups = make_groups(*GROUPS[shape])
    features = randn(groups.rows, INPUTS, seed=1).requires_grad_(features_need_gradient)
    weight = randn(SLOTS, CLASSES, INPUTS, seed=2).requires_grad_()
    bias = randn(SLOTS, CLASSES, seed=3)
    labels = torch.arange(groups.rows) % CLASSES
    sink_weight, sink_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    losses, correct = head_cross_entropy(features, weight, bias, labels, groups, sink_weight, sink_bias)
    upstream = randn(len(groups), seed=4)
    losses.backward(upstream)

    leaves = [tensor.detach().clone().requires_grad_() for tensor in (features, weight, bias)]
    expected, expected_correct = head_cross_entropy_reference(*leaves, labels, groups)
    expected.backward(upstream)
    assert relative_error(losses, expected) < 1e-12
    assert torch.equal(correct, expected_correct)
    if features_need_gradient:
        assert relative_error(features.grad, leaves[0].grad) < 1e-12
    assert relative_error(sink_weight, leaves[1].grad) < 1e-12
    assert relative_error(sink_bias, leaves[2].grad) < 1e-12
    assert weight.grad is None


@pytest.mark.parametrize("shape", GROUPS)
@pytest.mark.parametrize("features_need_gradient", [True, False])
def test_logits_and_gradients_equal_autograd(shape, features_need_gradient):
    groups = make_groups(*GROUPS[shape])
    features = randn(groups.rows, INPUTS, seed=1).requires_grad_(features_need_gradient)
    weight, bias = randn(SLOTS, CLASSES, INPUTS, seed=2).requires_grad_(), randn(SLOTS, CLASSES, seed=3)
    sinks = torch.zeros_like(weight), torch.zeros_like(bias)
    logits = head_logits(features, weight, bias, groups, *sinks)
    upstream = randn(groups.rows, CLASSES, seed=4)
    logits.backward(upstream)

    leaves = [tensor.detach().clone().requires_grad_() for tensor in (features, weight, bias)]
    expected = head_logits_reference(*leaves, groups)
    expected.backward(upstream)
    assert relative_error(logits, expected) < 1e-12
    if features_need_gradient:
        assert relative_error(features.grad, leaves[0].grad) < 1e-12
    assert relative_error(sinks[0], leaves[1].grad) < 1e-12
    assert relative_error(sinks[1], leaves[2].grad) < 1e-12
    assert weight.grad is None


@pytest.mark.parametrize("op", [head_logits, head_cross_entropy])
def test_heads_of_16_bit_features_answer_in_fp32(op):
    groups = make_groups([3, 2], [1, 2])
    features, weight, bias = (
        randn(*shape, seed=1).bfloat16() for shape in ((5, INPUTS), (SLOTS, CLASSES, INPUTS), (SLOTS, CLASSES))
    )
    features.requires_grad_()
    labels = [torch.zeros(5, dtype=torch.int64)] if op is head_cross_entropy else []
    sinks = [torch.zeros(bank.shape) for bank in (weight, bias)]
    out = op(features, weight, bias, *labels, groups, *sinks)
    result = out[0] if labels else out
    result.sum().backward()
    assert result.dtype == torch.float32
    assert features.grad.dtype == torch.bfloat16
    assert sinks[0][1:3].abs().sum() > 0


def test_a_group_without_samples_has_loss_zero():
    groups = make_groups([0, 2], [0, 1])
    weight, bias = randn(SLOTS, CLASSES, INPUTS, seed=2), randn(SLOTS, CLASSES, seed=3)
    losses, correct = head_cross_entropy(
        randn(2, INPUTS, seed=1), weight, bias, torch.zeros(2, dtype=torch.int64), groups, weight, bias
    )
    assert losses[0] == 0
    assert correct[0] == 0


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_labels_out_of_range_are_rejected(label):
    groups = make_groups([2], [1])
    weight, bias = randn(SLOTS, CLASSES, INPUTS, seed=2), randn(SLOTS, CLASSES, seed=3)
    with pytest.raises(ValueError, match=f"^labels: found {label}"):
        head_cross_entropy(randn(2, INPUTS, seed=1), weight, bias, torch.tensor([0, label]), groups, weight, bias)
