"""Weighted means of client tensors whose bits do not depend on the order of the replies.

Floating-point addition is not associative, so a plain running sum changes with the order in
which replies arrive. Here every value is turned into a fixed-point integer and the integers are
added: exactly the same sum for every order and every number of threads. Replies are folded in
one by one; nothing else of them is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fedprune.errors import ClientError

# A value x is held as (high, low): x = high / 2^16 + low / 2^52, high signed, 0 <= low < 2^36.
# The bounds leave room for a total weight of 2^27 examples in 64 bits: 2^36 * 2^27 = 2^63.
_HIGH_BITS = 16
_LOW_BITS = 36
MAX_ABSOLUTE_VALUE = 2.0**20
MAX_TOTAL_WEIGHT = 2**27 - 1


class WeightedMean:
    """The running mean of dictionaries of tensors, each reply weighted by its example count.

    Resolution is 2^-52 (finer than float32 for every value above 1e-8 in magnitude); sums are
    exact in that resolution. Memory is 16 bytes for each coordinate, whatever the number of
    replies.

    Args:
        batch_norms: pairs (mean name, variance name) of batch-norm running statistics. Their
            variance is pooled as that of the union of the clients' data,
            σ² = Σ p_k (σ_k² + μ_k²) − μ², not averaged.

    >>> mean = WeightedMean()
    >>> mean.add({"w": torch.tensor([1.0])}, weight=1)
    >>> mean.add({"w": torch.tensor([4.0])}, weight=3)
    >>> mean.result()["w"]
    tensor([3.2500])
    """

    def __init__(self, batch_norms: Sequence[tuple[str, str]] = ()) -> None:
        self._mean_of = {variance: mean for mean, variance in batch_norms}
        self._high: dict[str, torch.Tensor] = {}
        self._low: dict[str, torch.Tensor] = {}
        self.total_weight = 0
        self.num_replies = 0

    def add(self, tensors: Mapping[str, torch.Tensor], *, weight: int) -> None:
        """Fold in one reply. A reply that is refused leaves the mean as it was.

        Args:
            tensors: name -> float tensor; the names and shapes of the first reply are binding.
            weight: the client's number of examples, at least 1.

        Raises:
            ClientError: names or shapes differ, a value is not finite or too large for the
                fixed-point range (|x| < 2^20), or the weight is not positive.
        """
        if weight < 1 or self.total_weight + weight > MAX_TOTAL_WEIGHT:
            raise ClientError(
                f"weight {weight}: expected 1 or more, and at most {MAX_TOTAL_WEIGHT} in total"
            )
        if self._high and tensors.keys() != self._high.keys():
            odd = sorted(tensors.keys() ^ self._high.keys())
            raise ClientError(f"tensors differ from those of the other clients: {odd[:5]}")
        parts = {name: self._fixed_point(name, tensors) for name in tensors}
        for name, (high, low) in parts.items():
            if name not in self._high:
                self._high[name], self._low[name] = high.mul_(weight), low.mul_(weight)
            else:
                self._high[name].add_(high, alpha=weight)
                self._low[name].add_(low, alpha=weight)
        self.total_weight += weight
        self.num_replies += 1

    def result(self) -> dict[str, torch.Tensor]:
        """The weighted mean so far: name -> float32 tensor.

        Raises:
            ClientError: nothing was added.
        """
        if self.total_weight == 0:
            raise ClientError("no reply was folded into the mean")
        means = {
            name: (high.double() / 2**_HIGH_BITS + self._low[name].double() / 2.0**52)
            / self.total_weight
            for name, high in self._high.items()
        }
        for variance, mean in self._mean_of.items():
            if variance in means:
                means[variance] = (means[variance] - means[mean] ** 2).clamp_min(0.0)
        return {name: value.float() for name, value in means.items()}

    def _fixed_point(
        self, name: str, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        value = tensors[name].double()
        if not torch.isfinite(value).all():
            raise ClientError(f"{name!r} holds NaN or infinite values")
        if name in self._mean_of:
            value = value + tensors[self._mean_of[name]].double() ** 2
        if value.numel() and float(value.abs().max()) >= MAX_ABSOLUTE_VALUE:
            raise ClientError(
                f"{name!r} holds a value of magnitude {float(value.abs().max()):.3g}, beyond "
                f"{MAX_ABSOLUTE_VALUE:.3g}: training has diverged"
            )
        if name in self._high and value.shape != self._high[name].shape:
            raise ClientError(
                f"{name!r}: expected shape {tuple(self._high[name].shape)}, "
                f"got {tuple(value.shape)}"
            )
        scaled = value * 2**_HIGH_BITS
        whole = scaled.floor()
        # The rest is below 1 and exact; rounding it up to 2^36 is allowed and still adds up.
        rest = ((scaled - whole) * 2.0**_LOW_BITS).round()
        return whole.long(), rest.long()


class EntryMean:
    """The weighted mean of sparse (index, value) uploads; a coordinate not sent counts as zero.

    This is FedTiny's g̃_i = Σ_k (|D_k| / |D|) g̃_{k,i}. Memory grows with the number of
    different coordinates seen, not with the size of the layer.
    """

    def __init__(self) -> None:
        self._indices: dict[str, torch.Tensor] = {}
        self._high: dict[str, torch.Tensor] = {}
        self._low: dict[str, torch.Tensor] = {}
        self.total_weight = 0

    def add(self, entries: Mapping[str, tuple[torch.Tensor, torch.Tensor]], *, weight: int) -> None:
        """Fold in one client's entries: name -> (int64 indices, float32 values), both [K].

        Raises:
            ClientError: a value is not finite or too large, or the weight is not positive.
        """
        single = WeightedMean()
        single.add({name: values for name, (_, values) in entries.items()}, weight=weight)
        for name, (indices, _) in entries.items():
            known = self._indices.get(name, torch.empty(0, dtype=torch.int64))
            union, positions = torch.cat([known, indices]).unique(return_inverse=True)
            for store, added in ((self._high, single._high), (self._low, single._low)):
                total = torch.zeros(union.numel(), dtype=torch.int64)
                total.index_add_(0, positions[: known.numel()], store.get(name, known))
                total.index_add_(0, positions[known.numel() :], added[name])
                store[name] = total
            self._indices[name] = union
        self.total_weight += weight

    def result(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Name -> (ascending int64 indices, float32 mean values)."""
        return {
            name: (
                indices,
                (
                    (self._high[name].double() / 2**_HIGH_BITS + self._low[name].double() / 2.0**52)
                    / self.total_weight
                ).float(),
            )
            for name, indices in self._indices.items()
        }
