"""What the golden frames hold: patterns, values and entries that every machine makes alike."""

from __future__ import annotations

import math

import numpy as np

from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState

SHAPES = {"conv.weight": (16, 8, 3, 3), "fc.weight": (10, 60), "bias": (10,), "scale": ()}
PRUNED = ("conv.weight", "fc.weight")
DENSITIES = (0.01, 0.1, 0.38, 0.5, 0.62, 0.95)


def noise(count: int, seed: int) -> np.ndarray:
    """Numbers in [0, 1) by the splitmix64 of their index: float64 [count]."""
    with np.errstate(over="ignore"):
        z = (np.arange(count, dtype=np.uint64) + np.uint64(seed << 40)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))).astype(np.float64) / 2.0**64


def layer(shape: tuple[int, ...], active: np.ndarray) -> Pattern:
    """The pattern of flags [number of weights]."""
    return Pattern.from_positions(shape, np.flatnonzero(active))


def random_patterns(density: float, seed: int) -> Patterns:
    """Patterns of the shapes above, every weight active with the same chance."""
    return Patterns(
        {
            name: layer(SHAPES[name], noise(math.prod(SHAPES[name]), seed + index) < density)
            for index, name in enumerate(PRUNED)
        }
    )


def every_mode() -> Patterns:
    """A layer for each mode of FORMAT.md, and shapes of no, one and four dimensions."""
    clustered = np.zeros(5000, dtype=bool)
    clustered[4800:4830] = True
    flags = {
        "empty": ((3, 4), np.zeros(12, dtype=bool)),
        "full": ((2, 3, 2, 1), np.ones(12, dtype=bool)),
        "scalar": ((), np.ones(1, dtype=bool)),
        "bitmap": ((9, 9), noise(81, 1) < 0.5),
        "active gaps": ((5000,), clustered),
        "pruned gaps": ((50, 100), ~clustered),
        "active rice": ((40, 30), noise(1200, 2) < 0.05),
        "pruned rice": ((40, 30), noise(1200, 3) >= 0.05),
        "größe": ((7,), np.arange(7) == 3),
    }
    return Patterns({name: layer(shape, active) for name, (shape, active) in flags.items()})


def large() -> Patterns:
    """One layer of 2.4 million weights at each of three densities."""
    shape, total = (512, 512, 3, 3), 512 * 512 * 9
    return Patterns({f"{d}": layer(shape, noise(total, 9) < d) for d in (0.01, 0.5, 0.9)})


def moved(patterns: Patterns, share: float, seed: int) -> Patterns:
    """The patterns with each weight flipped with chance `share`, the first layer apart."""
    changed = {}
    for index, name in enumerate(list(patterns)[1:]):
        pattern = patterns[name]
        active = np.zeros(pattern.num_weights, dtype=bool)
        active[pattern.positions()] = True
        flip = noise(len(active), seed + index) < share
        changed[name] = layer(pattern.shape, active ^ flip)
    return patterns.replace(changed)


def state(patterns: Patterns | None) -> SparseState:
    """Values of both signs and many sizes; some are negative zeros."""
    values = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        chance = noise(math.prod(shape), 20 + index)
        value = ((chance - 0.5) * 2.0 ** np.floor(16 * chance - 12)).astype(np.float32)
        value[chance < 0.02] = -0.0
        pattern = None if patterns is None else patterns.get(name)
        values[name] = value.reshape(shape) if pattern is None else value[pattern.positions()]
    return SparseState(values, patterns)


def entries(patterns: Patterns, share: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Values at a share of the pruned weights."""
    result = {}
    for index, (name, pattern) in enumerate(patterns.items()):
        chosen = noise(pattern.num_weights, 30 + index) < share
        chosen[pattern.positions()] = False
        indices = np.flatnonzero(chosen)
        result[name] = (indices, (noise(len(indices), 40 + index) - 0.5).astype(np.float32))
    return result
