"""The cases of test_triton_blocks.py on a GPU, and those that only one can run."""

import pytest
import torch
from test_triton_blocks import *  # noqa: F403
from test_triton_blocks import make

from sparsemodel.kernels.blocks import ops as block_ops
from sparsemodel.kernels.blocks import triton_blocks


def test_the_kernels_are_what_runs(way: str) -> None:
    expected = None if way == "reference" else triton_blocks.KERNELS
    assert block_ops.kernels_for(torch.zeros(1)) is expected


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_tf32_is_used_only_where_torch_may(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of 4,096 products, by their terms: those of TF32 are off by up to 2⁻¹⁰ of themselves."""
    monkeypatch.setattr(block_ops, "kernels_for", lambda x: triton_blocks.KERNELS)
    c = make((4, 64, 64, 300), 1.0, torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        y = block_ops.block_linear(c.x, c.values, None, *c.operands())
    finally:
        torch.set_float32_matmul_precision(before)
    expected, terms = c.x.double() @ c.weight.t(), c.x.double().abs() @ c.weight.t().abs()
    error = float(((y.double() - expected).abs() / terms).max())
    assert (error < 16 * torch.finfo(torch.float32).eps) == (precision == "highest")
    assert error < 2**-10
