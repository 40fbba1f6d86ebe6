"""Statistics that can be merged: of batches, of processes, of clients whose data stay with them.

Each is a commutative monoid: `a.merge(b)` is the statistic of both samples together, in any order
and of any split, and what has seen nothing changes nothing. All sums are float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from sparsemodel.errors import CalibrationError


@dataclass(frozen=True)
class Moments:
    """Count, mean and spread of vectors [features], one a token, say.

    The variance is merged as that of the union (Chan et al., Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances, 1979), so it loses nothing where the mean is large.

    Attributes:
        count: n, vectors seen.
        mean: [features]; zero where n is 0.
        deviations: Σ (x − mean)², [features].
        absolute: Σ |x|, [features].
    """

    count: int
    mean: Tensor
    deviations: Tensor
    absolute: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Those of values [n, features]."""
        count, features = values.shape
        if count == 0:
            zeros = torch.zeros(features, dtype=torch.float64, device="cpu")
            return cls(0, zeros, zeros, zeros)
        values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
        # About a mean that is nearly right; what it is off by is taken away in float64.
        middle = values.mean(0)
        centred = values - middle
        off = _sum(centred) / count
        return cls(
            count,
            middle.double().cpu() + off,
            (_sum(centred.square_()) - count * off.square()).clamp_(min=0.0),
            _sum(values.abs()),
        )

    def merge(self, other: Moments) -> Moments:
        """Those of both.

        Raises:
            CalibrationError: vectors of another length.
        """
        if self.mean.shape != other.mean.shape:
            raise CalibrationError(
                f"statistics of {self.mean.numel()} and of {other.mean.numel()} features cannot be "
                "merged"
            )
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        apart = other.mean - self.mean
        return Moments(
            count,
            (self.count * self.mean + other.count * other.mean) / count,
            self.deviations
            + other.deviations
            + apart.square() * (self.count * other.count / count),
            self.absolute + other.absolute,
        )

    @property
    def variance(self) -> Tensor:
        """Of the population: Σ (x − mean)² / n, [features]; zero where n is 0."""
        return self.deviations / max(1, self.count)

    @property
    def squares(self) -> Tensor:
        """Σ x², [features]."""
        return self.deviations + self.count * self.mean.square()

    @property
    def norms(self) -> Tensor:
        """‖x‖₂ of each feature over all vectors, √Σ x²: [features]."""
        return self.squares.sqrt()

    def arrays(self) -> dict[str, Tensor]:
        """All it holds, by name."""
        count = torch.tensor(float(self.count), dtype=torch.float64, device="cpu")
        return {
            "count": count,
            "mean": self.mean,
            "deviations": self.deviations,
            "absolute": self.absolute,
        }

    @classmethod
    def of_arrays(cls, held: Mapping[str, Tensor]) -> Moments:
        """What `arrays` has given."""
        return cls(int(held["count"]), held["mean"], held["deviations"], held["absolute"])


@dataclass(frozen=True)
class Sums:
    """Sums of some quantities over samples of one kind: tokens, sequences.

    Attributes:
        count: n, samples seen.
        totals: name -> sum over the samples, of any shape.
    """

    count: int
    totals: Mapping[str, Tensor]

    @classmethod
    def of(cls, count: int, **totals: Tensor) -> Sums:
        """Sums over so many samples, of any device and type."""
        held = {name: total.detach().double().cpu() for name, total in totals.items()}
        return cls(count, held)

    def merge(self, other: Sums) -> Sums:
        """Those of both.

        Raises:
            CalibrationError: quantities of other names or shapes.
        """
        shapes = [
            {name: tuple(total.shape) for name, total in one.totals.items()}
            for one in (self, other)
        ]
        if shapes[0] != shapes[1]:
            raise CalibrationError(f"sums of {shapes[0]} and of {shapes[1]} cannot be merged")
        totals = {name: total + other.totals[name] for name, total in self.totals.items()}
        return Sums(self.count + other.count, totals)

    def mean(self, name: str) -> Tensor:
        """Of one sample; zero where there was none."""
        return self.totals[name] / max(1, self.count)

    def arrays(self) -> dict[str, Tensor]:
        """All it holds, by name."""
        count = torch.tensor(float(self.count), dtype=torch.float64, device="cpu")
        return {"count": count, **self.totals}

    @classmethod
    def of_arrays(cls, held: Mapping[str, Tensor]) -> Sums:
        """What `arrays` has given."""
        return cls(int(held["count"]), {k: v for k, v in held.items() if k != "count"})


Statistic = Moments | Sums
Key = tuple[str, str]
"""Kind of statistic and name of the module."""
_FORMS: Mapping[str, Callable[[Mapping[str, Tensor]], Statistic]] = {
    "moments": Moments.of_arrays,
    "sums": Sums.of_arrays,
}


@dataclass(frozen=True, eq=False)
class Calibration(Mapping[Key, Statistic]):
    """All statistics of a network on some data: (kind, module) -> statistic.

    >>> seen = [Calibration({("inputs", "fc"): Moments.of(torch.randn(n, 3))}) for n in (4, 0, 6)]
    >>> Calibration.merged(seen)["inputs", "fc"].count
    10
    """

    statistics: Mapping[Key, Statistic] = field(default_factory=dict)

    def __getitem__(self, key: Key) -> Statistic:
        try:
            return self.statistics[key]
        except KeyError:
            kind, module = key
            known = sorted({k for k, _ in self.statistics})
            raise CalibrationError(
                f"no statistics of kind {kind!r} of {module!r}; there are {known or 'none'}"
            ) from None

    def __iter__(self) -> Iterator[Key]:
        return iter(self.statistics)

    def __len__(self) -> int:
        return len(self.statistics)

    def moments(self, kind: str, module: str) -> Moments:
        """A statistic that is known to be Moments."""
        found = self[kind, module]
        assert isinstance(found, Moments), f"{kind} are sums"
        return found

    def sums(self, kind: str, module: str) -> Sums:
        """A statistic that is known to be Sums."""
        found = self[kind, module]
        assert isinstance(found, Sums), f"{kind} are moments"
        return found

    def merge(self, other: Calibration) -> Calibration:
        """That of both; what one of them has not seen is the other's.

        Raises:
            CalibrationError: statistics of other shapes under one name.
        """
        joint = dict(self.statistics)
        for key, statistic in other.statistics.items():
            try:
                joint[key] = _merged(joint[key], statistic) if key in joint else statistic
            except CalibrationError as error:
                raise CalibrationError(f"{' of '.join(key)}: {error}") from None
        return Calibration(joint)

    @classmethod
    def merged(cls, parts: Iterable[Calibration]) -> Calibration:
        """That of all parts together, merged in their order; of none: nothing."""
        return reduce(Calibration.merge, parts, cls())

    def arrays(self) -> dict[str, Tensor]:
        """All it holds, under names that say what it is of: a file's, or a message's."""
        return {
            "/".join((form_of(statistic), kind, module, name)): array
            for (kind, module), statistic in self.statistics.items()
            for name, array in statistic.arrays().items()
        }

    @classmethod
    def of_arrays(cls, held: Mapping[str, Tensor]) -> Calibration:
        """What `arrays` has given.

        Raises:
            CalibrationError: names that it never gives.
        """
        parts: dict[tuple[str, str, str], dict[str, Tensor]] = {}
        for label, array in held.items():
            form, *rest = label.split("/")
            if form not in _FORMS or len(rest) != 3:
                raise CalibrationError(f"{label!r} is no part of a calibration")
            kind, module, name = rest
            parts.setdefault((form, kind, module), {})[name] = array.double().cpu()
        try:
            return cls({(k, m): _FORMS[form](one) for (form, k, m), one in parts.items()})
        except KeyError as error:
            raise CalibrationError(f"a calibration without {error}") from None


def form_of(statistic: Statistic) -> str:
    """Which kind of object it is, in one word."""
    return "moments" if isinstance(statistic, Moments) else "sums"


def _merged(one: Statistic, other: Statistic) -> Statistic:
    if isinstance(one, Moments) and isinstance(other, Moments):
        return one.merge(other)
    if isinstance(one, Sums) and isinstance(other, Sums):
        return one.merge(other)
    raise CalibrationError("moments and sums cannot be merged")


def _sum(values: Tensor) -> Tensor:
    """Over the vectors [n, features], in float64; in pieces, which take no copy of all."""
    pieces = [piece.sum(0) for piece in values.split(1024)]
    return torch.stack(pieces).double().sum(0).cpu()
