"""Weighted means of client tensors whose bits do not depend on the order of the replies.

Floating-point addition is not associative, so a plain running sum changes with the order in
which replies arrive. Here every value is turned into a fixed-point integer and the integers are
added: exactly the same sum for every order and every number of threads. Replies are folded in
one by one; nothing else of them is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedprune.errors import DIVERGED, ClientError
from sparsemodel.runtime.fixed_sum import MAX_ABSOLUTE_VALUE, MAX_TOTAL_WEIGHT, FixedSum, FixedSums
from sparsemodel.runtime.pattern import Patterns
from sparsemodel.runtime.state import Array, Entries, SparseState, Tensors

__all__ = ["MAX_TOTAL_WEIGHT", "EntryMean", "StateMean", "WeightedMean"]


class WeightedMean:
    """The running mean of dictionaries of arrays, each reply weighted by its example count.

    Resolution is 2^-52 (finer than float32 for every value above 1e-8 in magnitude); sums are
    exact in that resolution. Memory is 16 bytes for each coordinate, whatever the number of
    replies.

    Args:
        batch_norms: pairs (mean name, variance name) of batch-norm running statistics. Their
            variance is pooled as that of the union of the clients' data,
            σ² = Σ p_k (σ_k² + μ_k²) − μ², not averaged.
        device: a torch device to keep the sums on; None: numpy. The bits of the result are the
            same everywhere.

    >>> mean = WeightedMean()
    >>> mean.add({"w": np.float32([1])}, weight=1)
    >>> mean.add({"w": np.float32([4])}, weight=3)
    >>> mean.result()["w"]
    array([3.25], dtype=float32)
    """

    def __init__(
        self, batch_norms: Sequence[tuple[str, str]] = (), *, device: str | None = None
    ) -> None:
        self._mean_of = {variance: mean for mean, variance in batch_norms}
        self._device = device
        self._sums: dict[str, Any] = {}
        self._together: FixedSums | None = None
        self.total_weight = 0
        self.num_replies = 0

    def add(self, tensors: Tensors, *, weight: int) -> None:
        """Fold in one reply. A reply that is refused leaves the mean as it was.

        Args:
            tensors: name -> float32; the names and shapes of the first reply are binding.
            weight: the client's number of examples, at least 1.

        Raises:
            ClientError: names or shapes differ, a value is not finite or too large for the
                fixed-point range (|x| < 2^20), or the weight is not positive.
        """
        if weight < 1 or self.total_weight + weight > MAX_TOTAL_WEIGHT:
            raise ClientError(
                f"weight {weight}: expected 1 or more, and at most {MAX_TOTAL_WEIGHT} in total"
            )
        self._check_alike(tensors)
        sums = self._sums or {name: self._sum(value.shape) for name, value in tensors.items()}
        refused = self._added(sums, tensors, weight)
        if refused:
            if self._sums:  # integers: what was added goes away without a trace
                self._added(sums, tensors, -weight)
            raise ClientError(self._complaint(refused[0], tensors))
        self._sums = sums
        self.total_weight += weight
        self.num_replies += 1

    def result(self) -> dict[str, Array]:
        """The weighted mean so far: name -> float32.

        Raises:
            ClientError: nothing was added.
        """
        if self.total_weight == 0:
            raise ClientError("no reply was folded into the mean")
        means = {name: total.mean(self.total_weight) for name, total in self._sums.items()}
        for variance, mean in self._mean_of.items():
            if variance in means:
                means[variance] = np.maximum(means[variance] - means[mean] ** 2, 0.0)
        return {name: value.astype(np.float32) for name, value in means.items()}

    @property
    def names(self) -> list[str]:
        """What is added up."""
        return list(self._sums)

    def sum_of(self, name: str) -> Any:
        """The running sum of one array."""
        return self._sums[name]

    def words(self) -> NDArray[np.uint64]:
        """All sums as numbers modulo 2^64, by name; of sums that numpy holds."""
        return _joined([self._sums[name].words() for name in sorted(self._sums)])

    def take(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        words: NDArray[np.uint64],
        *,
        width: int,
        weight: int,
        num_replies: int,
    ) -> None:
        """Begin with sums that were made elsewhere: the `words` of all together.

        Args:
            shapes: name -> shape, of every array.
            width: bytes of a word.
        """
        start = 0
        for name in sorted(shapes):
            end = start + 2 * math.prod(shapes[name])
            self._sums[name] = FixedSum.of_words(shapes[name], words[start:end], width=width)
            start = end
        self.total_weight, self.num_replies = weight, num_replies

    def _sum(self, shape: tuple[int, ...]) -> Any:
        if self._device is None:
            return FixedSum(shape)
        from sparsemodel.kernels.device_sum import DeviceSum  # noqa: PLC0415

        return DeviceSum(shape, self._device)

    def _added(self, sums: dict[str, Any], tensors: Tensors, weight: int) -> list[str]:
        """Names of those of which a value was left out."""
        values = [tensors[name] for name in sums]
        means = [self._squared(name, tensors) for name in sums]
        if self._device is not None:
            together = zip(sums.values(), values, means, strict=True)
            counts = [total.add(value, mean, weight) for total, value, mean in together]
        else:
            if self._together is None or sums is not self._sums:
                self._together = FixedSums(list(sums.values()))
            counts = self._together.add(values, means, weight)
        return [name for name, count in zip(sums, counts, strict=True) if count]

    def _check_alike(self, tensors: Tensors) -> None:
        if self._sums and tensors.keys() != self._sums.keys():
            odd = sorted(tensors.keys() ^ self._sums.keys())
            raise ClientError(f"tensors differ from those of the other clients: {odd[:5]}")
        for name, total in self._sums.items():
            value = tensors[name]
            if value.shape != total.shape:
                raise ClientError(
                    f"{name!r}: expected shape {self._sums[name].shape}, got {value.shape}"
                )

    def _squared(self, name: str, tensors: Tensors) -> Array | None:
        """The means whose squares are added to a variance."""
        return tensors[self._mean_of[name]] if name in self._mean_of else None

    def _complaint(self, name: str, tensors: Tensors) -> str:
        """What is wrong with a refused tensor."""
        if not np.isfinite(tensors[name]).all():
            return f"{name!r} holds NaN or infinite values: {DIVERGED}"
        value, means = tensors[name].astype(np.float64), self._squared(name, tensors)
        if means is not None:
            value = value + means.astype(np.float64) ** 2
        return (
            f"{name!r} holds a value of magnitude {float(np.abs(value).max()):.3g}, beyond "
            f"{MAX_ABSOLUTE_VALUE:.3g}: {DIVERGED}"
        )


class StateMean:
    """The running mean of states under one set of patterns; see WeightedMean.

    Statistics of batch norms (names that end in running_mean and running_var) are pooled.

    Args:
        device: as of `WeightedMean`.
        updates: whether the states are differences; their statistics have plain means.
    """

    def __init__(self, *, device: str | None = None, updates: bool = False) -> None:
        self._device, self._updates = device, updates
        self._mean: WeightedMean | None = None
        self._order: list[str] = []
        self._patterns: Patterns | None = None

    @property
    def num_replies(self) -> int:
        """States folded in so far."""
        return 0 if self._mean is None else self._mean.num_replies

    def add(self, state: SparseState, *, weight: int) -> None:
        """Fold in one state. A state that is refused leaves the mean as it was.

        Raises:
            ClientError: it is under other patterns, or as `WeightedMean.add`.
        """
        mean = self._mean
        if mean is None:
            mean = self._empty(state)
        elif state.patterns != self._patterns:
            raise ClientError("a state under another mask than those before it")
        mean.add(state.values, weight=weight)
        if self._mean is None:
            self._mean, self._order, self._patterns = mean, list(state.values), state.patterns

    def result(self) -> SparseState:
        """The weighted mean so far, under the patterns of the states.

        Raises:
            ClientError: nothing was added.
        """
        if self._mean is None:
            raise ClientError("no reply was folded into the mean")
        mean = self._mean.result()
        return SparseState({name: mean[name] for name in self._order}, self._patterns)

    def words(self) -> NDArray[np.uint64]:
        """As `WeightedMean.words`."""
        assert self._mean is not None
        return self._mean.words()

    def take(
        self, like: SparseState, words: NDArray[np.uint64], *, width: int, weight: int, replies: int
    ) -> None:
        """Begin with sums that were made elsewhere, of states like this one; see WeightedMean."""
        self._mean, self._order, self._patterns = (
            self._empty(like),
            list(like.values),
            like.patterns,
        )
        shapes = {name: value.shape for name, value in like.values.items()}
        self._mean.take(shapes, words, width=width, weight=weight, num_replies=replies)

    def _empty(self, like: SparseState) -> WeightedMean:
        pairs = [
            (name, f"{stem}running_var")
            for name in like.values
            if (stem := name.removesuffix("running_mean")) != name and not self._updates
        ]
        return WeightedMean(pairs, device=self._device)


class EntryMean:
    """The weighted mean of sparse (index, value) uploads; a coordinate not sent counts as zero.

    This is FedTiny's g̃_i = Σ_k (|D_k| / |D|) g̃_{k,i}. Memory grows with the number of
    different coordinates seen, not with the size of the layer.
    """

    def __init__(self) -> None:
        self._indices: dict[str, NDArray[np.int64]] = {}
        self._sums: dict[str, FixedSum] = {}
        self.total_weight = 0

    def add(self, entries: Entries, *, weight: int) -> None:
        """Fold in one client's entries. Entries that are refused leave the mean as it was.

        Raises:
            ClientError: a value is not finite or too large, or the weight is not positive or, with
                those before, too large.
        """
        if self.total_weight + weight > MAX_TOTAL_WEIGHT:
            raise ClientError(f"weight {weight}: expected at most {MAX_TOTAL_WEIGHT} in total")
        single = WeightedMean()
        single.add({name: values for name, (_, values) in entries.items()}, weight=weight)
        for name, (indices, _) in entries.items():
            known = self._indices.get(name, np.empty(0, dtype=np.int64))
            union = np.union1d(known, indices)
            total = FixedSum(union.shape)
            if name in self._sums:
                total.take(self._sums[name], np.searchsorted(union, known))
            total.take(single.sum_of(name), np.searchsorted(union, indices))
            self._indices[name], self._sums[name] = union, total
        self.total_weight += weight

    def sums(self) -> dict[str, tuple[NDArray[np.int64], FixedSum]]:
        """Layer -> (ascending positions; their sum)."""
        return {name: (self._indices[name], total) for name, total in self._sums.items()}

    def take(self, sums: Mapping[str, tuple[NDArray[np.int64], FixedSum]], *, weight: int) -> None:
        """Begin with sums that were made elsewhere."""
        for name, (indices, total) in sums.items():
            self._indices[name], self._sums[name] = indices, total
        self.total_weight = weight

    def result(self) -> Entries:
        """Layer -> (ascending positions; mean values)."""
        return {
            name: (indices, self._sums[name].mean(self.total_weight).astype(np.float32))
            for name, indices in self._indices.items()
        }


def _joined(parts: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    return np.concatenate(parts) if parts else np.empty(0, np.uint64)
