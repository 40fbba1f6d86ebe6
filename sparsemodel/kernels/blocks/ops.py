"""Block-sparse linear layers: the operators `torch.ops.sparsemodel.block_linear*`.

On a GPU by the Triton kernels, unless SPARSEMODEL_CUDA is "off" (see kernels.cuda.launch); else by
the reference in plain torch.
The arguments after the bias are the layer's pattern, what `BlockIndex.build` adds to it, and the
side of a block.
"""
# ruff: noqa: PLR0917 - operators take their arrays by position

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from sparsemodel.errors import NativeLibraryWarning, SparseModelError
from sparsemodel.kernels import reference
from sparsemodel.kernels.blocks.index import BlockIndex
from sparsemodel.kernels.csr import flat_positions
from sparsemodel.kernels.cuda import launch as cuda
from sparsemodel.kernels.cuda import source as cuda_source

Tensor = torch.Tensor

# The definitions live as long as this object.
_LIBRARY = torch.library.Library("sparsemodel", "FRAGMENT")
_INDEX = "Tensor row_ptr, Tensor cols, Tensor blocks, int side"


def kernels_for(x: Tensor) -> Any:
    """The Triton kernels (`triton_blocks.Kernels`) for x, or None: the reference computes."""
    if not x.is_cuda or x.dtype not in cuda_source.REALS or not cuda.enabled():
        return None
    return _kernels(x.get_device())


@functools.cache
def _kernels(device: int) -> Any:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        why = f"they need sm_80 or later, cuda:{device} is sm_{major}{minor}"
    else:
        try:
            from sparsemodel.kernels.blocks import triton_blocks  # noqa: PLC0415 - Triton is optional
        except ImportError as error:
            why = f"Triton cannot be imported ({error}); install a CUDA build of torch"
        else:
            return triton_blocks.KERNELS
    warnings.warn(
        f"the kernels of sparse blocks are not used, the reference computes instead: {why}",
        NativeLibraryWarning,
        stacklevel=3,
    )
    return None


def block_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    cols: Tensor,
    blocks: Tensor,
    side: int,
) -> Tensor:
    """x [*, in] · Wᵀ + bias -> [*, out], contiguous; differentiable, sums in float32.

    Args:
        values: [nnz], in the order of `weight[mask]`; of x's dtype, as the bias is.

    Raises:
        SparseModelError: dtypes or devices that differ, or a shape that does not fit.
    """
    y: Tensor = torch.ops.sparsemodel.block_linear(x, values, bias, row_ptr, cols, blocks, side)
    return y


def _block_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    cols: Tensor,
    blocks: Tensor,
    side: int,
) -> Tensor:
    _check(x, values, bias, row_ptr, cols, blocks, side)
    kernels = kernels_for(x)
    if kernels is None:
        weight = reference.csr_weight(values, row_ptr, cols, (row_ptr.numel() - 1, x.shape[-1]))
        return reference.linear(x, weight, bias).contiguous()
    from sparsemodel.kernels.blocks import triton_blocks  # noqa: PLC0415 - Triton is optional

    y = _shape(x, values, bias, row_ptr, cols, blocks, side)
    index = BlockIndex.split(row_ptr, cols, blocks, x.shape[-1], side)
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        triton_blocks.forward(
            kernels, _rows(x), values.contiguous(), bias, index, y.view(-1, y.shape[-1])
        )
    return y


def _shape(x: Tensor, values: Tensor, bias: Tensor | None, row_ptr: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], row_ptr.shape[0] - 1)


def _block_linear_backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    blocks: Tensor,
    side: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    dx, dvalues = _backward_shapes(dy, x, values, row_ptr, cols, blocks, side, wanted)
    kernels = kernels_for(dy)
    if kernels is None:
        weight = reference.csr_weight(values, row_ptr, cols, (row_ptr.numel() - 1, x.shape[-1]))
        found = reference.linear_backward(dy, x, weight, (wanted[0], wanted[1], False))
        if found[0] is not None:
            dx.copy_(found[0])
        if found[1] is not None:
            dvalues.copy_(found[1].reshape(-1)[flat_positions(row_ptr, cols, x.shape[-1])])
        return dx, dvalues
    from sparsemodel.kernels.blocks import triton_blocks  # noqa: PLC0415 - Triton is optional

    index = BlockIndex.split(row_ptr, cols, blocks, x.shape[-1], side)
    with torch.cuda.device_of(x):
        if wanted[0]:
            rows = dx.view(-1, dx.shape[-1])
            triton_blocks.input_gradient(kernels, _rows(dy), values.contiguous(), index, rows)
        if wanted[1]:
            triton_blocks.value_gradient(kernels, _rows(dy), _rows(x), index, dvalues)
    return dx, dvalues


def _backward_shapes(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    blocks: Tensor,
    side: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients for input and values; one that is not wanted has no elements."""
    return dy.new_empty(x.shape if wanted[0] else 0), dy.new_empty(values.shape if wanted[1] else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, row_ptr, cols, blocks, side = inputs
    ctx.save_for_backward(x, values, row_ptr, cols, blocks)
    ctx.side = side


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, values, row_ptr, cols, blocks = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    dx = dvalues = dbias = None
    if any(wanted):
        dx, dvalues = torch.ops.sparsemodel.block_linear_backward(
            dy, x, values, row_ptr, cols, blocks, ctx.side, wanted
        )
    if ctx.needs_input_grad[2]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    return (
        dx if wanted[0] else None,
        dvalues if wanted[1] else None,
        dbias,
        None,
        None,
        None,
        None,
    )


def _check(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    cols: Tensor,
    blocks: Tensor,
    side: int,
) -> None:
    for tensor in (values, *(() if bias is None else (bias,))):
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise SparseModelError(
                f"expected values and bias of the input's {x.dtype} on {x.device}, got "
                f"{tensor.dtype} on {tensor.device}; convert one of them"
            )
    num_blocks = cols.numel() // side**2
    width = (blocks.numel() - 2 * num_blocks - 1) * side
    whole = values.shape == cols.shape == (num_blocks * side**2,)
    if not whole or x.dim() == 0 or x.shape[-1] != width or (row_ptr.numel() - 1) % side:
        raise SparseModelError(
            f"expected an input [*, {width}] and whole blocks of {side}×{side}, got "
            f"{tuple(x.shape)}, {values.numel()} values and {row_ptr.numel() - 1} rows"
        )


def _rows(x: Tensor) -> Tensor:
    """[*, F] -> [B, F]; a view where the strides allow it."""
    return x.reshape(-1, x.shape[-1])


_LIBRARY.define(f"block_linear(Tensor x, Tensor values, Tensor? bias, {_INDEX}) -> Tensor")
_LIBRARY.define(
    f"block_linear_backward(Tensor dy, Tensor x, Tensor values, {_INDEX}, bool[2] wanted) "
    "-> (Tensor, Tensor)"
)
_LIBRARY.impl("block_linear", _block_linear, "CompositeExplicitAutograd")
_LIBRARY.impl("block_linear_backward", _block_linear_backward, "CompositeExplicitAutograd")
torch.library.register_fake("sparsemodel::block_linear", _shape, lib=_LIBRARY)
torch.library.register_fake("sparsemodel::block_linear_backward", _backward_shapes, lib=_LIBRARY)
torch.library.register_autograd(
    "sparsemodel::block_linear", _gradients, setup_context=_save, lib=_LIBRARY
)
