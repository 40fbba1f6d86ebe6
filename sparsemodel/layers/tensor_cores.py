"""Linear layers under masks of whole blocks, on tensor cores through Triton."""

from __future__ import annotations

import torch

from sparsemodel.kernels.blocks import ops as block_ops
from sparsemodel.kernels.functional import sparse_linear
from sparsemodel.layers.base import SparseLayer


def block_linear(layer: SparseLayer, x: torch.Tensor) -> torch.Tensor:
    """x [*, in] -> [*, out] of a layer whose execution is "blocks".

    Where the kernels cannot run, through the dense weight in plain torch.
    """
    # The operator looks for the kernels itself, in compiled code when it runs.
    if (x.is_cuda and torch.compiler.is_compiling()) or block_ops.kernels_for(x) is not None:
        return block_ops.block_linear(
            x, layer.values, layer.bias, layer.row_ptr, layer.cols, layer.blocks, layer._side
        )
    index = layer._index(True)
    return sparse_linear(x, layer.values, layer.bias, index, layer._geometry, dense=True)
