"""Layers that store and train only their active weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Self, TypeVar

import torch
from torch import nn

from sparsemodel.adjust import Entries
from sparsemodel.choice import MAX_SPARSE_DENSITY, dense_is_faster
from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.kernels import reference
from sparsemodel.kernels.functional import (
    SparseIndex,
    conv2d_topk_grad,
    linear_topk_grad,
    sparse_conv2d,
    sparse_linear,
)
from sparsemodel.kernels.geometry import ConvGeometry, is_batch_innermost, is_features_first
from sparsemodel.pattern import (
    carry_values,
    check_csr,
    csr_from_mask,
    csr_from_positions,
    flat_positions,
    mask_from_csr,
)

Execution = Literal["auto", "sparse", "dense"]
EXECUTIONS: tuple[Execution, ...] = ("auto", "sparse", "dense")
Pair = int | tuple[int, ...]


class SparseLayer(nn.Module):
    """What sparse layers have in common: values at the active places of a weight, and where.

    `values`, a parameter [nnz] in the order of `weight[mask]`, is the only weight storage, so
    gradients and optimiser state are as long as it is. The pattern is in the int32 buffers
    `row_ptr` [out + 1] and `cols` [nnz]. Two more indices are not part of the state: `transposed`
    serves gradients of sparse kernels, `flat` the dense ones (made when they first run).
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    row_ptr: torch.Tensor
    cols: torch.Tensor
    transposed: torch.Tensor
    flat: torch.Tensor

    def __init__(
        self,
        geometry: ConvGeometry,
        mask: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor | None,
        execution: Execution,
    ) -> None:
        super().__init__()
        self._execution = _checked(execution)
        self._geometry = geometry
        self._weight_shape = mask.shape
        self._numel = mask.numel()
        self.values = nn.Parameter(values)
        self.bias = None if bias is None else nn.Parameter(bias)
        self._set_pattern(*csr_from_mask(mask.to(values.device)))

    @property
    def execution(self) -> Execution:
        """Which kernels compute the layer: "sparse", "dense", or "auto", by the cost model."""
        return self._execution

    @execution.setter
    def execution(self, execution: Execution) -> None:
        self._execution = _checked(execution)
        self._set_pattern(self.row_ptr, self.cols)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight, zeros at pruned places; differentiable, made anew at each access."""
        return reference.dense_weight(self.values, self.active_positions(), self._weight_shape)

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
            MaskError: positions that are not ascending or out of range.
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
        self.values.grad = None
        self.values.data = carry_values(self.values.data, source)
        row_length = self._geometry.row_length
        self._set_pattern(
            *csr_from_positions(positions, num_rows=len(self.row_ptr) - 1, row_length=row_length)
        )
        return source

    def topk_grad(self, x: torch.Tensor, dy: torch.Tensor, k: int) -> Entries:
        """The k weight gradients of largest magnitude at pruned places, without the dense one.

        Args:
            x: an input of the layer.
            dy: the gradient of the output that it gave.
            k: how many to keep, >= 0.

        Returns:
            Flat indices into the dense weight (int64, ascending) and gradients (float32).
        """
        raise NotImplementedError

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

    def _set_pattern(self, row_ptr: torch.Tensor, cols: torch.Tensor) -> None:
        wide = len(cols) > MAX_SPARSE_DENSITY * self._numel
        sparse = self._execution == "sparse" or (self._execution == "auto" and not wide)
        index = SparseIndex.build(row_ptr, cols, self._geometry, sparse=sparse)
        self.register_buffer("row_ptr", row_ptr)
        self.register_buffer("cols", cols)
        self.register_buffer("transposed", index.transposed, persistent=False)
        self.register_buffer("flat", index.flat, persistent=False)

    def _index(self, dense: bool) -> SparseIndex:
        buffers: dict[str, Any] = self._buffers  # attribute access costs three times as much
        index = SparseIndex(
            buffers["row_ptr"], buffers["cols"], buffers["transposed"], buffers["flat"]
        )
        if dense and len(index.cols) < self._numel and not torch.compiler.is_compiling():
            index = index.with_positions(self._geometry.row_length)
            buffers["flat"] = index.flat
        return index

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


class SparseLinear(SparseLayer):
    """nn.Linear that stores and multiplies only its active weights.

    Takes [*, in] in any layout and returns [*, out] stored features first ([out, *]), in which
    the next sparse layer reads it without a copy.

    Args:
        in_features: input width.
        out_features: output width.
        mask: bool [out, in], which weights exist.
        bias: whether there is an additive bias.
        execution: "sparse" or "dense" kernels, or "auto": what the cost model takes for faster.

    Raises:
        MaskError: a mask of another shape.

    >>> mask = torch.tensor([[True, False, True], [False, False, True]])
    >>> layer = SparseLinear(3, 2, mask)
    >>> layer.values.shape, layer(torch.ones(5, 3)).shape
    (torch.Size([3]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mask: torch.Tensor,
        *,
        bias: bool = True,
        execution: Execution = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_shape(mask, (out_features, in_features))
        values, offsets = _empty(mask, bias, device, dtype)
        geometry = ConvGeometry(out_features, in_features, 1, 1)
        super().__init__(geometry, mask, values, offsets, execution)
        self.reset_parameters()

    @property
    def in_features(self) -> int:
        """Input width."""
        return self._geometry.in_channels

    @property
    def out_features(self) -> int:
        """Output width."""
        return self._geometry.out_channels

    @classmethod
    def from_dense(
        cls, layer: nn.Linear, mask: torch.Tensor, *, execution: Execution = "auto"
    ) -> Self:
        """The sparse form of `layer` under `mask`; weights outside the mask are dropped."""
        _check_shape(mask, tuple(layer.weight.shape))
        geometry = ConvGeometry(layer.out_features, layer.in_features, 1, 1)
        return _sparse(cls, layer, geometry, mask, execution)

    def to_dense(self) -> nn.Linear:
        """The plain layer of the same weights, zeros at pruned places."""
        layer: nn.Linear = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.values.device,
            dtype=self.values.dtype,
        )
        return _filled(layer, self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[*, in] -> [*, out]."""
        if torch.is_autocast_enabled(x.device.type):
            return _without_autocast(self, x)
        if x.shape[-1] != self.in_features:
            raise SparseModelError(
                f"expected an input [*, {self.in_features}], got {tuple(x.shape)}"
            )
        dense = self._dense(x)
        return sparse_linear(x, self.values, self.bias, self._index(dense), dense=dense)

    def topk_grad(self, x: torch.Tensor, dy: torch.Tensor, k: int) -> Entries:
        return linear_topk_grad(x.to(dy.dtype), dy, self._index(False), k)

    def _dense(self, x: torch.Tensor) -> bool:
        if self._execution != "auto":
            return self._execution == "dense"
        batch = x.numel() // self.in_features if self.in_features else 0
        nnz = self.cols.numel()
        return dense_is_faster(self._geometry, nnz, batch, (1, 1), in_layout=is_features_first(x))


class SparseConv2d(SparseLayer):
    """nn.Conv2d that stores and multiplies only its active weights.

    Takes [B, in, H, W] (or [in, H, W]) in any layout and returns [B, out, OH, OW] stored batch
    innermost ([out, OH, OW, B]), in which the next sparse layer reads it without a copy.

    Args:
        in_channels: input channels.
        out_channels: output channels.
        kernel_size: window, one number or (h, w).
        mask: bool [out, in/groups, kh, kw], which weights exist.
        stride, padding, dilation, groups: as nn.Conv2d; zero padding, in numbers.
        bias: whether there is an additive bias.
        execution: "sparse" or "dense" kernels, or "auto": what the cost model takes for faster.

    Raises:
        MaskError: a mask of another shape.

    >>> mask = torch.zeros(8, 4, 3, 3, dtype=torch.bool)
    >>> mask[:, 0, 1, 1] = True
    >>> layer = SparseConv2d(4, 8, 3, mask, padding=1)
    >>> layer.values.shape, layer(torch.ones(2, 4, 6, 6)).shape
    (torch.Size([8]), torch.Size([2, 8, 6, 6]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        mask: torch.Tensor,
        *,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        execution: Execution = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = _conv_geometry(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        )
        _check_shape(mask, geometry.weight_shape)
        super().__init__(geometry, mask, *_empty(mask, bias, device, dtype), execution)
        self.reset_parameters()

    @property
    def geometry(self) -> ConvGeometry:
        """Channels, kernel, stride, padding, dilation and groups."""
        return self._geometry

    @classmethod
    def from_dense(
        cls, layer: nn.Conv2d, mask: torch.Tensor, *, execution: Execution = "auto"
    ) -> Self:
        """The sparse form of `layer` under `mask`; weights outside the mask are dropped.

        Raises:
            SparseModelError: padding that is not zeros, or uneven ("same" with an even window).
        """
        _check_shape(mask, tuple(layer.weight.shape))
        geometry = _conv_geometry(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            _plain_padding(layer),
            layer.dilation,
            layer.groups,
        )
        return _sparse(cls, layer, geometry, mask, execution)

    def to_dense(self) -> nn.Conv2d:
        """The plain layer of the same weights, zeros at pruned places."""
        g = self._geometry
        layer: nn.Conv2d = nn.utils.skip_init(
            nn.Conv2d,
            g.in_channels,
            g.out_channels,
            (g.kernel_h, g.kernel_w),
            stride=g.stride,
            padding=g.padding,
            dilation=g.dilation,
            groups=g.groups,
            bias=self.bias is not None,
            device=self.values.device,
            dtype=self.values.dtype,
        )
        return _filled(layer, self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in, H, W] -> [B, out, OH, OW], or both without B."""
        if torch.is_autocast_enabled(x.device.type):
            return _without_autocast(self, x)
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        dense = self._dense(x)
        return sparse_conv2d(
            x, self.values, self.bias, self._index(dense), self._geometry, dense=dense
        )

    def topk_grad(self, x: torch.Tensor, dy: torch.Tensor, k: int) -> Entries:
        x = x.to(dy.dtype)  # under autocast they may differ
        if x.dim() == 3:
            x, dy = x.unsqueeze(0), dy.unsqueeze(0)
        return conv2d_topk_grad(x, dy, self._index(False), self._geometry, k)

    def _dense(self, x: torch.Tensor) -> bool:
        if self._execution != "auto" or x.dim() != 4:
            return self._execution == "dense"
        return dense_is_faster(
            self._geometry,
            self.cols.numel(),
            x.shape[0],
            (x.shape[2], x.shape[3]),
            in_layout=is_batch_innermost(x),
        )


_Sparse = TypeVar("_Sparse", bound=SparseLayer)
_Dense = TypeVar("_Dense", nn.Linear, nn.Conv2d)


def _sparse(
    kind: type[_Sparse],
    layer: nn.Linear | nn.Conv2d,
    geometry: ConvGeometry,
    mask: torch.Tensor,
    execution: Execution,
) -> _Sparse:
    """A layer of class `kind` with the active weights of a plain one; draws no random numbers."""
    weight, bias = layer.weight.detach(), layer.bias
    sparse = kind.__new__(kind)
    SparseLayer.__init__(
        sparse,
        geometry,
        mask,
        weight[mask.to(weight.device)],
        None if bias is None else bias.detach().clone(),
        execution,
    )
    sparse.values.requires_grad_(layer.weight.requires_grad)
    if bias is not None and sparse.bias is not None:
        sparse.bias.requires_grad_(bias.requires_grad)
    return sparse.train(layer.training)


@torch.no_grad()
def _filled(layer: _Dense, sparse: SparseLayer) -> _Dense:
    """Give a plain layer the weights of a sparse one."""
    layer.weight.copy_(sparse.weight)
    layer.weight.requires_grad_(sparse.values.requires_grad)
    if sparse.bias is not None and layer.bias is not None:
        layer.bias.copy_(sparse.bias)
        layer.bias.requires_grad_(sparse.bias.requires_grad)
    return layer.train(sparse.training)


def _empty(
    mask: torch.Tensor, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values and bias, yet to be drawn."""
    values = torch.empty(int(mask.sum()), device=device, dtype=dtype)
    return values, values.new_empty(len(mask)) if bias else None


def _conv_geometry(  # noqa: PLR0917 - in nn.Conv2d's order
    in_channels: int,
    out_channels: int,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> ConvGeometry:
    if groups < 1 or in_channels % groups or out_channels % groups:
        raise SparseModelError(
            f"groups must divide {in_channels} and {out_channels} channels, got {groups}"
        )
    return ConvGeometry(
        out_channels,
        in_channels,
        *_pair(kernel_size),
        *_pair(stride),
        *_pair(padding),
        *_pair(dilation),
        groups,
    )


def _pair(number: Pair) -> tuple[int, int]:
    return (number, number) if isinstance(number, int) else (number[0], number[1])


def _plain_padding(layer: nn.Conv2d) -> Pair:
    """The layer's padding in numbers."""
    if layer.padding_mode != "zeros":
        raise SparseModelError(
            f"sparse convolutions pad with zeros; this one has padding_mode={layer.padding_mode!r}:"
            " leave it out of the mask"
        )
    if not isinstance(layer.padding, str):
        return layer.padding[0], layer.padding[1]
    if layer.padding == "valid":
        return 0, 0
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if any(n % 2 for n in reach):
        raise SparseModelError(
            'padding="same" with an even window pads unevenly, which sparse convolutions do not: '
            "leave this layer out of the mask"
        )
    return reach[0] // 2, reach[1] // 2


def _checked(execution: Execution) -> Execution:
    if execution not in EXECUTIONS:
        raise SparseModelError(f"execution is one of {EXECUTIONS}, got {execution!r}")
    return execution


def _check_shape(mask: torch.Tensor, shape: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise MaskError(
            f"expected a bool mask of the weight's shape {shape}, got {mask.dtype} of shape "
            f"{tuple(mask.shape)}"
        )


def _without_autocast(layer: SparseLayer, x: torch.Tensor) -> torch.Tensor:
    """Compute in the type of the layer's values, whatever autocast made of its input."""
    with torch.autocast(x.device.type, enabled=False):
        y: torch.Tensor = layer.forward(x.to(layer.values.dtype))
    return y
