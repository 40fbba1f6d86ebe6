"""A program with arrays bound to it: every kind of run of the native plan, arguments checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.kernels.cpu import library as cpu
from sparsemodel.kernels.cpu.plan_abi import (
    ConvArrays,
    Images,
    Moments,
    NativePlan,
    NormArrays,
    Parameter,
    Sgd,
    TopK,
)
from sparsemodel.runtime.arrays import Array
from sparsemodel.runtime.program import Node, Program
from sparsemodel.runtime.program_shapes import planes
from sparsemodel.runtime.program_text import MAX_SIZE
from sparsemodel.runtime.state import LayerEntries

Normalization = tuple[Sequence[float], Sequence[float]]

VECTOR = 16  # samples that the widest instructions work on at once
_NATIVE_NAMES = {"max_pool": "maxpool", "avg_pool": "avgpool", "global_pool": "global_avgpool"}


class ParameterArrays(NamedTuple):
    """float32 arrays of one length: values; gradient (None: frozen); momentum (None: none)."""

    values: Array
    gradient: Array | None = None
    momentum: Array | None = None


class LayerArrays(NamedTuple):
    """Of a convolution or linear layer: pattern, index by input (None: no training), parameters."""

    row_ptr: Array
    cols: Array
    by_input: Array | None
    weight: ParameterArrays
    bias: ParameterArrays | None


@dataclass(frozen=True)
class OperationSeconds:
    """What one operation took in the last run."""

    name: str
    kind: str
    forward: float
    backward: float


def full_batch(batch_size: int) -> int:
    """The largest batch up to `batch_size` that fills the kernels' vectors, which run over samples.

    A batch of 17 takes twice the time of one of 16.

    >>> full_batch(17), full_batch(9)
    (16, 9)
    """
    return max(batch_size - batch_size % VECTOR, min(batch_size, VECTOR))


def statistics_batches(num_samples: int, batch_size: int) -> Iterator[slice]:
    """Slices of at most `full_batch` samples; none of a single one, where that can be.

    A batch norm over single values has no variance.

    >>> [(part.start, part.stop) for part in statistics_batches(9, 4)]
    [(0, 4), (4, 7), (7, 9)]
    """
    batch_size = full_batch(batch_size)
    starts = list(range(0, num_samples, batch_size))
    if len(starts) > 1 and num_samples - starts[-1] == 1 and batch_size > 2:
        starts[-1] -= 1
    for start, stop in pairwise([*starts, num_samples]):
        yield slice(start, stop)


class BoundProgram:
    """A native plan of a program; nodes are bound to arrays, which stay the caller's.

    Arrays are held as long as they are bound. Which parameters are frozen is settled by `build`.

    Args:
        program: what to run.
        batch_size: the largest batch.
        recompute: whether convolution outputs that only batch norm reads are computed again.
        bfloat16: whether activations are kept in half the bytes.
        normalization: mean and standard deviation of each channel, for pixels in [0, 1]; needed
            to give images in bytes.

    Raises:
        SparseModelError: a number outside its range, or the native library is not in use.
    """

    def __init__(
        self,
        program: Program,
        *,
        batch_size: int,
        recompute: bool = False,
        bfloat16: bool = False,
        normalization: Normalization | None = None,
    ) -> None:
        if not 1 <= batch_size <= MAX_SIZE:
            raise SparseModelError(f"expected a batch size of 1 to {MAX_SIZE}, got {batch_size}")
        self.program = program
        self.batch_size = batch_size
        self._pixels = pixel_factors(program.input_shape, normalization)
        self._plan = NativePlan(batch_size, recompute=recompute, bfloat16=bfloat16)
        self._held: dict[int, tuple[Any, ...]] = {}  # by node: the arrays bound to it
        self._pruned: dict[str, tuple[int, int]] = {}  # weight -> node, number of pruned weights
        for number, node in enumerate(program.nodes):
            added = self._plan.add(*self._native_node(number, node))
            assert added == number, "each operation is one node"

    def _native_node(self, number: int, node: Node) -> tuple[Any, ...]:
        """The kind and the arguments of a node in the native plan."""
        if node.kind == "input":
            return "input", *planes(self.program.input_shape)
        if node.kind == "conv":
            return "conv", *node.inputs, layer_geometry(self.program, number, self.batch_size)
        if node.kind == "norm":
            source, residual = (*node.inputs, -1)[:2]
            momentum = -1.0 if node.momentum is None else node.momentum
            return "batchnorm", source, residual, node.relu, node.eps, momentum
        name = _NATIVE_NAMES.get(node.kind, node.kind)
        if node.kind not in {"max_pool", "avg_pool"}:
            return name, *node.inputs
        channels, *size = self.program.results[node.inputs[0]]
        window = cpu.PoolGeometry.pool(
            self.batch_size, channels, (size[0], size[1]), node.kernel,
            stride=node.stride, padding=node.padding,
        )  # fmt: skip
        padded = (node.include_pad,) if node.kind == "avg_pool" else ()
        return name, *node.inputs, window, *padded

    # ---- arrays ----

    def bind_layer(self, number: int, arrays: LayerArrays) -> None:
        """Set the arrays of a convolution or linear layer.

        Raises:
            SparseModelError: an array of another type or length, or an index of another pattern.
        """
        node, geometry = self.program.nodes[number], layer_geometry(self.program, number, 1)
        title, rows, nnz = self.program.title(number), geometry.out_channels, len(arrays.cols)
        places = [
            _address(arrays.row_ptr, np.int32, rows + 1, f"{title}: row_ptr"),
            _address(arrays.cols, np.int32, int(arrays.row_ptr[-1]), f"{title}: cols"),
        ]
        if arrays.by_input is None:
            places += [None, None, None]
        else:
            sources = geometry.stride_h * geometry.stride_w * geometry.in_channels
            length = 2 * nnz + sources + 1
            start = _address(arrays.by_input, np.int32, length, f"{title}: index by input")
            assert start is not None, "it has an element at least"
            places += [start + 8 * nnz, start, start + 4 * nnz]
        weight = _parameter(arrays.weight, nnz, f"{title}: weight")
        bias = Parameter()
        if arrays.bias is not None:
            bias = _parameter(arrays.bias, rows, f"{title}: bias")
        self._plan.bind_conv(number, ConvArrays(*places, weight, bias))
        self._held[number] = arrays
        assert node.weight is not None, "a layer has a weight"
        length = geometry.in_channels // geometry.groups * geometry.kernel_h * geometry.kernel_w
        self._pruned[node.weight] = number, rows * length - nnz

    def bind_norm(
        self,
        number: int,
        weight: ParameterArrays | None,
        bias: ParameterArrays | None,
        statistics: tuple[Array | None, Array | None, Array | None],
    ) -> None:
        """Set the arrays of a batch norm.

        Args:
            number: of the node.
            weight, bias: float32 [channels]; None where it has none.
            statistics: running mean and variance, float32 [channels], and the number of batches,
                int64 [1]; None where there is none.

        Raises:
            SparseModelError: an array of another type or length.
        """
        title, (channels, *_) = self.program.title(number), self.program.results[number]
        parameters = [
            Parameter() if one is None else _parameter(one, channels, f"{title}: {what}")
            for what, one in (("weight", weight), ("bias", bias))
        ]
        mean, variance, batches = statistics
        places = [
            _address(mean, np.float32, channels, f"{title}: mean"),
            _address(variance, np.float32, channels, f"{title}: variance"),
            _address(batches, np.int64, 1, f"{title}: number of batches"),
        ]
        self._plan.bind_norm(number, NormArrays(*parameters, *places))
        self._held[number] = (weight, bias, statistics)

    def build(self) -> None:
        """Settle order and memory, when all nodes are bound."""
        self._plan.build(len(self.program.nodes) - 1)

    def arena_bytes(self) -> int:
        """Bytes of all activations and their gradients for a full batch."""
        return self._plan.arena_bytes()

    def allocated_bytes(self) -> int:
        """Bytes of the arena as it is now: what the runs so far needed."""
        return self._plan.allocated_bytes()

    # ---- runs ----

    def train(
        self, images: Array, labels: Array, *, sgd: Sgd | None = None, threads: int = 1
    ) -> tuple[float, int]:
        """A training step: mean loss, number correct; gradients are written into their arrays.

        Raises:
            SparseModelError: images or labels of another shape, dtype or range; nothing has
                changed then.
        """
        images, labels = self._checked_batch(images, labels)
        return self._plan.train(
            len(images), self._native(images), labels.ctypes.data, sgd=sgd, threads=threads
        )

    def growth(
        self, counts: Mapping[str, int], images: Array, labels: Array, *, threads: int = 1
    ) -> dict[str, LayerEntries]:
        """The largest gradients of the mean loss at pruned weights, of a batch in training mode.

        Args:
            counts: weight name -> how many, >= 0; of a name that is no layer of the program, none.
            images, labels: a batch.
            threads: how many to use.

        Returns:
            Name -> flat indices into the dense weight, ascending, and gradients: at most
            counts[name], fewer where fewer weights are pruned; of equals the lower index.

        Raises:
            MaskError: a gradient is NaN.
            SparseModelError: as in `train`.
        """
        images, labels = self._checked_batch(images, labels)
        found: dict[str, LayerEntries] = {}
        asked: dict[str, TopK] = {}
        for name, count in counts.items():
            node, pruned = self._pruned.get(name, (-1, 0))
            k = min(count, pruned)
            found[name] = indices, top = np.empty(k, np.int64), np.empty(k, np.float32)
            if k:
                asked[name] = TopK(k, indices.ctypes.data, top.ctypes.data, 0, node)
        if not asked:
            return found
        made = self._plan.topk_grads(
            len(images), self._native(images), labels.ctypes.data, list(asked.values()),
            threads=threads,
        )  # fmt: skip
        for name, count in zip(asked, made, strict=True):
            if count < 0:
                raise MaskError(f"a gradient of {name!r} is NaN; has training diverged?")
        assert made == [one.k for one in asked.values()], "k was cut to the pruned weights"
        return found

    def evaluate(self, images: Array, labels: Array, *, threads: int = 1) -> tuple[float, int]:
        """Summed loss and number correct by running statistics, of any number of samples."""
        self._check_images(images)
        labels = _checked_labels(labels, len(images))
        total, correct = 0.0, 0
        for start, some in self._batches(images):
            loss, right = self._plan.infer(
                len(some), self._native(some), labels=labels[start:].ctypes.data, threads=threads
            )
            total += loss * len(some)
            correct += right
        return total, correct

    def forward(self, images: Array, *, threads: int = 1) -> NDArray[np.float32]:
        """Logits [N, classes] by running statistics, of any number of samples."""
        self._check_images(images)
        logits = np.empty((len(images), self.program.classes), np.float32)
        for start, some in self._batches(images):
            self._plan.infer(
                len(some), self._native(some), logits=logits[start:].ctypes.data, threads=threads
            )
        return logits

    def statistics(self, images: Array, *, threads: int = 1) -> dict[str, NDArray[np.float32]]:
        """Mean and population variance of what each batch norm sees in training mode.

        Batches (`statistics_batches`), each normalised by its own statistics, are pooled by their
        counts (Chan, Golub and LeVeque, 1979).

        Args:
            images: of any number of samples.
            threads: how many to use.

        Returns:
            Names of running means and variances -> float32 [channels], over all samples and
            positions; nothing of a norm that keeps none.

        Raises:
            SparseModelError: wrong images, or a batch in which a norm has one value a channel.
        """
        self._check_images(images)
        pooled = {
            number: _Pooled(self.program.results[number][0])
            for number, node in enumerate(self.program.nodes)
            if node.kind == "norm"
        }
        for part in statistics_batches(len(images) if pooled else 0, self.batch_size):
            some = np.ascontiguousarray(images[part])
            asked = [
                Moments(own.mean.ctypes.data, own.variance.ctypes.data, 0, number)
                for number, own in pooled.items()
            ]
            counts = self._plan.statistics(len(some), self._native(some), asked, threads=threads)
            for own, count in zip(pooled.values(), counts, strict=True):
                own.add(count)
        named: dict[str, NDArray[np.float32]] = {}
        for number, own in pooled.items():
            node = self.program.nodes[number]
            if node.mean is not None and node.variance is not None:
                mean, variance = own.result()
                named[node.mean] = mean.astype(np.float32)
                named[node.variance] = variance.astype(np.float32)
        return named

    def seconds(self) -> list[OperationSeconds]:
        """Time of each operation in the last run; the loss counts with the last one."""
        forward, backward = self._plan.seconds()
        return [
            OperationSeconds(node.name, node.kind, float(f), float(b))
            for node, f, b in zip(self.program.nodes, forward, backward, strict=True)
        ]

    # ---- checks ----

    def _batches(self, images: Array) -> Iterator[tuple[int, Array]]:
        """Contiguous batches of images, each with the number of its first."""
        size = full_batch(self.batch_size)
        for start in range(0, len(images), size):
            yield start, np.ascontiguousarray(images[start : start + size])

    def _checked_batch(self, images: Array, labels: Array) -> tuple[Array, Array]:
        self._check_images(images)
        labels = _checked_labels(labels, len(images))
        if len(images) > self.batch_size:
            raise SparseModelError(
                f"the plan is for batches of at most {self.batch_size}, got {len(images)}"
            )
        return np.ascontiguousarray(images), labels

    def _check_images(self, images: Array) -> None:
        if not isinstance(images, np.ndarray):
            raise SparseModelError(f"expected images in an array, got {type(images).__name__}")
        shape, expected = images.shape, self.program.input_shape
        if shape[1:] != expected or len(shape) < 2 or shape[0] < 1:
            raise SparseModelError(f"expected images [B, *{expected}], got {shape}")
        allowed = ("float32",) if self._pixels is None else ("float32", "uint8")
        if images.dtype not in allowed:
            raise SparseModelError(
                f"expected images of {' or '.join(allowed)}, got {images.dtype} (bytes need "
                "normalization=(mean, std))"
            )

    def _native(self, images: Array) -> Images:
        if images.dtype == np.float32:
            return Images.floats(images.ctypes.data)
        assert self._pixels is not None, "bytes are refused without"
        scale, shift = self._pixels
        return Images.bytes(images.ctypes.data, scale.ctypes.data, shift.ctypes.data)


class _Pooled:
    """Mean and variance of a growing sample; `mean` and `variance` are room for a batch's own."""

    def __init__(self, channels: int) -> None:
        self.mean, self.variance = np.empty(channels), np.empty(channels)
        self._count = 0
        self._mean, self._squares = np.zeros(channels), np.zeros(channels)

    def add(self, count: int) -> None:
        """Pool the batch's, of so many values."""
        total = self._count + count
        away = self.mean - self._mean
        self._mean += away * (count / total)
        self._squares += self.variance * count + away * away * (self._count * (count / total))
        self._count = total

    def result(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and population variance of all."""
        return self._mean, self._squares / self._count


def pixel_factors(
    shape: tuple[int, ...], normalization: Normalization | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """scale and shift with (byte / 255 - mean) / std = scale * byte + shift."""
    if normalization is None:
        return None
    mean, std = (np.array(list(numbers), dtype=np.float64) for numbers in normalization)
    if mean.shape != (shape[0],) or std.shape != mean.shape or not (std > 0).all():
        raise SparseModelError(
            f"normalization: expected mean and positive std of {shape[0]} channels, got "
            f"{normalization}"
        )
    return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)


def layer_geometry(program: Program, number: int, batch: int) -> cpu.Geometry:
    """The library's form of a convolution or linear layer."""
    node = program.nodes[number]
    assert node.weight is not None, "a layer has a weight"
    out, _, *kernel = program.shapes()[node.weight]
    channels, height, width = planes(program.results[node.inputs[0]])
    return cpu.Geometry.conv(
        batch, channels, out, (height, width), (kernel[0], kernel[1]) if kernel else (1, 1),
        stride=node.stride, padding=node.padding, dilation=node.dilation, groups=node.groups,
    )  # fmt: skip


def _checked_labels(labels: Array, count: int) -> Array:
    if not isinstance(labels, np.ndarray):
        raise SparseModelError(f"expected labels in an array, got {type(labels).__name__}")
    if labels.shape != (count,) or labels.dtype != np.int64:
        raise SparseModelError(
            f"expected labels int64 [{count}], got {labels.dtype} of shape {labels.shape}"
        )
    return np.ascontiguousarray(labels)


def _parameter(arrays: ParameterArrays, count: int, what: str) -> Parameter:
    values, gradient, momentum = (
        _address(array, np.float32, count, name)
        for array, name in zip(
            arrays, (what, f"{what} (gradient)", f"{what} (momentum)"), strict=True
        )
    )
    return Parameter(values, gradient, momentum)


def _address(array: Array | None, dtype: Any, count: int, what: str) -> int | None:
    if array is None:
        return None
    if array.dtype != dtype or array.size != count or not array.flags.c_contiguous:
        raise SparseModelError(
            f"{what}: expected {count:,} contiguous {np.dtype(dtype)}, got {array.dtype} of shape "
            f"{array.shape} and strides {array.strides}"
        )
    return int(array.__array_interface__["data"][0]) or None
