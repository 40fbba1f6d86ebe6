"""Linear layers under structured masks: blocks through Triton, 2:4 through cuSPARSELt."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from sparsemodel.kernels.blocks import ops as block_ops
from sparsemodel.kernels.blocks import semi_structured
from sparsemodel.kernels.functional import sparse_linear
from sparsemodel.layers.base import SparseLayer

# Compressed weights of layers in inference. Beside the layers, so that copies and files of them
# know nothing of it.
_COMPRESSED: WeakKeyDictionary[SparseLayer, semi_structured.Compressed] = WeakKeyDictionary()


def structured_linear(layer: SparseLayer, x: torch.Tensor) -> torch.Tensor:
    """x [*, in] -> [*, out] as the layer's execution, "blocks" or "2:4", says.

    Where its kernels cannot run, through the dense weight in plain torch.
    """
    if layer.execution == "2:4":
        why = semi_structured.obstacle(layer.values, layer.weight_shape)
        if why is not None:
            semi_structured.warn_once(why)
        elif x.numel() and x.dtype == layer.values.dtype:
            return _two_of_four(layer, x)
    elif (x.is_cuda and torch.compiler.is_compiling()) or block_ops.kernels_for(x) is not None:
        # The operator looks for the kernels itself, in compiled code when it runs.
        return block_ops.block_linear(
            x, layer.values, layer.bias, layer.row_ptr, layer.cols, layer.blocks, layer._side
        )
    index = layer._index(True)
    return sparse_linear(x, layer.values, layer.bias, index, layer._geometry, dense=True)


def _two_of_four(layer: SparseLayer, x: torch.Tensor) -> torch.Tensor:
    values, row_ptr, cols = layer.values, layer.row_ptr, layer.cols
    if torch.is_grad_enabled():
        return semi_structured.linear(x, values, layer.bias, row_ptr, cols)
    kept = semi_structured.refreshed(
        _COMPRESSED.get(layer), values, row_ptr, cols, layer._geometry.in_channels
    )
    _COMPRESSED[layer] = kept
    return semi_structured.product(x, kept.weight, layer.bias)
