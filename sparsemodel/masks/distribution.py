"""How many weights each layer keeps at a target density of the whole model.

Every function returns name -> number of active weights, at least one in each layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsemodel.errors import DensityError, MaskError
from sparsemodel.runtime.adjust import largest

Distribution = Callable[..., dict[str, int]]
"""Takes some of shapes, scores, density, generator; returns name -> number of active weights."""


def uniform(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, int]:
    """The same density in every layer, as nearly as whole weights allow.

    The total is exactly round(density * N) for N weights; the weights that rounding down leaves
    over go to the layers with the largest remainders.

    Args:
        shapes: name -> shape of the layer's weight.
        density: active weights over all weights, in (0, 1].

    Raises:
        DensityError: a density outside (0, 1], or too low for one weight in every layer.

    >>> uniform({"a": (10, 10), "b": (50,)}, 0.1)
    {'a': 10, 'b': 5}
    """
    capacities = _capacities(shapes)
    total = _total(density, capacities)
    return apportion({name: float(n) for name, n in capacities.items()}, capacities, total)


def erk(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, int]:
    """Erdős–Rényi-kernel: a layer's count is proportional to the sum of its dimensions.

    The density of a convolution is ε (n_in + n_out + k_h + k_w) / (n_in n_out k_h k_w), so wide
    layers are sparser. Layers that would pass density 1 are kept whole and ε grows for the rest,
    so the total is exactly round(density * N).
    Source: Evci et al., Rigging the Lottery (ICML 2020), section 3.

    Args:
        shapes: name -> shape of the layer's weight.
        density: active weights over all weights, in (0, 1].

    Raises:
        DensityError: a density outside (0, 1], or too low for one weight in every layer.

    >>> erk({"narrow": (2, 3), "wide": (20, 30)}, 0.1)
    {'narrow': 6, 'wide': 55}
    """
    capacities = _capacities(shapes)
    total = _total(density, capacities)
    return apportion({name: float(sum(s)) for name, s in shapes.items()}, capacities, total)


def erk_conv(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, int]:
    """Erdős–Rényi-kernel among the convolutions; every matrix keeps the density of the whole.

    `erk` leaves a small classifier dense or nearly so, and takes its weights from the
    convolutions. Source: departs from Evci et al. in that; a network without convolutions is
    `uniform`.

    Args:
        shapes: name -> shape of the layer's weight; of convolutions more than two dimensions.
        density: active weights over all weights, in (0, 1].

    Raises:
        DensityError: a density outside (0, 1], or too low for one weight in every layer.

    >>> shapes = {"narrow": (10, 3, 2, 2), "wide": (30, 10, 2, 2), "head": (10, 30)}
    >>> erk_conv(shapes, 0.1), erk(shapes, 0.1)
    ({'narrow': 37, 'wide': 95, 'head': 30}, {'narrow': 27, 'wide': 71, 'head': 64})
    """
    counts = uniform(shapes, density)
    convs = {name: shape for name, shape in shapes.items() if len(shape) > 2}
    if not convs:
        return counts
    weights = {name: float(sum(shape)) for name, shape in convs.items()}
    total = sum(counts[name] for name in convs)
    return {**counts, **apportion(weights, _capacities(convs), total)}


def noise_uniform(
    shapes: Mapping[str, tuple[int, ...]],
    density: float,
    *,
    generator: np.random.Generator,
    spread: float = 0.5,
    tolerance: float = 0.02,
    max_draws: int = 1000,
    around: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Uniform density with independent noise in each layer: one candidate of FedTiny's pool.

    Layer densities are density * (1 + U(-spread, spread)), clipped to 1, drawn again until the
    total is within `tolerance` of density * N. Where no draw is (tiny layers, a density near 1),
    the last draw is scaled so that the total is exactly round(density * N).
    Source: Huang et al., Distributed Pruning Towards Tiny Neural Networks in Federated Learning
    (ICDCS 2023), coarse pruning.

    Args:
        shapes: name -> shape of the layer's weight.
        density: active weights over all weights, in (0, 1].
        generator: source of the noise; advanced by one draw of len(shapes) values a try.
        spread: half the width of the relative noise, in [0, 1].
        tolerance: allowed relative deviation of the total, >= 0.
        max_draws: tries before the last draw is scaled, >= 1.
        around: name -> count that the noise is around, of a total of density * N, instead of the
            same density in every layer.

    Raises:
        DensityError: a density outside (0, 1] or too low for one weight in every layer, or
            another argument outside its range.
    """
    capacities = _capacities(shapes)
    total = _total(density, capacities)
    if not (0 <= spread <= 1 and tolerance >= 0 and max_draws >= 1):
        raise DensityError(
            "expected spread in [0, 1], tolerance >= 0 and max_draws >= 1, "
            f"got {spread}, {tolerance} and {max_draws}"
        )
    wanted = density * sum(capacities.values())
    middle = dict.fromkeys(capacities, density)
    if around is not None:
        middle = {name: around[name] / capacity for name, capacity in capacities.items()}
    quotas: dict[str, float] = {}
    for _ in range(max_draws):
        unit = generator.random(len(capacities))
        noise = (1 + spread * (2 * unit - 1)).tolist()
        quotas = {
            name: min(middle[name] * factor, 1.0) * capacity
            for (name, capacity), factor in zip(capacities.items(), noise, strict=True)
        }
        counts = {name: max(1, round(quota)) for name, quota in quotas.items()}
        if abs(sum(counts.values()) - wanted) <= tolerance * wanted:
            return counts
    return apportion(quotas, capacities, total)


def global_ranking(scores: Mapping[str, Any], density: float) -> dict[str, int]:
    """The counts that one threshold over the scores of all layers gives.

    The best weight of each layer is always kept; the other places go to the highest scores
    wherever they are, equal scores in the order of the mapping, then of the flat index. The
    total is exactly round(density * N).

    Args:
        scores: name -> score of each weight, an array or a tensor (any real dtype, any device);
            higher means keep.
        density: active weights over all weights, in (0, 1].

    Raises:
        DensityError: a density outside (0, 1], or too low for one weight in every layer.
        MaskError: scores that are NaN.

    >>> global_ranking({"a": np.array([9.0, 8.0, 7.0]), "b": np.array([1.0])}, 0.75)
    {'a': 2, 'b': 1}
    """
    return _ranked(scores, density, least=1)


def minimum_threshold(
    scores: Mapping[str, Any], density: float, *, share: float = 0.0005
) -> dict[str, int]:
    """The counts of one threshold over all layers, of which none keeps fewer than a minimum.

    The minimum is round(share * N) of N weights, at least 1. Layers with fewer weights stay
    dense, every other one keeps at least its best so many, and the other places go to the highest
    scores wherever they are, ties as in `global_ranking`. The total is exactly round(density * N).
    Source: Gupta et al., Global Magnitude Pruning With Minimum Threshold Is All We Need (2022).

    Args:
        scores: name -> score of each weight, an array or a tensor (any real dtype, any device);
            higher means keep.
        density: active weights over all weights, in (0, 1].
        share: the minimum of a layer over all weights of the model, in [0, 1].

    Raises:
        DensityError: a share outside [0, 1], a density outside (0, 1], or too low for the minimum
            in every layer.
        MaskError: scores that are NaN.

    >>> scores = {"a": np.arange(10.0, 17.0), "b": np.arange(3.0)}
    >>> minimum_threshold(scores, 0.5, share=0.2), global_ranking(scores, 0.5)
    ({'a': 3, 'b': 2}, {'a': 4, 'b': 1})
    """
    if not 0 <= share <= 1:  # NaN fails both comparisons
        raise DensityError(f"the share of a layer's minimum must be in [0, 1], got {share}")
    num_weights = sum(math.prod(score.shape) for score in scores.values())
    return _ranked(scores, density, least=max(1, round(share * num_weights)))


DISTRIBUTIONS: dict[str, Distribution] = {
    "uniform": uniform,
    "erk": erk,
    "erk-conv": erk_conv,
    "noise": noise_uniform,
    "global": global_ranking,
    "global-minimum": minimum_threshold,
}


def n_of_m(text: str) -> tuple[int, int] | None:
    """n and m of a word such as "2:4"; None: it is no such word.

    >>> n_of_m("2:4"), n_of_m("row")
    ((2, 4), None)
    """
    n, colon, m = text.partition(":")
    return (int(n), int(m)) if colon and n.isdecimal() and m.isdecimal() else None


def score_array(score: Any) -> NDArray[Any]:
    """The scores of a layer, an array or a tensor, as numpy can compare them: flat, on the CPU."""
    if not isinstance(score, np.ndarray):
        score = score.detach().cpu()
        score = (score.double() if score.element_size() < 4 else score).numpy()  # bfloat16, say
    flat: NDArray[Any] = score.reshape(-1)
    return flat


def _capacities(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Name -> number of weights, active or pruned."""
    capacities = {name: math.prod(shape) for name, shape in shapes.items()}
    if not capacities or min(capacities.values()) < 1:
        raise DensityError(f"expected one layer or more, none of them empty; got {dict(shapes)}")
    return capacities


def _ranked(scores: Mapping[str, Any], density: float, *, least: int) -> dict[str, int]:
    """The counts of one threshold, where every layer keeps its `least` best, or all it has."""
    capacities = _capacities({name: tuple(score.shape) for name, score in scores.items()})
    total = _total(density, capacities, least=least)
    kept = {name: min(least, capacity) for name, capacity in capacities.items()}
    others = []
    for name, score in scores.items():
        array = score_array(score)
        if np.isnan(array).any():
            raise MaskError(f"scores of {name!r} hold NaN: no order can be made of them")
        others.append(array[~largest(array, kept[name])])
    chosen = largest(np.concatenate(others), total - sum(kept.values()))
    ends = np.cumsum([len(array) for array in others])
    return {
        name: kept[name] + int(np.count_nonzero(part))
        for name, part in zip(capacities, np.split(chosen, ends[:-1]), strict=True)
    }


def _total(density: float, capacities: Mapping[str, int], *, least: int = 1) -> int:
    """Number of active weights of the whole model, checked to give every layer its `least`."""
    if not 0 < density <= 1:  # NaN fails both comparisons
        raise DensityError(f"density must be in (0, 1], got {density}")
    num_weights = sum(capacities.values())
    total = round(density * num_weights)
    needed = sum(min(least, capacity) for capacity in capacities.values())
    if total < needed:
        wanted = f"the {needed} layers" if least == 1 else f"{needed}: {least} a layer, or all"
        raise DensityError(
            f"density {density:g} keeps {total} of {num_weights} weights, fewer than {wanted}; the "
            f"lowest density possible for this model is {needed / num_weights:.6g}"
        )
    return total


def apportion(
    weights: Mapping[str, float], capacities: Mapping[str, int], total: int
) -> dict[str, int]:
    """Split `total` in proportion to `weights`, each share between 1 and the layer's capacity.

    Shares above their capacity are cut to it and the excess is split among the others in the
    same proportion; fractions are settled by largest remainder, the first layer first.
    """
    quotas = {name: float(capacity) for name, capacity in capacities.items()}
    free = set(capacities)
    while free:
        # A full layer stays full: filling others only raises the factor of those left.
        left = total - sum(capacities[name] for name in capacities if name not in free)
        factor = left / math.fsum(weights[name] for name in free)
        full = {name for name in free if factor * weights[name] > capacities[name]}
        if not full:
            quotas |= {name: factor * weights[name] for name in free}
            break
        free -= full
    counts = {name: max(1, min(int(quotas[name]), capacities[name])) for name in capacities}
    while (missing := total - sum(counts.values())) != 0:
        if missing > 0:
            open_layers = [name for name in counts if counts[name] < capacities[name]]
            counts[max(open_layers, key=lambda name: quotas[name] - counts[name])] += 1
        else:
            open_layers = [name for name in counts if counts[name] > 1]
            counts[min(open_layers, key=lambda name: quotas[name] - counts[name])] -= 1
    return counts
