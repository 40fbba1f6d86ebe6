"""The gradient of one parameter for each sample of a batch, kept as what it is made of.

A linear layer's gradient for a sample is Σ_t d_t ⊗ a_t over its positions: two small factors in
place of a matrix. Each class here holds such factors of one call of a layer and gives norms and
dot products; where the gradient itself has to be made, that happens block by block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch.nn import functional

from sparsemodel.kernels.csr import flat_positions
from sparsemodel.kernels.cuda import array_ops as cuda_array_ops
from sparsemodel.kernels.cuda import launch as cuda
from sparsemodel.kernels.cuda import measured
from sparsemodel.kernels.geometry import ConvGeometry
from sparsemodel.kernels.reference import conv2d_backward

Tensor = torch.Tensor

# So many numbers of gradients, patches or Gram matrices are held at once: on the processor about
# what its cache holds, elsewhere enough to be worth a launch.
BLOCK = 1 << 18
DEVICE_BLOCK = 1 << 24
# Writing and reading a number costs about as much as so many multiplications.
MEMORY_COST = 16
# With so few weights a channel, patches are cheaper than a convolution's weight gradient.
FEW_WEIGHTS = 64
# A convolution on the processor gains nothing from more channels side by side.
WIDEST = 256


class SampleGradient(ABC):
    """Gradients of a parameter seen as a matrix [num_rows, row_length], for `batch` samples.

    A parameter used several times has one for each use; the gradient is their sum.
    """

    batch: int
    num_rows: int
    row_length: int
    device: torch.device
    in_rows: bool = False  # whether `block` can give some rows alone
    max_samples: int | None = None  # that `block` is fast for

    @abstractmethod
    def block(self, samples: slice, rows: slice) -> Tensor:
        """The gradients of some samples at some rows: [b, rows × row_length]."""

    @abstractmethod
    def dot(self, direction: Tensor) -> Tensor:
        """⟨gradient, direction⟩ of each sample: float64 [batch].

        Args:
            direction: of the parameter's shape and type.
        """

    def square_norm(self) -> Tensor:
        """‖gradient‖² of each sample: float64 [batch]."""
        return norms_by_blocks([self])


class Vector(SampleGradient):
    """Gradients that are small enough to be held: [batch, numel]. Biases and norms have such."""

    row_length = 1

    def __init__(self, gradients: Tensor) -> None:
        self.gradients, self.device = gradients, gradients.device
        self.batch, self.num_rows = gradients.shape

    def block(self, samples: slice, rows: slice) -> Tensor:
        return self.gradients[samples, rows]

    def dot(self, direction: Tensor) -> Tensor:
        return (self.gradients @ direction.reshape(-1)).double()

    def square_norm(self) -> Tensor:
        return _square_sums(self.gradients)


class Factored(SampleGradient):
    """Σ_t left_t ⊗ right_t: left [batch, T, num_rows], right [batch, T, row_length]."""

    in_rows = True

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right, self.device = left, right, right.device
        self.batch, self.positions, self.num_rows = left.shape
        self.row_length = right.shape[-1]

    def block(self, samples: slice, rows: slice) -> Tensor:
        return torch.bmm(self.left[samples, :, rows].mT, self.right[samples]).flatten(1)

    def dot(self, direction: Tensor) -> Tensor:
        images = self.right @ direction.reshape(self.num_rows, self.row_length).mT
        return images.mul_(self.left).flatten(1).sum(1, dtype=torch.float64)

    def square_norm(self) -> Tensor:
        if self.positions == 1:
            left, right = self.left.squeeze(1), self.right.squeeze(1)
            return _square_sums(left) * _square_sums(right)
        return factored_norms([self])

    def left_products(self, other: Factored | Rows, samples: slice) -> Tensor:
        """⟨left_t, left_s of the other⟩: [b, T, S]."""
        if isinstance(other, Rows):
            ids = other.ids[samples].unsqueeze(1).expand(-1, self.positions, -1)
            return self.left[samples].gather(2, ids)
        return torch.bmm(self.left[samples], other.left[samples].mT)


class Rows(SampleGradient):
    """Σ_t onehot(id_t) ⊗ right_t, an embedding's: ids int64 [batch, T], right [batch, T, width]."""

    in_rows = True

    def __init__(self, ids: Tensor, right: Tensor, num_rows: int) -> None:
        self.ids, self.right, self.num_rows, self.device = ids, right, num_rows, right.device
        self.batch, self.positions, self.row_length = right.shape

    def block(self, samples: slice, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.num_rows)
        ids, right = self.ids[samples] - start, self.right[samples]
        inside = (ids >= 0) & (ids < stop - start)
        sample = torch.arange(len(ids), device=ids.device).unsqueeze(1).expand_as(ids)
        gradient = right.new_zeros(len(ids) * (stop - start), self.row_length)
        gradient.index_add_(0, (sample * (stop - start) + ids)[inside], right[inside])
        return gradient.view(len(ids), -1)

    def dot(self, direction: Tensor) -> Tensor:
        picked = direction.reshape(self.num_rows, self.row_length)[self.ids]
        return picked.mul_(self.right).flatten(1).sum(1, dtype=torch.float64)

    def square_norm(self) -> Tensor:
        """Sum what a sample gives to the same row, then square."""
        sample = torch.arange(self.batch, device=self.ids.device).unsqueeze(1)
        keys, place = (sample * self.num_rows + self.ids).unique(return_inverse=True)
        sums = self.right.new_zeros(len(keys), self.row_length)
        sums.index_add_(0, place.reshape(-1), self.right.flatten(0, 1))
        norms = torch.zeros(self.batch, dtype=torch.float64, device=self.right.device)
        return norms.index_add_(0, keys // self.num_rows, _square_sums(sums))

    def left_products(self, other: Factored | Rows, samples: slice) -> Tensor:
        """⟨left_t, left_s of the other⟩: [b, T, S]."""
        if isinstance(other, Factored):
            return other.left_products(self, samples).mT
        same = self.ids[samples].unsqueeze(2) == other.ids[samples].unsqueeze(1)
        return same.to(self.right.dtype)


class Convolution(SampleGradient):
    """A convolution's: its input [batch, in, H, W] and its output's gradient [batch, out, …]."""

    def __init__(self, x: Tensor, dy: Tensor, geometry: ConvGeometry) -> None:
        self.x, self.dy, self.geometry, self.device = x, dy, geometry, x.device
        self.batch, self.num_rows, self.row_length = len(x), dy.shape[1], geometry.row_length
        self.positions = dy.shape[2] * dy.shape[3]
        self.by_patches = self.row_length <= FEW_WEIGHTS
        if self.by_patches:
            patches = self.row_length * geometry.groups * self.positions
            self.max_samples = max(1, _budget(x.device) // patches)
        elif x.device.type == "cpu":
            widest = max(geometry.in_channels, geometry.out_channels)
            self.max_samples = max(1, WIDEST // widest)

    def block(self, samples: slice, rows: slice) -> Tensor:
        if self.by_patches:
            left, patches = self._left(samples), self._patches(samples)
            gradient: Tensor | None = torch.bmm(left, patches.mT)
        else:
            gradient = self._side_by_side(self.x[samples], self.dy[samples])
        assert gradient is not None
        return gradient.reshape(-1, self.num_rows * self.row_length)

    def _side_by_side(self, x: Tensor, dy: Tensor) -> Tensor | None:
        """Samples as groups of one convolution, whose weight gradient has a part for each."""
        g, batch = self.geometry, len(x)
        whole = g._replace(
            in_channels=batch * g.in_channels,
            out_channels=batch * g.out_channels,
            groups=batch * g.groups,
        )
        weight = x.new_empty(whole.weight_shape)  # never read; expanded, it would be copied
        dy, x = (t.reshape(1, -1, *t.shape[2:]) for t in (dy, x))
        return conv2d_backward(dy, x, weight, whole, (False, True, False))[1]

    def dot(self, direction: Tensor) -> Tensor:
        g, weight = self.geometry, direction.reshape(self.geometry.weight_shape)
        images = functional.conv2d(self.x, weight, None, g.stride, g.padding, g.dilation, g.groups)
        return images.mul_(self.dy).flatten(1).sum(1, dtype=torch.float64)

    def square_norm(self) -> Tensor:
        groups, positions = self.geometry.groups, self.positions
        patches = self.row_length * positions
        if not _gram_is_cheaper(positions, self.num_rows // groups, self.row_length, patches):
            return norms_by_blocks([self])
        chunks = _chunks(self, groups * (patches + 2 * positions**2))
        return torch.cat([self._gram(samples) for samples in chunks])

    def _gram(self, samples: slice) -> Tensor:
        left, patches = self._left(samples), self._patches(samples)
        products = torch.bmm(left.mT, left).mul_(torch.bmm(patches.mT, patches))
        return _sums(products).view(-1, self.geometry.groups).sum(1).clamp_(min=0)

    def _left(self, samples: slice) -> Tensor:
        """[b × groups, out/groups, positions]."""
        width = self.num_rows // self.geometry.groups
        return self.dy[samples].reshape(-1, width, self.positions)

    def _patches(self, samples: slice) -> Tensor:
        """What each position of the output saw: [b × groups, row_length, positions]."""
        g = self.geometry
        x = functional.pad(self.x[samples], (g.padding_w, g.padding_w, g.padding_h, g.padding_h))
        of_sample, of_channel, of_row, of_column = x.stride()
        strides = (of_row * g.dilation_h, of_column * g.dilation_w)
        patches = x.as_strided(
            (len(x), g.in_channels, g.kernel_h, g.kernel_w, *self.dy.shape[2:]),
            (of_sample, of_channel, *strides, of_row * g.stride_h, of_column * g.stride_w),
            x.storage_offset(),
        )
        return patches.reshape(-1, self.row_length, self.positions)


class Active(SampleGradient):
    """A sparse layer's: of the dense weight's gradient, what lies at the active places."""

    def __init__(self, dense: Factored | Convolution, row_ptr: Tensor, cols: Tensor) -> None:
        self.dense, self.row_ptr, self.cols = dense, row_ptr, cols
        self.batch, self.num_rows = dense.batch, dense.num_rows
        self.row_length, self.in_rows = dense.row_length, dense.in_rows
        self.max_samples, self.device = dense.max_samples, dense.device

    def block(self, samples: slice, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.num_rows)
        bounds = self.row_ptr[start : stop + 1]
        cols = self.cols[int(bounds[0]) : int(bounds[-1])]
        places = flat_positions(bounds, cols, self.row_length)
        return self.dense.block(samples, rows).index_select(1, places)

    def dot(self, direction: Tensor) -> Tensor:
        return self.dense.dot(self._scattered(direction))

    def square_norm(self) -> Tensor:
        dense = self.dense
        if isinstance(dense, Factored) and self._kernel_is_faster(dense):
            return self._norm_by_kernel(dense)
        if isinstance(dense, Factored) and dense.positions == 1:
            # Σ left_o² right_i² over the active (o, i): a product with the pattern.
            squares = Factored(dense.left.double().square(), dense.right.double().square())
            return squares.dot(self._scattered(torch.ones_like(self.cols, dtype=torch.float64)))
        return norms_by_blocks([self])

    def _kernel_is_faster(self, dense: Factored) -> bool:
        x, positions = dense.right, dense.positions
        return cuda.runner_for(x) is not None and measured.sparse_is_faster(
            "norms" if positions == 1 else "norms of sequences",
            x,
            weights=self.num_rows * self.row_length,
            nnz=len(self.cols),
            rows=self.batch * positions,
        )

    def _norm_by_kernel(self, dense: Factored) -> Tensor:
        """On a GPU, from the factors alone, the samples innermost."""
        dy, x = (t.permute(2, 1, 0) for t in (dense.left, dense.right))
        if dense.positions == 1:
            dy, x = dy.squeeze(1), x.squeeze(1)
        pattern = self.row_ptr, self.cols
        found = cuda_array_ops.square_norms(dy.contiguous(), x.contiguous(), *pattern)
        norms: Tensor = found.double()
        return norms

    def _scattered(self, values: Tensor) -> Tensor:
        places = flat_positions(self.row_ptr, self.cols, self.row_length)
        return values.new_zeros(self.num_rows * self.row_length).scatter(0, places, values)


class Recomputed(SampleGradient):
    """Of any layer, through a function that differentiates its call for some samples anew."""

    row_length = 1

    def __init__(self, gradients: Callable[[slice], Tensor], batch: int, parameter: Tensor) -> None:
        self.gradients, self.batch = gradients, batch
        self.num_rows, self.device = parameter.numel(), parameter.device

    def block(self, samples: slice, rows: slice) -> Tensor:
        return self.gradients(samples)[:, rows]

    def dot(self, direction: Tensor) -> Tensor:
        direction = direction.reshape(-1)
        chunks = _chunks(self, self.num_rows)
        return torch.cat([(self.gradients(chunk) @ direction).double() for chunk in chunks])


def square_norms(uses: Sequence[SampleGradient]) -> Tensor:
    """‖sum of the uses' gradients‖² of each sample, what they have in common included.

    Args:
        uses: one or more of the same parameter and batch.

    Returns:
        float64 [batch].
    """
    if len(uses) == 1:
        return uses[0].square_norm()
    factored = [use for use in uses if isinstance(use, Factored | Rows)]
    if len(factored) == len(uses):
        return factored_norms(factored)
    return norms_by_blocks(uses)


def factored_norms(uses: Sequence[Factored | Rows]) -> Tensor:
    """`square_norms` of factored gradients, by Gram matrices or by blocks: what is cheaper.

    ‖Σ_t l_t ⊗ r_t‖² = Σ_ts ⟨l_t, l_s⟩ ⟨r_t, r_s⟩: two T × T matrices in place of the gradient.
    """
    positions = sum(use.positions for use in uses)
    if not _gram_is_cheaper(positions, uses[0].num_rows, uses[0].row_length, 0):
        return norms_by_blocks(uses)
    norms = []
    for samples in _chunks(uses[0], 2 * positions**2):
        norm = torch.zeros((), dtype=torch.float64, device=uses[0].device)
        for i, use in enumerate(uses):
            for j, other in enumerate(uses[: i + 1]):
                right = torch.bmm(use.right[samples], other.right[samples].mT)
                products = right.mul_(use.left_products(other, samples))
                norm = norm + _sums(products) * (1 if i == j else 2)
        norms.append(norm.clamp(min=0))
    return torch.cat(norms)


def norms_by_blocks(uses: Sequence[SampleGradient]) -> Tensor:
    """`square_norms` from the gradients themselves, so many at a time as fit into BLOCK."""
    first = uses[0]
    numel = first.num_rows * first.row_length
    budget = _budget(first.device)
    in_rows = all(use.in_rows for use in uses) and numel > budget
    height = max(1, budget // first.row_length) if in_rows else first.num_rows
    norms = []
    most = min((use.max_samples for use in uses if use.max_samples), default=None)
    for samples in _chunks(first, numel, most):
        parts = []
        for start in range(0, first.num_rows, height):
            rows = slice(start, min(start + height, first.num_rows))
            gradient = first.block(samples, rows)
            for use in uses[1:]:
                gradient = gradient + use.block(samples, rows)
            parts.append(_square_sums(gradient))
        norms.append(torch.stack(parts).sum(0))
    return torch.cat(norms)


def _gram_is_cheaper(positions: int, num_rows: int, row_length: int, copied: int) -> bool:
    """Whether two Gram matrices cost less than the gradient, `copied` numbers written before."""
    gram = 2 * positions * positions * (num_rows + row_length + 3 * MEMORY_COST)
    blocks = num_rows * row_length * (positions + 2 * MEMORY_COST)
    return gram + 2 * MEMORY_COST * copied < blocks


def _budget(device: torch.device) -> int:
    return BLOCK if device.type == "cpu" else DEVICE_BLOCK


def _chunks(of: SampleGradient, numbers: int, most: int | None = None) -> Iterator[slice]:
    """Ranges of at most so many samples, each of which takes so many numbers of the budget."""
    step = max(1, min(_budget(of.device) // max(1, numbers), most or of.batch))
    for start, stop in pairwise([*range(0, of.batch, step), of.batch]):
        yield slice(start, stop)


def _square_sums(x: Tensor) -> Tensor:
    """Σ x² of each row, float64."""
    squares: Tensor = torch.linalg.vector_norm(x, dim=1).double().square_()
    return squares


def _sums(x: Tensor) -> Tensor:
    """Sum of each entry of the first dimension, float64."""
    return x.flatten(1).sum(1, dtype=torch.float64)
