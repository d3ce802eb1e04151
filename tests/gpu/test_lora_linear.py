"""lora_linear on a GPU at real sizes: numerics, determinism, independence of the other clients."""

import pytest
import torch

from ..kernels.cases import TOLERANCE, assert_close, lora_case

TOKENS = 197
SIZES = [8 * TOKENS, 0, 3 * TOKENS, TOKENS, 16 * TOKENS, 1, 5 * TOKENS]
LAYERS = {"attention": (768, 768), "qkv": (768, 2304), "fc1": (768, 3072), "fc2": (3072, 768)}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def _case(sizes=SIZES, layer="qkv", **options):
    inputs, outputs = LAYERS[layer]
    return lora_case(sizes, inputs=inputs, outputs=outputs, **options).to("cuda")


# Each is compiled for: every rank and dtype at one layer, every layer and dtype at one pair of ranks.
RANKS = [((1,), None), ((7,), None), ((8,), 0.1), ((16, 4), None), ((64,), 0.1), ((128, 1), None)]
CASES = [("attention", ranks, drop, dtype) for ranks, drop in RANKS for dtype in TOLERANCE]
CASES += [(layer, (16, 4), None, dtype) for layer in ("qkv", "fc1", "fc2") for dtype in TOLERANCE]


@pytest.mark.parametrize(("layer", "ranks", "dropout", "dtype"), CASES, ids=str)
def test_values_and_gradients_at_vit_sizes(layer, ranks, dropout, dtype):
    case = _case(layer=layer, ranks=ranks, dtype=dtype, dropout=dropout)
    # fp32 sums of 3,072 products in another order than the reference's.
    tolerance = 5e-5 if dtype == torch.float32 else TOLERANCE[dtype]
    assert_close(case.run(), case.expected(), tolerance)


@DTYPES
def test_layers_wider_than_the_single_pass(dtype):
    case = lora_case([900, 1100], inputs=512, outputs=4608, ranks=(16,), dtype=dtype).to("cuda")
    assert_close(case.run(), case.expected(), 5e-5 if dtype == torch.float32 else TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(50, 70), (770, 129)], ids=str)
@DTYPES
def test_sizes_without_alignment(dtype, shape):
    case = lora_case([300, 1, 45], inputs=shape[0], outputs=shape[1], ranks=(5,), dtype=dtype).to("cuda")
    assert_close(case.run(), case.expected(), 5e-5 if dtype == torch.float32 else TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("ranks", [(16, 4), (64,)], ids=str)
@pytest.mark.parametrize("grad_x", [False, True])
@pytest.mark.parametrize("frozen", [("grad_a",), ("grad_b",)])
def test_a_frozen_factor_has_no_gradient(dtype, ranks, grad_x, frozen):
    case = _case(layer="attention", ranks=ranks, dtype=dtype, dropout=0.1)
    found, expected = case.run(frozen=frozen, grad_x=grad_x), case.expected()
    assert frozen[0] not in found
    tolerance = 5e-5 if dtype == torch.float32 else TOLERANCE[dtype]
    assert_close(found, {name: expected[name] for name in found}, tolerance)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["lora_a", "lora_b"])
def test_a_client_that_diverged_harms_nobody_else(wrong, factor):
    sizes, slots = [100, 300, 70], [5, 3, 1]
    healthy = _case(sizes, slots=slots, dtype=torch.bfloat16).run()
    case = _case(sizes, slots=slots, dtype=torch.bfloat16)
    getattr(case, factor)[3, 2, 1] = wrong
    found = case.run()
    for name in ("y", "grad_x"):
        for rows in (slice(0, 100), slice(400, 470)):
            assert torch.equal(found[name][rows], healthy[name][rows])
    for name in ("grad_a", "grad_b"):
        for group in (0, 2):
            assert torch.equal(found[name][group], healthy[name][group])
