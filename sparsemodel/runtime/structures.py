"""What is derived of patterns, made once for all who hold equal ones."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.kernels.cpu import library as cpu
from sparsemodel.runtime.pattern import Pattern, Patterns, Shape

KEPT_BYTES = 8 << 20  # of structures that nobody uses any more

Key = tuple[Any, ...]


class Structure:
    """The pattern of one layer, known to be sound, and its index by input, made when first needed.

    Args:
        pattern: its rows and columns are read by the native library as they are.
        geometry: of the layer; batch and plane play no part.
    """

    __slots__ = ("__weakref__", "_geometry", "_index", "pattern")

    def __init__(self, pattern: Pattern, geometry: cpu.Geometry) -> None:
        self.pattern = pattern
        self._geometry = geometry
        self._index: NDArray[np.int32] | None = None

    def index(self) -> NDArray[np.int32]:
        """The pattern by input, as input gradients need it: t_cols, t_perm, then t_row_ptr."""
        if self._index is None:
            library = native_library()
            nnz = self.pattern.num_active
            index = np.empty(2 * nnz + library.transposed_rows(self._geometry) + 1, np.int32)
            library.transpose_pattern(
                self._geometry, self.pattern.row_ptr, self.pattern.cols, index[2 * nnz :],
                index[:nnz], index[nnz : 2 * nnz],
            )  # fmt: skip
            self._index = index
        return self._index

    def index_bytes(self) -> int:
        """Bytes of the index; 0 before it is made."""
        return 0 if self._index is None else self._index.nbytes

    def nbytes(self) -> int:
        """Bytes of pattern and index."""
        return self.pattern.nbytes() + self.index_bytes()


class Structures:
    """Structures in use, and those of the mask used last, as many as fit into some bytes.

    Whoever asks for the structure of an equal pattern in the same geometry gets the same one.
    The clients of one process mostly train one mask after the other, and a client that looks at
    many masks should not hold them all.

    Args:
        kept_bytes: of structures that are held although nobody else does.
    """

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        self._used: weakref.WeakValueDictionary[Key, Structure] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[Key, Structure] = OrderedDict()
        self._mask = b""  # key of the mask used last
        self._lock = threading.Lock()

    def masked(self, patterns: Patterns, name: str, geometry: cpu.Geometry) -> Structure:
        """The structure of a layer in patterns that `check_pattern` has seen."""
        mask = patterns.key()
        with self._lock:
            if mask != self._mask:
                self._recent.clear()
                self._mask = mask
        return self._shared((mask, name, _key(geometry)), patterns[name], geometry)

    def full(self, shape: Shape, geometry: cpu.Geometry) -> Structure:
        """The structure of a layer that keeps every weight."""
        return self._shared((shape, _key(geometry)), None, geometry, shape)

    def kept_bytes(self) -> int:
        """Bytes of the structures that were used last."""
        return sum(structure.nbytes() for structure in self._recent.values())

    def _shared(
        self, key: Key, pattern: Pattern | None, geometry: cpu.Geometry, shape: Shape = ()
    ) -> Structure:
        with self._lock:
            structure = self._used.get(key)
            if structure is None:
                pattern = Pattern.full(shape) if pattern is None else pattern
                structure = self._used[key] = Structure(pattern, geometry)
            known = key in self._recent
            self._recent[key] = structure
            self._recent.move_to_end(key)
            # An index may be made later: what is kept is looked at when something joins it.
            excess = 0 if known else self.kept_bytes() - self._kept_bytes
            while excess > 0:
                excess -= self._recent.popitem(last=False)[1].nbytes()
            return structure


def check_pattern(name: str, pattern: Pattern) -> None:
    """Whether the native library can read a pattern as it is.

    Raises:
        MaskError: arrays of another type or length, or entries that are out of order or range.
    """
    rows = pattern.shape[0] if len(pattern.shape) > 1 else 1
    for what, array in (("row_ptr", pattern.row_ptr), ("cols", pattern.cols)):
        sound = isinstance(array, np.ndarray) and array.dtype == np.int32 and array.ndim == 1
        if not sound or not array.flags.c_contiguous:
            raise MaskError(f"the pattern of {name!r}: expected contiguous int32 {what} [n]")
    if len(pattern.row_ptr) != rows + 1 or pattern.row_ptr[-1] != len(pattern.cols):
        raise MaskError(
            f"the pattern of {name!r}: {len(pattern.row_ptr)} row_ptr that end in "
            f"{pattern.row_ptr[-1:]} and {len(pattern.cols)} cols do not fit shape {pattern.shape}"
        )
    try:
        native_library().check_pattern(
            cpu.Geometry.linear(1, pattern.row_length, rows), pattern.row_ptr, pattern.cols
        )
    except SparseModelError as error:
        raise MaskError(f"the pattern of {name!r}: {error}") from None


def native_library() -> Any:
    """The native library.

    Raises:
        SparseModelError: it is not in use.
    """
    library = cpu.library()
    if library is None:
        raise SparseModelError("training without torch needs the native library, not in use here")
    return library


def _key(geometry: cpu.Geometry) -> tuple[int, ...]:
    g = geometry
    return (
        *(g.in_channels, g.out_channels, g.kernel_h, g.kernel_w, g.stride_h, g.stride_w),
        *(g.pad_h, g.pad_w, g.dilation_h, g.dilation_w, g.groups),
    )


shared_structures = Structures()
