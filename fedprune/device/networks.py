"""Built-in networks as programs, for devices without torch; and masks drawn by a seed.

`programs/` has one file a network, for pictures of 3×32×32 and ten classes; a test compares them
with what torch's networks come to.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from prunelab.errors import ModelError, close_names
from prunelab.runs.seeds import rng
from sparsemodel.errors import SparseModelError
from sparsemodel.masks.distribution import erk
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.state import Array, SparseState

NETWORKS = ("resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet18", "vgg11_bn")
DEFAULT = "resnet18"
_SEED_MASK, _SEED_WEIGHTS = 1, 2


def open_program(name: str) -> Program:
    """The program of a built-in network, or of a file.

    Args:
        name: one of NETWORKS, or a file of a program's text.

    Raises:
        ModelError: no such network or file, or a damaged one.
    """
    own = Path(__file__).parent / "programs" / f"{name}.json"
    file = own if name in NETWORKS else Path(name)
    if not file.is_file():
        raise ModelError(
            f"no network {name!r}: expected {', '.join(NETWORKS)}, or a file of a program's text"
            f"{close_names(name, NETWORKS)}"
        )
    try:
        return Program.parse(file.read_bytes())
    except SparseModelError as error:
        raise ModelError(f"{name}: {error}") from None


def for_samples(program: Program, input_shape: tuple[int, ...], classes: int) -> Program:
    """The same network for other samples: its first layer takes their channels, its last gives
    their classes.

    Raises:
        ProgramError: it does not fit them.
    """
    shapes, layers = program.shapes(), program.layers()
    first, *_, last = layers
    shapes[first] = (shapes[first][0], input_shape[0], *shapes[first][2:])
    for name in program.nodes[layers[last]].parameters():
        shapes[name] = (classes, *shapes[name][1:])
    return replace(program, input_shape=input_shape, tensors=tuple(shapes.items()))


def random_state(program: Program, *, density: float, seed: int) -> SparseState:
    """A sparse state to train from: masks and weights drawn by a seed.

    All layers but the first and the last are pruned, Erdős–Rényi-Kernel densities (Evci et al.,
    Rigging the Lottery, ICML 2020); active weights are normal with deviation sqrt(2 / active
    inputs), so that signals keep their size (He et al., ICCV 2015).

    Args:
        density: of the pruned layers together, in (0, 1].

    Raises:
        DensityError: the density is out of its range, or the network has no layer between.
    """
    shapes, layers = program.shapes(), list(program.layers())
    counts = erk({name: shapes[name] for name in layers[1:-1]}, density)
    patterns, values = {}, {}
    for place, (name, shape) in enumerate(shapes.items()):
        size = int(np.prod(shape))
        draw = rng(_SEED_WEIGHTS, seed, place)
        if name in counts:
            kept = rng(_SEED_MASK, seed, place).choice(size, counts[name], replace=False)
            patterns[name] = Pattern.from_positions(shape, np.sort(kept))
            fan_in = max(1.0, counts[name] / shape[0])
            values[name] = _normal(draw, (counts[name],), fan_in)
        elif name in layers:
            values[name] = _normal(draw, shape, size / shape[0])
        else:
            values[name] = np.zeros(shape, np.float32)
    for node in program.nodes:
        if node.kind == "norm":
            for one in filter(None, (node.weight, node.variance)):
                values[one][...] = 1
    return SparseState(values, Patterns(patterns))


def _normal(draw: np.random.Generator, shape: tuple[int, ...], fan_in: float) -> Array:
    values: Array = draw.standard_normal(shape, np.float32)
    values *= np.float32(np.sqrt(2 / fan_in))
    return values
