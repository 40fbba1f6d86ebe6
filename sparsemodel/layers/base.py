"""What sparse layers have in common: storage, pattern, state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.kernels import reference
from sparsemodel.kernels.blocks.index import BlockIndex
from sparsemodel.kernels.choice import dense_is_faster, sparse_may_be_faster
from sparsemodel.kernels.csr import (
    carry_values,
    check_csr,
    csr_from_positions,
    flat_positions,
    mask_from_csr,
)
from sparsemodel.kernels.cuda import measured
from sparsemodel.kernels.functional import SparseIndex
from sparsemodel.kernels.geometry import ConvGeometry
from sparsemodel.layers.derived import DerivedWeight
from sparsemodel.masks.adjust import TensorEntries
from sparsemodel.masks.structure import check_structure

Execution = Literal["auto", "sparse", "dense", "blocks"]
# What every layer takes; a linear one under a mask of whole blocks takes "blocks" as well.
EXECUTIONS: tuple[Execution, ...] = ("auto", "sparse", "dense")

# For so many shapes of input a layer remembers which kernels it takes.
MAX_CHOICES = 64


class SparseLayer(nn.Module):
    """What sparse layers have in common: values at the active places of a weight, and where.

    `values`, a parameter [nnz] in the order of `weight[mask]`, is the only weight storage, so
    gradients and optimiser state are as long as it is. The pattern is in the int32 buffers
    `row_ptr` [out + 1] and `cols` [nnz]. Three more indices are not part of the state:
    `transposed` serves gradients of sparse kernels; `bits`, a bit a weight, the dense ones (made
    when they first run); `blocks` those of execution "blocks".
    """

    # Whether there are sparse kernels on a GPU.
    gpu_kernels: ClassVar[bool] = False
    # What `execution` may be.
    executions: ClassVar[tuple[Execution, ...]] = EXECUTIONS
    # Of the layer in whose place this one stands.
    dense_class: type[nn.Module] | None = None

    values: nn.Parameter
    bias: nn.Parameter | None
    row_ptr: torch.Tensor
    cols: torch.Tensor
    transposed: torch.Tensor
    bits: torch.Tensor
    blocks: torch.Tensor

    def __init__(  # noqa: PLR0917 - called by its own classes alone
        self,
        geometry: ConvGeometry,
        shape: tuple[int, ...],
        pattern: tuple[torch.Tensor, torch.Tensor],
        values: torch.Tensor,
        bias: torch.Tensor | None,
        execution: Execution,
    ) -> None:
        """Of a weight of `shape` at a pattern (row_ptr, cols), on the values' device."""
        super().__init__()
        self._execution = self._checked(execution)
        self._geometry = geometry
        self._weight_shape = torch.Size(shape)
        self._numel = self._weight_shape.numel()
        self.values = nn.Parameter(values)
        self.bias = None if bias is None else nn.Parameter(bias)
        self._set_pattern(*pattern)

    @property
    def execution(self) -> Execution:
        """Which kernels compute the layer: "sparse", "dense", or "auto", what is taken for faster.

        A linear layer whose mask is whole blocks also takes "blocks" (docs/sparse.md).
        """
        return self._execution

    @execution.setter
    def execution(self, execution: Execution) -> None:
        check_structure(self.mask(), self._checked(execution))
        self._execution = execution
        self._set_pattern(self.row_ptr, self.cols)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight, zeros at pruned places; differentiable, made anew at each access.

        Writing into it raises SparseModelError, as what is written would be lost.
        """
        places = self.active_positions()
        return DerivedWeight.of(reference.dense_weight(self.values, places, self._weight_shape))

    @property
    def weight_shape(self) -> torch.Size:
        """Shape of the dense weight."""
        return self._weight_shape

    @property
    def density(self) -> float:
        """Active weights over all weights, in [0, 1]."""
        return len(self.cols) / self._weight_shape.numel()

    def mask(self) -> torch.Tensor:
        """The pattern as a bool tensor of the dense weight's shape."""
        return mask_from_csr(self.row_ptr, self.cols, self._weight_shape)

    def active_positions(self) -> torch.Tensor:
        """Flat indices of the active weights in the dense weight: int64 [nnz], ascending."""
        return flat_positions(self.row_ptr, self.cols, self._geometry.row_length)

    def reset_parameters(self) -> None:
        """Draw values and bias from torch's default distribution for the dense layer."""
        bound = 1 / math.sqrt(max(1, self._geometry.row_length))
        nn.init.uniform_(self.values, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def move_pattern(self, positions: torch.Tensor) -> torch.Tensor:
        """Make exactly `positions` active: weights active before and after stay, others are zero.

        `values` stays the same Parameter object with new contents; its gradient is dropped.
        O(nnz log nnz), nothing of the dense weight's size is made.

        Args:
            positions: flat indices into the dense weight, int64, ascending.

        Returns:
            For each new value its old index, or -1 where it was not active: int64 [new nnz]. It
            re-indexes what goes with the values, such as momentum.

        Raises:
            MaskError: positions that are not ascending or out of range, or that do not have the
                structure that the layer's execution needs; the layer is as it was.
        """
        positions = positions.to(self.cols.device)
        numel = self._weight_shape.numel()
        ordered = positions.dim() == 1 and bool((positions.diff() > 0).all())
        if not ordered or (len(positions) and not 0 <= positions[0] <= positions[-1] < numel):
            raise MaskError(f"expected ascending flat indices in [0, {numel})")
        old = self.active_positions()
        source = torch.full_like(positions, -1)
        if len(old):
            place = torch.searchsorted(old, positions).clamp_(max=len(old) - 1)
            source = torch.where(old[place] == positions, place, source)
        row_length = self._geometry.row_length
        row_ptr, cols = csr_from_positions(
            positions, num_rows=len(self.row_ptr) - 1, row_length=row_length
        )
        self._set_pattern(row_ptr, cols)  # refuses before anything is changed
        self.values.grad = None
        self.values.data = carry_values(self.values.data, source)
        return source

    def topk_grad(self, x: torch.Tensor, dy: torch.Tensor, k: int) -> TensorEntries:
        """The k weight gradients of largest magnitude at pruned places, without the dense one.

        Args:
            x: an input of the layer.
            dy: the gradient of the output that it gave.
            k: how many to keep, >= 0.

        Returns:
            Flat indices into the dense weight (int64, ascending) and gradients (float32).
        """
        raise NotImplementedError

    def _slow_forward(self, *_: Any, **__: Any) -> Any:
        raise _no_export("torch.jit.trace")  # torch calls it in the place of forward while tracing

    def __prepare_scriptable__(self) -> Self:
        raise _no_export("torch.jit.script")

    def _refuse_export(self) -> None:
        # In strict mode torch goes through the layers as its compiler does, to plain operators.
        if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
            raise _no_export("torch.export")

    def extra_repr(self) -> str:
        shape = "×".join(map(str, self._weight_shape))
        return (
            f"{shape}, nnz={len(self.cols)}, density={self.density:.4g}, "
            f"bias={self.bias is not None}, execution={self.execution!r}"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._set_pattern(self.row_ptr, self.cols)  # the native library may be there, or not

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        device = self.cols.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.cols.device != device:
            self._set_pattern(self.row_ptr, self.cols)
        return self

    def _checked(self, execution: Execution) -> Execution:
        if execution not in self.executions:
            raise SparseModelError(
                f"execution is one of {self.executions} for a {type(self).__name__}, got "
                f"{execution!r}"
            )
        return execution

    def _side_of(self, row_ptr: torch.Tensor, cols: torch.Tensor) -> int:
        """The side of the blocks of a pattern, 0 where it has none; refuses what does not fit."""
        if self._execution != "blocks":
            return 0
        return check_structure(mask_from_csr(row_ptr, cols, self._weight_shape), self._execution)

    def _set_pattern(self, row_ptr: torch.Tensor, cols: torch.Tensor) -> None:
        self._side = self._side_of(row_ptr, cols)
        self._choices: dict[object, bool] = {}
        sparse = self._execution == "sparse" or (
            self._execution == "auto" and self._sparse_may_be_faster(cols)
        )
        sparse = sparse and (cols.is_cpu or self.gpu_kernels)
        index = SparseIndex.build(row_ptr, cols, self._geometry, sparse=sparse)
        self.register_buffer("row_ptr", row_ptr)
        self.register_buffer("cols", cols)
        self.register_buffer("transposed", index.transposed, persistent=False)
        self.register_buffer("bits", index.bits, persistent=False)
        blocks = cols.new_empty(0)
        if self._side:
            width = self._geometry.row_length
            blocks = BlockIndex.build(row_ptr, cols, width, self._side).joined()
        self.register_buffer("blocks", blocks, persistent=False)

    def _index(self, dense: bool) -> SparseIndex:
        buffers: dict[str, Any] = self._buffers  # attribute access costs three times as much
        index = SparseIndex(
            buffers["row_ptr"], buffers["cols"], buffers["transposed"], buffers["bits"]
        )
        pruned = index.cols.numel() < self._numel
        if dense and pruned and not index.bits.numel() and not torch.compiler.is_compiling():
            index = index.with_bits(self._geometry.row_length)
            buffers["bits"] = index.bits
        return index

    def _sparse_may_be_faster(self, cols: torch.Tensor) -> bool:
        """Whether "auto" takes sparse kernels for some input; on other devices it never does."""
        if cols.is_cpu:
            return sparse_may_be_faster(self._geometry, len(cols))
        return cols.is_cuda and self._won_on_gpu(len(cols), None, training=False)

    def _won_on_gpu(self, nnz: int, rows: int | None, *, training: bool) -> bool:
        """Whether sparse kernels are faster on this GPU, forward and for the input's gradient."""
        operators: tuple[measured.Operator, ...] = ("forward", "input gradient")
        return self.gpu_kernels and all(
            measured.sparse_is_faster(
                operator, self.values, weights=self._numel, nnz=nnz, rows=rows
            )
            for operator in operators[: 1 + training]
        )

    def _dense_is_faster(
        self, x: torch.Tensor, batch: int, size: tuple[int, int], in_layout: Callable[..., bool]
    ) -> bool:
        training = torch.is_grad_enabled()
        if not x.is_cpu:  # compiled code stays dense
            if not x.is_cuda or torch.compiler.is_compiling():
                return True
            return not self._won_on_gpu(self.values.numel(), batch, training=training)
        # Asking the cost model again would cost as much as a small layer.
        key = x.shape, x.stride(), training
        choice = None if torch.compiler.is_compiling() else self._choices.get(key)
        if choice is None:
            choice = dense_is_faster(
                self._geometry,
                self._buffers["cols"].numel(),  # type: ignore[union-attr]
                batch,
                size,
                in_layout=in_layout(x),
                training=training,
            )
            if not torch.compiler.is_compiling():
                self._remember(key, choice)
        return choice

    def _remember(self, key: object, choice: bool) -> None:
        if len(self._choices) >= MAX_CHOICES:
            self._choices.clear()
        self._choices[key] = choice

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **keywords: Any
    ) -> None:
        """Refuse a state whose pattern is damaged or is another one than this layer's."""
        keys = [f"{prefix}{key}" for key in ("row_ptr", "cols", "values")]
        if all(key in state_dict for key in keys):  # what is missing, torch reports
            row_ptr, cols, values = (state_dict[key].to(self.cols.device) for key in keys)
            name = prefix.removesuffix(".")
            check_csr(name, row_ptr, cols, self._weight_shape)
            if values.shape != cols.shape:
                raise MaskError(
                    f"{name!r}: the state has {tuple(values.shape)} values for {len(cols)} active "
                    "places"
                )
            if not (torch.equal(row_ptr, self.row_ptr) and torch.equal(cols, self.cols)):
                raise MaskError(
                    f"{name!r}: the state was saved under another mask ({len(cols)} active "
                    f"weights, here {len(self.cols)}); call change_mask(model, mask) first"
                )
        super()._load_from_state_dict(state_dict, prefix, *rest, **keywords)


def _no_export(what: str) -> SparseModelError:
    return SparseModelError(
        f"{what} knows no sparse layers; make the model dense first, sparsemodel.densify(model), "
        "which computes the same, and export that; or let sparsemodel.export(model, path, "
        "example=x) do both"
    )
