"""Structures that are shared while they are used, and kept as far as their bytes allow."""

import gc

import numpy as np
import pytest

from sparsemodel.kernels.cpu import library as cpu
from sparsemodel.kernels.cpu.library import Geometry
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.structures import Structure, Structures

GEOMETRY = Geometry.conv(1, 2, 3, (4, 4), (3, 3), stride=(2, 1), padding=(1, 1))


@pytest.fixture(autouse=True)
def _native() -> None:
    if cpu.library() is None:
        pytest.skip("build the native library to index patterns")


def patterns(seed: int = 0) -> Patterns:
    active = np.flatnonzero(np.random.default_rng(seed).random(54) < 0.4)
    return Patterns({"a": Pattern.from_positions((3, 2, 3, 3), active)})


def test_the_index_lists_each_entry_once_by_input() -> None:
    """Rows are phases of the stride times channels; t_perm names the entry of each place."""
    own = patterns()
    structure = Structure(own["a"], GEOMETRY)
    assert structure.index_bytes() == 0
    index, nnz = structure.index(), own["a"].num_active
    assert index is structure.index()
    rows = index[2 * nnz :]
    assert len(rows) == 2 * 2 + 1
    assert (rows[0], rows[-1]) == (0, nnz)
    assert sorted(index[nnz : 2 * nnz]) == list(range(nnz))
    channels = own["a"].cols[index[nnz : 2 * nnz]] // 9
    assert channels.tolist() == np.repeat([0, 1, 0, 1], np.diff(rows)).tolist()
    assert structure.nbytes() == own["a"].nbytes() + index.nbytes


def test_equal_patterns_share_a_structure_while_it_is_used() -> None:
    structures = Structures(kept_bytes=0)
    first = structures.masked(patterns(), "a", GEOMETRY)
    assert structures.masked(patterns(), "a", GEOMETRY) is first
    assert structures.masked(patterns(1), "a", GEOMETRY) is not first
    other = Geometry.conv(1, 2, 3, (4, 4), (3, 3), stride=(1, 1), padding=(1, 1))
    assert structures.masked(patterns(), "a", other) is not first
    larger = Geometry.conv(9, 2, 3, (8, 8), (3, 3), stride=(2, 1), padding=(1, 1))
    assert structures.masked(patterns(), "a", larger) is first
    full = structures.full((3, 2, 3, 3), GEOMETRY)
    assert full.pattern == Pattern.full((3, 2, 3, 3))
    assert structures.full((3, 2, 3, 3), GEOMETRY) is full
    assert structures.kept_bytes() == 0
    place = id(first)
    del first
    gc.collect()
    again = structures.masked(patterns(), "a", GEOMETRY)
    assert again.index_bytes() == 0 or id(again) != place


def test_those_used_last_are_kept() -> None:
    """Three layers fit; when a fourth joins, the index that the second has by then counts too."""
    layers = Patterns({name: patterns(seed)["a"] for seed, name in enumerate("abcd")})
    size = {name: pattern.nbytes() for name, pattern in layers.items()}
    index = Structure(layers["b"], GEOMETRY).index().nbytes
    limit = size["a"] + size["b"] + size["c"] + index - 1
    structures = Structures(kept_bytes=limit)
    for name in "abc":
        structures.masked(layers, name, GEOMETRY)
    assert structures.kept_bytes() == limit - index + 1
    structures.masked(layers, "b", GEOMETRY).index()
    structures.masked(layers, "d", GEOMETRY)
    gc.collect()
    kept = [size[name] for name in "cbd"]
    while sum(kept) + index > limit:
        kept.pop(0)
    assert structures.kept_bytes() == sum(kept) + index
    assert structures.masked(layers, "b", GEOMETRY).index_bytes() == index


def test_those_of_the_mask_used_last_are_kept() -> None:
    structures = Structures()
    structures.masked(patterns(0), "a", GEOMETRY).index()
    structures.masked(patterns(1), "a", GEOMETRY)
    gc.collect()
    assert structures.kept_bytes() == patterns(1)["a"].nbytes()
    assert structures.masked(patterns(0), "a", GEOMETRY).index_bytes() == 0
