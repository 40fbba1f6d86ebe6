"""Linear and convolution layers that store and train only their active weights."""

from __future__ import annotations

from typing import Self, TypeVar

import torch
from torch import nn

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.kernels.csr import csr_from_mask
from sparsemodel.kernels.functional import (
    conv2d_topk_grad,
    linear_topk_grad,
    sparse_conv2d,
    sparse_linear,
)
from sparsemodel.kernels.geometry import ConvGeometry, is_batch_innermost, is_features_first
from sparsemodel.layers.base import EXECUTIONS, Execution, SparseLayer
from sparsemodel.layers.tensor_cores import block_linear
from sparsemodel.masks.adjust import TensorEntries

__all__ = ["EXECUTIONS", "Execution", "SparseConv2d", "SparseLayer", "SparseLinear"]

Pair = int | tuple[int, ...]


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
            Under a mask of whole blocks also "blocks".

    Raises:
        MaskError: a mask of another shape, or without the structure that `execution` needs.

    >>> mask = torch.tensor([[True, False, True], [False, False, True]])
    >>> layer = SparseLinear(3, 2, mask)
    >>> layer.values.shape, layer(torch.ones(5, 3)).shape
    (torch.Size([3]), torch.Size([5, 2]))
    """

    gpu_kernels = True
    executions = (*EXECUTIONS, "blocks")

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
        super().__init__(geometry, mask.shape, _csr(mask, values), values, offsets, execution)
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
        return _sparse(cls, layer, _linear_geometry(layer), mask, execution)

    @classmethod
    def from_csr(
        cls,
        layer: nn.Linear,
        pattern: tuple[torch.Tensor, torch.Tensor],
        values: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        execution: Execution = "auto",
    ) -> Self:
        """In the place of `layer`, whose weights are not read (it may lie on "meta").

        Args:
            pattern: int32 row_ptr [out + 1] and cols [nnz].
            values: float [nnz], taken over.
            bias: float [out], taken over, or None.
        """
        geometry = _linear_geometry(layer)
        return _made(cls, layer, geometry, pattern, values, bias, execution)

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
        self._refuse_export()
        if torch.is_autocast_enabled(x.device.type):
            return _without_autocast(self, x)
        if self._execution == "blocks":
            return block_linear(self, x)
        dense = self._dense(x)
        return sparse_linear(
            x, self.values, self.bias, self._index(dense), self._geometry, dense=dense
        )

    def topk_grad(self, x: torch.Tensor, dy: torch.Tensor, k: int) -> TensorEntries:
        return linear_topk_grad(x.to(dy.dtype), dy, self._index(False), self._geometry, k)

    def _dense(self, x: torch.Tensor) -> bool:
        if self._execution != "auto":
            return self._execution == "dense"
        rows = x.numel() // self.in_features if self.in_features else 0
        return self._dense_is_faster(x, rows, (1, 1), is_features_first)


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
        values, offsets = _empty(mask, bias, device, dtype)
        super().__init__(geometry, mask.shape, _csr(mask, values), values, offsets, execution)
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
        return _sparse(cls, layer, geometry_of(layer), mask, execution)

    @classmethod
    def from_csr(
        cls,
        layer: nn.Conv2d,
        pattern: tuple[torch.Tensor, torch.Tensor],
        values: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        execution: Execution = "auto",
    ) -> Self:
        """As `SparseLinear.from_csr`.

        Raises:
            SparseModelError: as `from_dense`.
        """
        return _made(cls, layer, geometry_of(layer), pattern, values, bias, execution)

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
        self._refuse_export()
        if torch.is_autocast_enabled(x.device.type):
            return _without_autocast(self, x)
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        dense = self._dense(x)
        return sparse_conv2d(
            x, self.values, self.bias, self._index(dense), self._geometry, dense=dense
        )

    def topk_grad(self, x: torch.Tensor, dy: torch.Tensor, k: int) -> TensorEntries:
        x = x.to(dy.dtype)  # under autocast they may differ
        if x.dim() == 3:
            x, dy = x.unsqueeze(0), dy.unsqueeze(0)
        return conv2d_topk_grad(x, dy, self._index(False), self._geometry, k)

    def _dense(self, x: torch.Tensor) -> bool:
        if self._execution != "auto" or x.dim() != 4:
            return self._execution == "dense"
        return self._dense_is_faster(x, x.shape[0], (x.shape[2], x.shape[3]), is_batch_innermost)


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
    values = weight[mask.to(weight.device)]
    offsets = None if bias is None else bias.detach().clone()
    return _made(kind, layer, geometry, _csr(mask, values), values, offsets, execution)


def _made(  # noqa: PLR0917 - the constructor's order
    kind: type[_Sparse],
    layer: nn.Linear | nn.Conv2d,
    geometry: ConvGeometry,
    pattern: tuple[torch.Tensor, torch.Tensor],
    values: torch.Tensor,
    bias: torch.Tensor | None,
    execution: Execution,
) -> _Sparse:
    """A layer of class `kind` in the place of a plain one, of which no weight is read."""
    sparse = kind.__new__(kind)
    shape = tuple(layer.weight.shape)
    SparseLayer.__init__(sparse, geometry, shape, pattern, values, bias, execution)
    sparse.dense_class = type(layer)
    sparse.values.requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None and sparse.bias is not None:
        sparse.bias.requires_grad_(layer.bias.requires_grad)
    if next(iter(layer._parameters)) == "bias":  # as prune.remove and the like leave it
        sparse._parameters["values"] = sparse._parameters.pop("values")
    return sparse.train(layer.training)


def _csr(mask: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return csr_from_mask(mask.to(values.device))


@torch.no_grad()
def _filled(layer: _Dense, sparse: SparseLayer) -> _Dense:
    """Give a plain layer the weights of a sparse one."""
    layer.weight.copy_(sparse.weight)
    layer.weight.requires_grad_(sparse.values.requires_grad)
    if sparse.bias is not None and layer.bias is not None:
        layer.bias.copy_(sparse.bias)
        layer.bias.requires_grad_(sparse.bias.requires_grad)
    if sparse.dense_class is not None:
        layer.__class__ = sparse.dense_class  # type: ignore[assignment]
    if next(iter(sparse._parameters)) == "bias":
        layer._parameters["weight"] = layer._parameters.pop("weight")
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


def _linear_geometry(layer: nn.Linear) -> ConvGeometry:
    out_features, in_features = layer.weight.shape  # which functional.linear goes by
    return ConvGeometry(out_features, in_features, 1, 1)


def geometry_of(layer: SparseConv2d | nn.Conv2d) -> ConvGeometry:
    """The geometry by which a convolution computes: of a plain one, its attributes as they are now.

    Raises:
        SparseModelError: padding that is not zeros, or uneven ("same" with an even window).
    """
    if isinstance(layer, SparseConv2d):
        return layer.geometry
    out_channels, in_group, *window = layer.weight.shape
    return _conv_geometry(
        in_group * layer.groups,
        out_channels,
        tuple(window),
        layer.stride,
        _plain_padding(layer),
        layer.dilation,
        layer.groups,
    )


def weight_shape(layer: SparseLayer | nn.Linear | nn.Conv2d) -> tuple[int, ...]:
    """Shape of a sparse or plain layer's dense weight."""
    return tuple(layer.weight_shape if isinstance(layer, SparseLayer) else layer.weight.shape)


def _pair(number: Pair) -> tuple[int, int]:
    return (number, number) if isinstance(number, int) else (number[0], number[-1])


def _plain_padding(layer: nn.Conv2d) -> Pair:
    """The layer's padding in numbers."""
    if layer.padding_mode != "zeros":
        raise SparseModelError(
            f"sparse convolutions pad with zeros; this one has padding_mode={layer.padding_mode!r}:"
            " leave it out of the mask"
        )
    if not isinstance(layer.padding, str):
        return _pair(layer.padding)
    if layer.padding == "valid":
        return 0, 0
    reach = [
        d * (k - 1) for d, k in zip(_pair(layer.dilation), layer.weight.shape[2:], strict=True)
    ]
    if any(n % 2 for n in reach):
        raise SparseModelError(
            'padding="same" with an even window pads unevenly, which sparse convolutions do not: '
            "leave this layer out of the mask"
        )
    return reach[0] // 2, reach[1] // 2


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
