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


@DTYPES
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("ranks", "dropout"), [((16, 4), None), ((8,), 0.1), ((128, 1), None), ((64,), 0.1)])
def test_values_and_gradients_at_vit_sizes(dtype, layer, ranks, dropout):
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


def test_offsets_beyond_32_bits():
    """Rows times features pass 2^31: the last client's rows must still be its own."""
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of free GPU memory, found {free / 2**30:.0f}")
    rows, last = 720_000, 300
    small = lora_case([last], inputs=3072, outputs=64, slots=[3], dtype=torch.bfloat16).to("cuda")
    large = lora_case([1, last], inputs=3072, outputs=64, slots=[1, 3], dtype=torch.bfloat16).to("cuda")
    large.x = torch.zeros(rows + last, 3072, dtype=torch.bfloat16, device="cuda")
    large.x[rows:] = small.x
    large.grad_y = torch.zeros(rows + last, 64, dtype=torch.bfloat16, device="cuda")
    large.grad_y[rows:] = small.grad_y
    groups = large.groups
    large.groups = type(groups)([rows, last], torch.tensor(groups.host_slots), groups.scales, "cuda")
    found, expected = large.run(), small.run()
    assert torch.equal(found["y"][rows:], expected["y"])
    assert torch.equal(found["grad_x"][rows:], expected["grad_x"])
    assert torch.equal(found["grad_a"][1], expected["grad_a"][0])
    assert torch.equal(found["grad_b"][1], expected["grad_b"][0])
