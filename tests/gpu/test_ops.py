"""The other ops on a GPU at real sizes against their float64 references."""

from functools import partial
from itertools import count

import pytest
import torch

from benchmarks.kernels.block_shapes import BlockShape
from fedra_kernels import (
    Dropout,
    RowGroups,
    adamw,
    adamw_reference,
    aggregate,
    aggregate_reference,
    finish_aggregate,
    head_cross_entropy,
    head_cross_entropy_reference,
    head_logits,
    head_logits_reference,
    low_rank_add,
    low_rank_add_reference,
    sgd,
    sgd_reference,
    squared_norms,
    squared_norms_reference,
    stream_block,
    stream_block_reference,
)
from fedra_kernels.dropout import keep_mask

from ..kernels.cases import TOLERANCE, assert_close
from ..kernels.launcher_cases import (
    Launcher,
    check_activation,
    check_norm,
    check_outer,
    check_output_gradient,
    check_rows_outside,
)
from ..kernels.stream_cases import KINDS, in_dtype, stream_case

DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
SIZES = [197, 0, 1, 8 * 197, 50]
ROWS, WIDTH = sum(SIZES), 768
# A ViT's in every dtype, and one with neither rows of 16 bytes nor whole tiles. Each is compiled for.
WIDTHS = pytest.mark.parametrize(
    ("dtype", "width"), [(dtype, WIDTH) for dtype in TOLERANCE] + [(torch.bfloat16, 331)], ids=str
)


def _randn(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def _index(count, rows):
    return torch.randperm(count, generator=torch.Generator("cuda").manual_seed(1), device="cuda")[:rows]


def _grads(outputs, inputs, upstream):
    return torch.autograd.grad(outputs, inputs, upstream)


def _tolerance(dtype):
    return 5e-5 if dtype == torch.float32 else TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(("dropout", "rank"), [(None, 16), (0.1, 4)])
@WIDTHS
def test_a_norm_with_three_shrinks_equals_float64(dtype, kind, dropout, rank, width):
    case = Launcher(SIZES, "cuda", dtype, dropout=dropout, tolerance=_tolerance(dtype))
    check_norm(case, kind, width, banks=3, rank=rank)


@WIDTHS
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize(("dropout", "rank"), [(None, 16), (0.1, 100)])
def test_an_activation_equals_float64_and_sums_up_gradients(dtype, kind, dropout, rank, width):
    case = Launcher(SIZES, "cuda", dtype, dropout=dropout, tolerance=_tolerance(dtype))
    check_activation(case, kind, width, rank=rank)


@WIDTHS
@pytest.mark.parametrize(("indexed", "scaled"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("rank", [16, 32])
def test_one_read_of_a_gradient_gives_its_rows_ds_and_db(dtype, width, indexed, scaled, rank):
    case = Launcher(SIZES, "cuda", dtype, tolerance=_tolerance(dtype))
    check_output_gradient(case, [width], rank=rank, indexed=indexed, scaled=scaled)


@WIDTHS
def test_one_launch_takes_the_gradients_of_query_key_and_value(dtype, width):
    case = Launcher(SIZES, "cuda", dtype, tolerance=_tolerance(dtype))
    check_output_gradient(case, [width, 192, 192], rank=16)


@WIDTHS
@pytest.mark.parametrize(("kind", "dropout", "rank", "banks"), [("layer", None, 16, 3), ("rms", 0.1, 100, 1)])
def test_da_of_the_norm_of_rows_equals_float64(dtype, width, kind, dropout, rank, banks):
    case = Launcher(SIZES, "cuda", dtype, dropout=dropout, tolerance=_tolerance(dtype))
    check_outer(case, kind, width, rank=rank, banks=banks)


@pytest.mark.parametrize("dropout", [None, 0.3])
@pytest.mark.parametrize("name", KINDS)
def test_a_block_equals_its_reference(name, dropout):
    case = stream_case(name, dropout=dropout, dtype=torch.float32, samples=(4, 0, 1, 9)).to("cuda")
    expected = case.expected()
    assert_close(case.run(), expected, 5e-5)
    assert_close(case.run(recompute=True), expected, 5e-5)


@pytest.mark.parametrize("dropout", [None, 0.1])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_block_of_real_size_equals_its_reference(dtype, gated, dropout):
    tokens, samples = 197, [1, 0, 8, 2]
    groups = RowGroups([tokens * count for count in samples], torch.tensor([3, 0, 1, 4]), "cuda")
    shape = BlockShape(WIDTH, 4 * WIDTH, 12, 3 if gated else 12, gated=gated, rank=16, scaled=not gated)
    seeds = count()
    block = shape.block(lambda *sizes: _randn(*sizes, seed=next(seeds), dtype=dtype))
    attend = partial(shape.attend, tokens=tokens)
    stream, upstream = (_randn(2 * groups.rows, WIDTH, seed=seed, dtype=dtype) for seed in (50, 51))
    bank, index = _randn(5, shape.slot_size, seed=52, dtype=dtype) / 30, _index(2 * groups.rows, groups.rows)
    drop = [] if dropout is None else [Dropout(dropout, torch.arange(4, device="cuda"))] * len(shape.linears)
    gradients, leaf = torch.zeros(bank.shape, device="cuda"), stream.requires_grad_()
    out = stream_block(leaf * 1.0, index, block, attend, bank, gradients, groups, drop)
    (grad,) = _grads(out, [leaf], upstream)
    leaves = [tensor.detach().double().requires_grad_() for tensor in (stream, bank)]
    expected = stream_block_reference(leaves[0], index, in_dtype(block, torch.float64), attend, leaves[1], groups, drop)
    wanted = _grads(expected, leaves, upstream.double())
    found = {"out": out, "grad": grad, "bank": gradients}
    # Ten roundings follow one another.
    assert_close(found, dict(zip(found, (expected, *wanted), strict=True)), 5 * TOLERANCE[dtype])


@WIDTHS
@pytest.mark.parametrize("rank", [8, 32, 100, 128])
def test_low_rank_add_equals_its_reference(dtype, width, rank):
    stream, upstream = (_randn(2 * ROWS, width, seed=seed, dtype=dtype) for seed in (1, 2))
    down = _randn(width, rank, seed=3, dtype=dtype) / width**0.5
    up = _randn(rank, width, seed=4, dtype=dtype) / rank**0.5
    shift, bias = _randn(rank, seed=5, dtype=dtype), _randn(width, seed=6, dtype=dtype)
    index, wide, leaf = _index(2 * ROWS, ROWS), stream.double().requires_grad_(), stream.requires_grad_()
    expected = low_rank_add_reference(wide, index, *(each.double() for each in (down, up, shift, bias)))
    found = low_rank_add(leaf * 1.0, index, down, up, shift, bias)
    (grad,), (want,) = _grads(found, [leaf], upstream), _grads(expected, [wide], upstream.double())
    assert_close({"sum": found, "grad": grad}, {"sum": expected, "grad": want}, _tolerance(dtype))


def test_the_dropout_mask_is_the_cpus():
    keys = torch.tensor([5, 2**62 + 3, 2**40])
    on_gpu = keep_mask(Dropout(0.3, keys.cuda()), [100, 0, 57], 771)
    assert torch.equal(on_gpu.cpu(), keep_mask(Dropout(0.3, keys), [100, 0, 57], 771))


@WIDTHS
@pytest.mark.parametrize("classes", [2, 100, 345])
def test_head_cross_entropy_equals_its_reference(dtype, classes, width):
    sizes, slots = [32, 0, 1, 128], [4, 1, 0, 2]
    groups = RowGroups(sizes, torch.tensor(slots), "cuda")
    leaves = [
        _randn(161, width, seed=1, dtype=dtype),
        _randn(5, classes, width, seed=2, dtype=dtype) / width**0.5,
        _randn(5, classes, seed=3, dtype=dtype),
    ]
    labels = torch.randint(classes, (161,), device="cuda")
    sinks = [torch.zeros(leaf.shape, device="cuda") for leaf in leaves[1:]]
    features = leaves[0].detach().requires_grad_()
    losses, correct = head_cross_entropy(features, *leaves[1:], labels, groups, *sinks)
    upstream = torch.linspace(0.5, 2.0, 4, device="cuda")
    losses.backward(upstream)
    wide = [leaf.double().requires_grad_() for leaf in leaves]
    expected, _ = head_cross_entropy_reference(*wide, labels, groups)
    grads = _grads(expected, wide, upstream.double())
    assert 0 <= int(correct.sum()) <= 161
    assert_close(
        {"losses": losses, "features": features.grad, "weight": sinks[0], "bias": sinks[1]},
        {"losses": expected, "features": grads[0], "weight": grads[1], "bias": grads[2]},
        _tolerance(dtype),
    )


@WIDTHS
def test_head_logits_equal_their_reference(dtype, width):
    groups = RowGroups([32, 0, 1, 128], torch.tensor([4, 1, 0, 2]), "cuda")
    leaves = [
        _randn(161, width, seed=1, dtype=dtype),
        _randn(5, 101, width, seed=2, dtype=dtype) / width**0.5,
        _randn(5, 101, seed=3, dtype=dtype),
    ]
    sinks = [torch.zeros(leaf.shape, device="cuda") for leaf in leaves[1:]]
    features = leaves[0].detach().requires_grad_()
    logits = head_logits(features, *leaves[1:], groups, *sinks)
    upstream = _randn(161, 101, seed=4, dtype=dtype).float()
    logits.backward(upstream)
    wide = [leaf.double().requires_grad_() for leaf in leaves]
    expected = head_logits_reference(*wide, groups)
    grads = _grads(expected, wide, upstream.double())
    assert_close(
        {"logits": logits, "features": features.grad, "weight": sinks[0], "bias": sinks[1]},
        {"logits": expected, "features": grads[0], "weight": grads[1], "bias": grads[2]},
        _tolerance(dtype),
    )


OPTIONS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def _columns(seed, dtype, size):
    """[40, size], some columns of a wider bank; not aligned for wide loads."""
    return _randn(40, size + 8, seed=seed, dtype=dtype)[:, 3 : 3 + size]


@DTYPES
@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("size", [43_008, 1001])
@pytest.mark.parametrize("state", ["as param", "fp32"])
def test_optimizers_and_norms_equal_their_references(dtype, zero_grad, size, state):
    others = dtype if state == "as param" else torch.float32
    param, grad, mean, square = (_columns(seed, dtype if seed == 0 else others, size) for seed in range(4))
    square.square_()
    slots, step = _index(40, 30), torch.arange(1, 31, device="cuda")
    lr, clip = (torch.linspace(0.1, 1.0, 30, device="cuda") for _ in range(2))
    unused = [slot for slot in range(40) if slot not in slots.tolist()]
    gradient, before = grad.clone(), param.clone()
    wide = [bank[slots].double() for bank in (param, grad, mean, square)]
    assert_close({"norms": squared_norms(grad, slots)}, {"norms": squared_norms_reference(grad.double(), slots)}, 1e-5)

    expected = sgd_reference(*wide[:3], lr.double(), clip.double(), step, momentum=0.9, weight_decay=0.1)
    other, buffer = param.clone(), mean.clone()
    sgd(other, grad, buffer, slots, lr, clip, step, momentum=0.9, weight_decay=0.1)
    assert_close({"p": other[slots], "b": buffer[slots]}, {"p": expected[0], "b": expected[1]}, TOLERANCE[dtype])
    assert torch.equal(grad, gradient)

    wanted = adamw_reference(*wide, lr.double(), clip.double(), step, **OPTIONS)
    shadow = torch.zeros_like(param, dtype=torch.bfloat16)
    adamw(param, grad, mean, square, slots, lr, clip, step, shadow=shadow, zero_grad=zero_grad, **OPTIONS)
    found = {"p": param[slots], "m": mean[slots], "s": square[slots]}
    assert_close(found, dict(zip("pms", wanted, strict=True)), TOLERANCE[dtype])
    assert_close({"shadow": shadow[slots]}, {"shadow": wanted[0]}, TOLERANCE[torch.bfloat16])
    assert torch.equal(param[unused], before[unused])
    if zero_grad:
        gradient[slots] = 0.0
    assert torch.equal(grad, gradient)


@DTYPES
@pytest.mark.parametrize("size", [43_008, 1001])
def test_aggregate_equals_its_reference(dtype, size):
    values, slots = _randn(400, size, seed=1, dtype=dtype), _index(400, 380)
    blocks = torch.randint(11, (380,), device="cuda")
    weights = torch.rand(380, device="cuda") + 0.5
    sums, totals = torch.zeros(12, size, device="cuda"), torch.zeros(12, device="cuda")
    expected = aggregate_reference(sums.double(), totals.double(), values.double(), slots, blocks, weights.double())
    aggregate(sums, totals, values, slots, blocks, weights)
    assert_close({"sums": sums, "totals": totals}, {"sums": expected[0], "totals": expected[1]}, 1e-5)
    previous = _randn(12, size, seed=2)
    mean = finish_aggregate(sums, totals, previous)
    assert torch.equal(mean[11], previous[11])
    assert_close({"mean": mean[:11]}, {"mean": expected[0][:11] / expected[1][:11, None]}, 1e-5)


def test_index_entries_out_of_range_touch_nothing():
    """On a GPU they are not checked on the host, but no kernel follows them."""
    bank, bad = _randn(4, 5000, seed=1), torch.tensor([-1, 2, 4, 10**12], device="cuda")
    before, ones = bank.clone(), torch.ones(4, device="cuda")
    sgd(bank, bank.clone(), None, bad, ones, ones, torch.ones_like(bad), momentum=0.0, weight_decay=0.0)
    assert torch.equal(bank[[0, 1, 3]], before[[0, 1, 3]])
    assert squared_norms(before, bad).isnan().tolist() == [True, False, True, True]
    hidden = _randn(4, WIDTH, seed=2)
    stream = hidden.clone()
    low_rank_add(stream, bad, hidden.T, hidden, hidden[0, :4], hidden[0])
    assert torch.equal(stream[[0, 1, 3]], hidden[[0, 1, 3]])
    check_rows_outside("cuda", WIDTH)
    torch.cuda.synchronize()
