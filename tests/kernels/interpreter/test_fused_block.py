"""An MLP branch composed of the kernels equals plain torch."""

import pytest
import torch

from ..blocks import mlp_branch
from ..cases import assert_close


@pytest.mark.parametrize("dropout", [None, 0.3])
@pytest.mark.parametrize("ranks", [(8, 3), (40, 3)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_a_fused_branch_equals_plain_torch(dtype, tolerance, dropout, ranks):
    branch = mlp_branch(dtype, dropout, ranks)
    assert_close(branch.run_fused(), branch.run_plain(), tolerance)
