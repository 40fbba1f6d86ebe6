"""The Triton kernels compile for GPUs, on a machine without one, too."""

from typing import Any

import pytest

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from sparsemodel.kernels.blocks import triton_blocks

INDICES = {"row_ptr", "cols", "col_ptr", "block_rows", "starts"}
REALS = {"x", "values", "bias", "y", "dy", "dx", "dvalues"}


def source(kernel: str, real: str, side: int, precision: str) -> ASTSource:
    """A kernel with the types of its arguments; strides of 1 along features, as is usual."""
    function = getattr(triton_blocks.KERNELS, kernel)
    constants: dict[str, Any] = {
        "side": side, "num_rows": 64, "precision": precision, "has_bias": True,
        "x_col": 1, "dy_col": 1,
    }  # fmt: skip
    constants = {name: constants[name] for name in function.arg_names if name in constants}
    signature = dict.fromkeys(function.arg_names, "i32")
    signature |= {name: "*i32" for name in signature if name in INDICES}
    signature |= {name: f"*{real}" for name in signature if name in REALS}
    signature |= dict.fromkeys(constants, "constexpr")
    return ASTSource(fn=function, signature=signature, constexprs=constants)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("real", "precision"), [("fp32", "ieee"), ("fp32", "tf32"), ("bf16", "ieee"), ("fp16", "ieee")]
)
@pytest.mark.parametrize("kernel", triton_blocks.Kernels._fields)
def test_products_are_on_tensor_cores(arch: int, real: str, precision: str, kernel: str) -> None:
    """All but those of exact float32."""
    code = compile(source(kernel, real, 32, precision), target=GPUTarget("cuda", arch, 32))
    assert code.asm["cubin"]
    on_tensor_cores = "mma.sync" in code.asm["ptx"] or "wgmma.mma_async" in code.asm["ptx"]
    assert on_tensor_cores == (precision == "tf32" or real != "fp32")
