"""Every op over as many clients as rows."""

import pytest
import torch

from ..many_groups import check_one_row_groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_row_groups(dtype):
    check_one_row_groups(10, "cpu", dtype)
