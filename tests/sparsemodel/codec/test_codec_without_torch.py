"""Frames are written and read, and states adjusted, in a process that has no torch."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, NoTorch())

import numpy as np
from sparsemodel import codec
from sparsemodel.runtime import adjust
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState

shapes = {"conv.weight": (4, 3, 3, 3), "bias": (4,)}
base = Patterns({"conv.weight": Pattern.from_positions((4, 3, 3, 3), np.array([0, 7, 50, 99]))})
new = Patterns({"conv.weight": Pattern.from_positions((4, 3, 3, 3), np.array([0, 8, 50, 99]))})
assert codec.decode_mask(codec.encode_mask(base)) == base
assert codec.decode_mask_delta(codec.encode_mask_delta(base, new), base=base) == new
values = {"conv.weight": np.float32([1, -2, 3, -4]), "bias": np.float32([5, 6, 7, 8])}
for dtype in ("fp32", "fp16", "bf16", "int8"):
    frame = codec.encode_state(SparseState(values, base), dtype=dtype)
    decoded = codec.decode_state(frame, shapes=shapes, patterns=base)
    for name, value in values.items():
        assert np.abs(decoded.values[name] - value).max() < 0.05
entries = {"conv.weight": (np.array([1, 107]), np.float32([0.5, -0.5]))}
read = codec.decode_entries(codec.encode_entries(entries, patterns=base), patterns=base)
assert all(np.array_equal(a, b) for a, b in zip(read["conv.weight"], entries["conv.weight"]))
assert codec.mask_entropy_bytes(base) > 0 and codec.mask_delta_entropy_bytes(base, new) > 0
adjusted = adjust.prune_and_grow(SparseState(values, base), entries, {"conv.weight": 1})
assert adjusted.values["conv.weight"].tolist() == [0, -2, 3, -4]
assert "torch" not in sys.modules
print("done")
"""


def test_round_trips_of_every_kind() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.stdout == "done\n", done.stderr
