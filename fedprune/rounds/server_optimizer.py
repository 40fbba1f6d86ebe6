"""Optimisers of the server: how far, and where, the global model goes on the clients' mean.

The clients' mean less the model they were sent is taken for a gradient's opposite Δ:

- "momentum": FedAvgM (Hsu et al., Measuring the Effects of Non-Identical Data Distribution for
  Federated Visual Classification, 2019): v ← β v + Δ, w ← w + η v.
- "adam", "yogi", "adagrad": Reddi et al., Adaptive Federated Optimization, ICLR 2021, algorithm 2:
  m ← β₁ m + (1 − β₁) Δ, w ← w + η m / (√v + τ), where v ← β₂ v + (1 − β₂) Δ² (Adam),
  v ← v − (1 − β₂) Δ² sign(v − Δ²) (Yogi) or v ← v + Δ² (Adagrad).

Under a mask there are active weights alone. A moment goes with its weight; that of a weight which
has just grown is zero. Statistics of batch norms are taken as pooled.

Departs from the papers: v begins at zero, not at τ² or more, and nothing corrects its bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fedprune.exchange.gate import is_statistic
from fedprune.settings import ServerConfig
from sparsemodel.runtime.adjust import carry
from sparsemodel.runtime.pattern import Patterns
from sparsemodel.runtime.state import Array, SparseState

FIRST, SECOND = "server.first", "server.second"  # in what a run's state keeps
Moments = Mapping[str, SparseState]
"""FIRST, and SECOND where the optimiser has one: of every weight that is trained."""

# (v, Δ², β₂) -> v
_SECOND_MOMENTS: dict[str, Callable[[Array, Array, float], Array]] = {
    "adam": lambda v, squared, beta: beta * v + (1 - beta) * squared,
    "yogi": lambda v, squared, beta: v - (1 - beta) * squared * np.sign(v - squared),
    "adagrad": lambda v, squared, beta: v + squared,
}


def stepped(
    before: SparseState, mean: SparseState, kept: Moments, server: ServerConfig
) -> tuple[SparseState, Moments]:
    """The model after the server's step, under the patterns of the mean, and the moments then.

    Computed in float64, kept in float32.

    Args:
        before: what clients were sent.
        mean: of what they answered.
        kept: the moments after the last round, others may be there too; none before the first.
    """
    second_moment = _SECOND_MOMENTS.get(server.optimizer)
    old = _under(before, mean.patterns).values
    past = followed({kind: kept[kind] for kind in (FIRST, SECOND) if kind in kept}, mean)
    values, first, second = dict(mean.values), {}, {}
    for name, value in mean.values.items():
        if is_statistic(name):
            continue
        start = old[name].astype(np.float64)
        delta = value - start
        m = past[FIRST].values[name].astype(np.float64) if past else np.zeros_like(delta)
        if second_moment is None:
            m = server.momentum * m + delta
            step = m
        else:
            v = past[SECOND].values[name].astype(np.float64) if past else np.zeros_like(delta)
            m = server.momentum * m + (1 - server.momentum) * delta
            v = second_moment(v, delta**2, server.beta2)
            second[name] = v.astype(np.float32)
            step = m / (np.sqrt(v) + server.tau)
        first[name] = m.astype(np.float32)
        values[name] = (start + server.lr * step).astype(np.float32)
    now = {FIRST: first, SECOND: second} if second else {FIRST: first}
    return (
        SparseState(values, mean.patterns),
        {kind: SparseState(each, mean.patterns) for kind, each in now.items()},
    )


def followed(moments: Moments, model: SparseState) -> Moments:
    """Moments under the patterns of a model: those of weights that it has, zero for new ones."""
    return {kind: _under(moment, model.patterns) for kind, moment in moments.items()}


def _under(state: SparseState, patterns: Patterns | None) -> SparseState:
    if patterns is None:
        return SparseState(state.dense())
    return carry(state, patterns)
