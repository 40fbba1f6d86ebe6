"""Weighted means of client tensors whose bits do not depend on the order of the replies.

Floating-point addition is not associative, so a plain running sum changes with the order in
which replies arrive. Here every value is turned into a fixed-point integer and the integers are
added: exactly the same sum for every order and every number of threads. Replies are folded in
one by one; nothing else of them is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fedprune.errors import ClientError
from sparsemodel.kernels import fixed_point
from sparsemodel.kernels.cuda import array_ops as cuda_array_ops
from sparsemodel.kernels.fixed_point import MAX_ABSOLUTE_VALUE
from sparsemodel.runtime.state import Entries, SparseState

MAX_TOTAL_WEIGHT = fixed_point.MAX_TOTAL_WEIGHT

Tensor = torch.Tensor


class WeightedMean:
    """The running mean of dictionaries of tensors, each reply weighted by its example count.

    Resolution is 2^-52 (finer than float32 for every value above 1e-8 in magnitude); sums are
    exact in that resolution. Memory is 16 bytes for each coordinate, whatever the number of
    replies.

    Args:
        batch_norms: pairs (mean name, variance name) of batch-norm running statistics. Their
            variance is pooled as that of the union of the clients' data,
            σ² = Σ p_k (σ_k² + μ_k²) − μ², not averaged.
        device: where the sums are kept and replies are moved to; None: where the first reply lies.
            The bits of the result are the same on every device.

    >>> mean = WeightedMean()
    >>> mean.add({"w": torch.tensor([1.0])}, weight=1)
    >>> mean.add({"w": torch.tensor([4.0])}, weight=3)
    >>> mean.result()["w"]
    tensor([3.2500])
    """

    def __init__(
        self,
        batch_norms: Sequence[tuple[str, str]] = (),
        *,
        device: torch.device | str | None = None,
    ) -> None:
        self._mean_of = {variance: mean for mean, variance in batch_norms}
        self._device = None if device is None else torch.device(device)
        self._high: dict[str, Tensor] = {}
        self._low: dict[str, Tensor] = {}
        self.total_weight = 0
        self.num_replies = 0

    def add(self, tensors: Mapping[str, Tensor], *, weight: int) -> None:
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
        device = self._device or next((value.device for value in tensors.values()), None)
        reply = {
            name: self._checked(name, value).to(device).contiguous()
            for name, value in tensors.items()
        }
        high, low = (
            sums or {name: torch.zeros_like(v, dtype=torch.int64) for name, v in reply.items()}
            for sums in (self._high, self._low)
        )
        refused = self._fold(reply, high, low, weight)
        if refused:
            if self._high:  # integers: what was added goes away without a trace
                self._fold(reply, high, low, -weight)
            raise ClientError(self._complaint(refused, reply))
        self._high, self._low, self._device = high, low, device
        self.total_weight += weight
        self.num_replies += 1

    def result(self) -> dict[str, Tensor]:
        """The weighted mean so far: name -> float32 tensor, where the sums are.

        Raises:
            ClientError: nothing was added.
        """
        if self.total_weight == 0:
            raise ClientError("no reply was folded into the mean")
        means = {
            name: fixed_point.value(high, self._low[name], self.total_weight)
            for name, high in self._high.items()
        }
        for variance, mean in self._mean_of.items():
            if variance in means:
                means[variance] = (means[variance] - means[mean] ** 2).clamp_min(0.0)
        return {name: value.float() for name, value in means.items()}

    def _checked(self, name: str, value: Tensor) -> Tensor:
        known = self._high.get(name)
        if known is not None and value.shape != known.shape:
            raise ClientError(
                f"{name!r}: expected shape {tuple(known.shape)}, got {tuple(value.shape)}"
            )
        return value.detach()

    def _fold(
        self, reply: dict[str, Tensor], high: dict[str, Tensor], low: dict[str, Tensor], weight: int
    ) -> list[str]:
        """Add a reply to sums; names of tensors of which values were left out."""
        if not reply:
            return []
        device = next(iter(reply.values())).device
        counts = torch.zeros((len(reply), 2), dtype=torch.int64, device=device)
        for (name, value), refused in zip(reply.items(), counts, strict=True):
            means = reply[self._mean_of[name]].to(value) if name in self._mean_of else None
            cuda_array_ops.fixed_add(high[name], low[name], value, means, None, weight, refused)
        return [name for name, bad in zip(reply, counts[:, 0].tolist(), strict=True) if bad]

    def _complaint(self, refused: list[str], reply: dict[str, Tensor]) -> str:
        """What is wrong with the first refused tensor."""
        name = refused[0]
        if not torch.isfinite(reply[name]).all():
            return f"{name!r} holds NaN or infinite values"
        value = reply[name].double()
        if name in self._mean_of:
            value = value + reply[self._mean_of[name]].double() ** 2
        return (
            f"{name!r} holds a value of magnitude {float(value.abs().max()):.3g}, beyond "
            f"{MAX_ABSOLUTE_VALUE:.3g}: training has diverged"
        )


class StateMean:
    """The running mean of states under one set of patterns; see WeightedMean.

    Statistics of batch norms (names that end in running_mean and running_var) are pooled.

    Args:
        device: where the sums are kept.
    """

    def __init__(self, *, device: torch.device | str | None = None) -> None:
        self._device = device
        self._mean: WeightedMean | None = None
        self._state: SparseState | None = None

    @property
    def num_replies(self) -> int:
        """States folded in so far."""
        return 0 if self._mean is None else self._mean.num_replies

    def add(self, state: SparseState, *, weight: int) -> None:
        """Fold in one state. A state that is refused leaves the mean as it was.

        Raises:
            ClientError: it is under other patterns, or as `WeightedMean.add`.
        """
        if self._mean is None:
            pairs = [
                (name, f"{stem}running_var")
                for name in state.values
                if (stem := name.removesuffix("running_mean")) != name
            ]
            mean = WeightedMean(pairs, device=self._device)
        else:
            mean = self._mean
            assert self._state is not None
            if state.patterns != self._state.patterns:
                raise ClientError("a state under another mask than those before it")
        mean.add({n: torch.from_numpy(value) for n, value in state.values.items()}, weight=weight)
        self._mean, self._state = mean, self._state or state

    def result(self) -> SparseState:
        """The weighted mean so far, under the patterns of the states.

        Raises:
            ClientError: nothing was added.
        """
        if self._mean is None or self._state is None:
            raise ClientError("no reply was folded into the mean")
        mean = self._mean.result()
        values = {name: mean[name].cpu().numpy() for name in self._state.values}
        return SparseState(values, self._state.patterns)


class EntryMean:
    """The weighted mean of sparse (index, value) uploads; a coordinate not sent counts as zero.

    This is FedTiny's g̃_i = Σ_k (|D_k| / |D|) g̃_{k,i}. Memory grows with the number of
    different coordinates seen, not with the size of the layer.

    Args:
        device: as of `WeightedMean`.
    """

    def __init__(self, *, device: torch.device | str | None = None) -> None:
        self._device = None if device is None else torch.device(device)
        self._indices: dict[str, Tensor] = {}
        self._high: dict[str, Tensor] = {}
        self._low: dict[str, Tensor] = {}
        self.total_weight = 0

    def add(self, entries: Entries, *, weight: int) -> None:
        """Fold in one client's entries.

        Raises:
            ClientError: a value is not finite or too large, or the weight is not positive or, with
                those before, too large.
        """
        if self.total_weight + weight > MAX_TOTAL_WEIGHT:
            raise ClientError(f"weight {weight}: expected at most {MAX_TOTAL_WEIGHT} in total")
        single = WeightedMean(device=self._device)
        tensors = {name: torch.from_numpy(values) for name, (_, values) in entries.items()}
        single.add(tensors, weight=weight)
        self._device = single._device
        for name, (indices, _) in entries.items():
            known = self._indices.get(name, torch.empty(0, dtype=torch.int64, device=self._device))
            both = torch.cat([known, torch.from_numpy(indices).to(known.device)])
            union, positions = both.unique(return_inverse=True)
            for store, added in ((self._high, single._high), (self._low, single._low)):
                total = torch.zeros_like(union)
                total.index_add_(0, positions[: known.numel()], store.get(name, known))
                total.index_add_(0, positions[known.numel() :], added[name])
                store[name] = total
            self._indices[name] = union
        self.total_weight += weight

    def result(self) -> Entries:
        """The mean entries."""
        entries: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name, indices in self._indices.items():
            mean = fixed_point.value(self._high[name], self._low[name], self.total_weight)
            entries[name] = indices.cpu().numpy(), mean.float().cpu().numpy()
        return entries
