"""Aggregation that some lying clients cannot lead away, over active coordinates only.

What these rules need of all replies at once is kept, their active values alone, and worked through
in pieces of bounded size. Every result has the same bits in every order of replies.

Sources: Yin et al., Byzantine-Robust Distributed Learning, ICML 2018 (coordinate-wise median and
trimmed mean); Blanchard et al., Machine Learning with Adversaries, NeurIPS 2017 (Krum).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedprune.errors import DIVERGED, ClientError
from fedprune.exchange.aggregate import EntryMean, StateMean
from fedprune.exchange.gate import is_statistic
from sparsemodel.runtime.state import Array, Entries, SparseState, Tensors

CHUNK = 1 << 22  # numbers of all clients together that are worked on at a time

Floats = NDArray[np.float64]


class States(Protocol):
    """Whatever makes one state of those of many clients."""

    @property
    def num_replies(self) -> int: ...

    def add(self, state: SparseState, *, weight: int) -> None: ...

    def result(self) -> SparseState: ...


class Growth(Protocol):
    """Whatever makes one set of entries of those of many clients."""

    def add(self, entries: Entries, *, weight: int) -> None: ...

    def result(self) -> Entries: ...


@dataclass(frozen=True)
class Aggregation:
    """How answers of clients become one.

    Trained weights go by `kind`: the weighted "mean"; "clipped", the weighted mean of updates cut
    to a norm; "trimmed-mean" and "median" of each coordinate; "multi-krum", the weighted mean of
    those whose values lie close together. Under every kind but the mean all else goes coordinate
    by coordinate, by the median where that is the kind and else by the trimmed mean: batch-norm
    statistics (a variance about the mean that is taken), what is measured without weights, losses.
    Growth entries go by the trimmed mean, a coordinate that was not sent counting as zero: one
    that no more clients sent than may lie is not grown. Trimmed mean and median count every client
    the same, whatever its samples.

    Args:
        clip: the norm of "clipped"; 0: the median of the clients' norms.
        byzantine: share of the clients that may lie: int(byzantine · K) of K are cut off at each
            end, or are not chosen. Of few clients that may be none.
        device: where plain sums are kept, as of `StateMean`.
    """

    kind: str = "mean"
    clip: float = 0.0
    byzantine: float = 0.2
    device: str | None = None

    def states(self, *, before: SparseState | None = None, updates: bool = False) -> States:
        """For states of clients.

        Args:
            before: what they were trained from; None: they are no weights.
            updates: whether they are differences, of which there is a plain mean alone.
        """
        if self.kind == "mean":
            return StateMean(device=self.device, updates=updates)
        return RobustStates(self, before)

    def entries(self) -> Growth:
        """For entries of clients at pruned places."""
        return EntryMean() if self.kind == "mean" else TrimmedEntries(self.byzantine)

    def mean_of(
        self, sums: Sequence[float], *, samples: Sequence[int], weights: Sequence[int]
    ) -> float:
        """The mean for a sample; sums over each client's samples, in the order of clients."""
        if self.kind == "mean":
            parts = (weights[i] / samples[i] * sums[i] for i in range(len(sums)))
            return sum(parts) / sum(weights)
        stack = np.array([[total / count] for total, count in zip(sums, samples, strict=True)])
        return float(self.coordinates(stack)[0])

    def coordinates(self, stack: NDArray[np.floating]) -> Floats:
        """One value for each column of [K, n]."""
        return median(stack) if self.kind == "median" else trimmed_mean(stack, self.byzantine)


MEAN = Aggregation()


class RobustStates:
    """States of clients under one set of patterns, kept until their result is asked for.

    Memory is the active values of all clients, and pieces of CHUNK numbers.
    """

    def __init__(self, rule: Aggregation, before: SparseState | None) -> None:
        self._rule, self._before = rule, before
        self._states: list[tuple[SparseState, int]] = []

    @property
    def num_replies(self) -> int:
        """States added so far."""
        return len(self._states)

    def add(self, state: SparseState, *, weight: int) -> None:
        """Add one state.

        Raises:
            ClientError: it is under other patterns, of other shapes, not finite or without weight.
        """
        first = self._states[0][0] if self._states else state
        if state.patterns != first.patterns or state.shapes() != first.shapes():
            raise ClientError("a state under another mask, or of other shapes, than those before")
        if weight < 1:
            raise ClientError(f"weight {weight}: expected 1 or more")
        for name, value in state.values.items():
            if not np.isfinite(value).all():
                raise ClientError(f"{name!r} holds NaN or infinite values: {DIVERGED}")
        self._states.append((state, weight))

    def result(self) -> SparseState:
        """The one state.

        Raises:
            ClientError: nothing was added.
        """
        if not self._states:
            raise ClientError("no reply was added")
        first = self._states[0][0]
        rows = [state.values for state, _ in self._states]
        trained = [name for name in first.values if not is_statistic(name)]
        kind = "coordinates" if self._before is None else self._rule.kind
        found: dict[str, Array] = {}
        if kind == "clipped":
            found = self._clipped(rows, trained)
        elif kind == "multi-krum":
            found = self._closest(rows, trained)
        else:
            found = {name: self._by_coordinate(rows, name) for name in trained}
        for name in first.values:
            if name.endswith("running_var"):
                mean = f"{name.removesuffix('running_var')}running_mean"
                centre = found.get(mean)
                found[name] = self._by_coordinate(rows, name, about=(mean, centre))
            elif is_statistic(name):
                found[name] = self._by_coordinate(rows, name)
        return SparseState({name: found[name] for name in first.values}, first.patterns)

    def _by_coordinate(
        self, rows: Sequence[Tensors], name: str, *, about: tuple[str, Array | None] = ("", None)
    ) -> Array:
        """A tensor by the rule of coordinates.

        Args:
            about: of a variance: the name of its mean, and what was taken for it. The rule is then
                that of σ² + (μ − mean)², which of plain means is the variance of all data.
        """
        found = np.empty(rows[0][name].size, np.float32)
        mean, centre = about
        for part, stack in pieces(rows, name):
            if centre is not None:
                middle = centre.reshape(-1)[part].astype(np.float64)
                means = np.stack([row[mean].reshape(-1)[part] for row in rows])
                stack = stack + (means - middle) ** 2  # noqa: PLW2901
            found[part] = self._rule.coordinates(stack)
        return found.reshape(rows[0][name].shape)

    def _clipped(self, rows: Sequence[Tensors], names: Sequence[str]) -> dict[str, Array]:
        """The weighted mean of updates of bounded norm."""
        assert self._before is not None
        before = self._before.values
        squares = np.zeros(len(rows))
        for name in names:
            for part, stack in pieces(rows, name):
                update = stack.astype(np.float64) - before[name].reshape(-1)[part]
                squares += (update * update).sum(axis=1)
        mean = StateMean(device=self._rule.device)
        factors = clip_factors(np.sqrt(squares), self._rule.clip)
        for factor, row, (_, weight) in zip(factors, rows, self._states, strict=True):
            cut = {
                name: row[name]
                if factor == 1
                else (before[name] + factor * (row[name] - before[name])).astype(np.float32)
                for name in names
            }
            mean.add(SparseState(cut), weight=weight)
        return dict(mean.result().values)

    def _closest(self, rows: Sequence[Tensors], names: Sequence[str]) -> dict[str, Array]:
        """The weighted mean of the K - f of smallest Krum score; equal scores go by content."""
        liars = int(self._rule.byzantine * len(rows))
        scores = krum_scores(squared_distances(rows, names), liars)
        content = [
            (sha256(b"".join(row[name].tobytes() for name in names)).digest(), weight)
            for row, (_, weight) in zip(rows, self._states, strict=True)
        ]
        order = sorted(range(len(rows)), key=lambda row: (scores[row], content[row]))
        mean = StateMean(device=self._rule.device)
        for row in order[: len(rows) - liars]:
            chosen = {name: rows[row][name] for name in names}
            mean.add(SparseState(chosen), weight=self._states[row][1])
        return dict(mean.result().values)


class TrimmedEntries:
    """The trimmed mean of sparse (index, value) uploads; a coordinate not sent counts as zero.

    Args:
        share: of the clients that is cut off at each end.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._all: list[Entries] = []

    def add(self, entries: Entries, *, weight: int) -> None:
        """Add one client's entries, which count as much as any other's.

        Raises:
            ClientError: a value is not finite.
        """
        for name, (_, values) in entries.items():
            if not np.isfinite(values).all():
                raise ClientError(f"{name!r} holds NaN or infinite values: {DIVERGED}")
        self._all.append(entries)

    def result(self) -> Entries:
        """Layer -> (ascending positions; values)."""
        layers = dict.fromkeys(name for entries in self._all for name in entries)
        return {name: self._layer(name) for name in sorted(layers)}

    def _layer(self, name: str) -> tuple[NDArray[np.int64], Array]:
        sent = [entries[name] for entries in self._all if name in entries]
        union = np.unique(np.concatenate([np.asarray(i, np.int64) for i, _ in sent]))
        values = np.empty(len(union), np.float32)
        for part in parts(len(union), len(self._all)):
            stack = np.zeros((len(self._all), len(union[part])), np.float32)
            for row, (indices, own) in enumerate(sent):
                places = np.searchsorted(union[part], indices)
                inside = places < len(union[part])
                inside[inside] = union[part][places[inside]] == np.asarray(indices)[inside]
                stack[row, places[inside]] = own[inside]
            values[part] = trimmed_mean(stack, self._share)
        return union, values


# --- rules on [K, n]: a row a client ------------------------------------------------------------


def trimmed_mean(stack: NDArray[np.floating], share: float) -> Floats:
    """The mean of each column [n] without its int(share · K) smallest and largest values.

    >>> trimmed_mean(np.float32([[1], [2], [3], [4], [1e9]]), 0.2)
    array([3.])
    """
    cut = int(share * len(stack))
    # Sorted, a column is added up in one order, whoever answered first.
    kept = np.sort(stack, axis=0)[cut : len(stack) - cut]
    mean: Floats = kept.mean(axis=0, dtype=np.float64)
    return mean


def median(stack: NDArray[np.floating]) -> Floats:
    """The median of each column [n]; of an even number of rows the mean of the middle two.

    >>> median(np.float32([[1], [2], [4], [1e9]]))
    array([3.])
    """
    return np.asarray(np.median(stack, axis=0), np.float64)


def clip_factors(norms: Floats, clip: float) -> Floats:
    """What updates of these norms are multiplied with so that none is longer than `clip`.

    Args:
        clip: 0: the median of the norms.

    >>> clip_factors(np.array([1.0, 2.0, 8.0]), 0.0)
    array([1.  , 1.  , 0.25])
    """
    bound = clip or float(np.median(norms))
    longer = norms > bound
    return np.where(longer, bound / np.where(longer, norms, 1.0), 1.0)


def krum_scores(distances: Floats, num_liars: int) -> Floats:
    """For each row the sum of its squared distances to the K - f - 2 closest others, at least one.

    Args:
        distances: [K, K], squared.
        num_liars: f.
    """
    count = len(distances)
    closest = max(1, count - num_liars - 2)
    others = distances[~np.eye(count, dtype=bool)].reshape(count, count - 1)
    scores: Floats = np.sort(others, axis=1)[:, :closest].sum(axis=1)
    return scores


def squared_distances(rows: Sequence[Tensors], names: Sequence[str]) -> Floats:
    """Squared Euclidean distances [K, K] between the values of these names."""
    found = np.zeros((len(rows), len(rows)))
    for name in names:
        for _, stack in pieces(rows, name):
            for row in range(len(rows) - 1):
                step = stack[row + 1 :].astype(np.float64) - stack[row]
                found[row, row + 1 :] += (step * step).sum(axis=1)
    return found + found.T


def pieces(rows: Sequence[Tensors], name: str) -> Iterator[tuple[slice, Array]]:
    """One tensor of all rows in pieces of [K, n], and where each lies in the flat tensor."""
    flat = [row[name].reshape(-1) for row in rows]
    for part in parts(len(flat[0]), len(rows)):
        yield part, np.stack([values[part] for values in flat])


def parts(size: int, num_rows: int) -> Iterator[slice]:
    """Ranges of so many columns that all rows of one are CHUNK numbers at most."""
    step = max(1, CHUNK // max(1, num_rows))
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
