"""Bindings of whole-step plans, csrc/cpu/sparse_plan.h: addresses or numpy arrays, no torch."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsemodel.errors import SparseModelError
from sparsemodel.kernels.cpu import library as cpu

RECOMPUTE, BFLOAT16 = 1, 2
_NOT_FINITE = 5
_INT, _LONG, _REAL, _ADDRESS = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class Parameter(ctypes.Structure):
    """Addresses of values, gradient (None: frozen) and momentum (None: none)."""

    _fields_ = tuple((name, _ADDRESS) for name in ("values", "gradient", "momentum"))


class ConvArrays(ctypes.Structure):
    """Addresses of a convolution's pattern, its index by input, and its parameters."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("row_ptr", "cols", "t_row_ptr", "t_cols", "t_perm")),
        ("weight", Parameter),
        ("bias", Parameter),
    )


class NormArrays(ctypes.Structure):
    """Addresses of a batch norm's parameters and running statistics."""

    _fields_ = (
        ("gamma", Parameter),
        ("beta", Parameter),
        *((name, _ADDRESS) for name in ("running_mean", "running_var", "num_batches")),
    )


class Sgd(ctypes.Structure):
    """The optimiser step that ends a training step."""

    _fields_ = tuple((name, _REAL) for name in ("lr", "momentum", "weight_decay"))


class TopK(ctypes.Structure):
    """How many of a convolution's largest pruned gradients are asked for, and where they go.

    `count` is written: how many there are, -1 where one is NaN.
    """

    _fields_ = (
        ("k", _LONG), ("indices", _ADDRESS), ("top", _ADDRESS), ("count", _LONG), ("node", _INT),
    )  # fmt: skip


class Moments(ctypes.Structure):
    """Where mean and population variance of a batch norm's input go, float64 [channels].

    `count` is written: of how many values.
    """

    _fields_ = (("mean", _ADDRESS), ("variance", _ADDRESS), ("count", _LONG), ("node", _INT))


class Images(ctypes.Structure):
    """Contiguous images [B, C, H, W]: float32, or bytes with scale and shift of each channel."""

    _fields_ = (("data", _ADDRESS), ("type", _INT), ("scale", _ADDRESS), ("shift", _ADDRESS))

    @classmethod
    def floats(cls, address: int) -> Images:
        """float32 images at an address."""
        return cls(address, 0, None, None)

    @classmethod
    def bytes(cls, address: int, scale: int, shift: int) -> Images:
        """uint8 images at an address, and the addresses of scale and shift [C]."""
        return cls(address, 1, scale, shift)


_Plan, _Labels = _ADDRESS, _ADDRESS
_Double, _Count = ctypes.POINTER(_REAL), ctypes.POINTER(_LONG)
_NODES: dict[str, tuple[Any, ...]] = {
    "input": (_INT, _INT, _INT),
    "conv": (_INT, ctypes.POINTER(cpu.Geometry)),
    "batchnorm": (_INT, _INT, _INT, _REAL, _REAL),
    "relu": (_INT,),
    "add": (_INT, _INT),
    "maxpool": (_INT, ctypes.POINTER(cpu.PoolGeometry)),
    "avgpool": (_INT, ctypes.POINTER(cpu.PoolGeometry), _INT),
    "global_avgpool": (_INT,),
    "flatten": (_INT,),
}
_CALLS: dict[str, tuple[Any, ...]] = {
    "bind_conv": (_INT, ctypes.POINTER(ConvArrays)),
    "bind_norm": (_INT, ctypes.POINTER(NormArrays)),
    "build": (_INT,),
    "train": (
        *(_INT, ctypes.POINTER(Images), _Labels, ctypes.POINTER(Sgd), _INT, _Double, _Count),
    ),
    "topk_grads": (_INT, ctypes.POINTER(Images), _Labels, ctypes.POINTER(TopK), _INT, _INT),
    "statistics": (_INT, ctypes.POINTER(Images), ctypes.POINTER(Moments), _INT, _INT),
    "infer": (_INT, ctypes.POINTER(Images), _ADDRESS, _Labels, _INT, _Double, _Count),
}


@functools.cache
def _library() -> Any:
    """The native library with the signatures of plans.

    Raises:
        SparseModelError: it is not there, or cannot be used.
    """
    path = cpu.library_path()
    if cpu.library() is None or path is None:
        raise SparseModelError("a training plan needs the native CPU library, which is not in use")
    dll = ctypes.CDLL(str(path))
    dll.spc_last_error.restype = ctypes.c_char_p
    dll.spc_plan_new.argtypes, dll.spc_plan_new.restype = (_INT, _INT), _Plan
    dll.spc_plan_free.argtypes, dll.spc_plan_free.restype = (_Plan,), None
    dll.spc_plan_arena_bytes.argtypes, dll.spc_plan_arena_bytes.restype = (_Plan,), _LONG
    dll.spc_plan_allocated_bytes.argtypes = (_Plan,)
    dll.spc_plan_allocated_bytes.restype = _LONG
    dll.spc_plan_seconds.argtypes, dll.spc_plan_seconds.restype = (_Plan, _ADDRESS), _INT
    for name, types in (_NODES | _CALLS).items():
        function = getattr(dll, f"spc_plan_{name}")
        function.argtypes, function.restype = (_Plan, *types), _INT
    return dll


class NativePlan:
    """A plan of the native library, for up to `batch` samples; freed with this object.

    Methods that add a node return its number. What each means is said in sparse_plan.h.

    Raises:
        SparseModelError: the library refused the arguments; the message says why.
    """

    def __init__(self, batch: int, *, recompute: bool = False, bfloat16: bool = False) -> None:
        self._dll = _library()
        flags = (RECOMPUTE if recompute else 0) | (BFLOAT16 if bfloat16 else 0)
        self._plan = self._dll.spc_plan_new(batch, flags)
        if not self._plan:
            self._fail()
        weakref.finalize(self, self._dll.spc_plan_free, self._plan)
        self._num_nodes = 0
        self._loss, self._correct = _REAL(), _LONG()

    def add(self, kind: str, *arguments: Any) -> int:
        """Add a node of a kind ("input", "conv", "batchnorm", ...); returns its number."""
        number = int(getattr(self._dll, f"spc_plan_{kind}")(self._plan, *arguments))
        if number < 0:
            self._fail()
        self._num_nodes = number + 1
        return number

    def bind_conv(self, node: int, arrays: ConvArrays) -> None:
        """Set the arrays of a convolution."""
        self._check(self._dll.spc_plan_bind_conv(self._plan, node, arrays))

    def bind_norm(self, node: int, arrays: NormArrays) -> None:
        """Set the arrays of a batch norm."""
        self._check(self._dll.spc_plan_bind_norm(self._plan, node, arrays))

    def build(self, output: int) -> None:
        """Settle order and memory; `output` gives the logits."""
        self._check(self._dll.spc_plan_build(self._plan, output))

    def arena_bytes(self) -> int:
        """Bytes of the arena for a full batch."""
        return int(self._dll.spc_plan_arena_bytes(self._plan))

    def allocated_bytes(self) -> int:
        """Bytes of the arena as it is allocated now."""
        return int(self._dll.spc_plan_allocated_bytes(self._plan))

    def train(
        self, batch: int, images: Images, labels: int, *, sgd: Sgd | None = None, threads: int = 1
    ) -> tuple[float, int]:
        """One training step; mean loss and number correct."""
        self._check(
            self._dll.spc_plan_train(
                self._plan, batch, images, labels, sgd, threads, self._loss, self._correct
            )
        )
        return self._loss.value, self._correct.value

    def topk_grads(
        self, batch: int, images: Images, labels: int, topk: Sequence[TopK], *, threads: int = 1
    ) -> list[int]:
        """The largest gradients at pruned weights, into the arrays of `topk`.

        Returns:
            How many of each there are; -1 of the one that holds a NaN, and the others not made.
        """
        asked = (TopK * len(topk))(*topk)
        status = self._dll.spc_plan_topk_grads(
            self._plan, batch, images, labels, asked, len(topk), threads
        )
        if status != _NOT_FINITE:
            self._check(status)
        return [one.count for one in asked]

    def statistics(
        self, batch: int, images: Images, moments: Sequence[Moments], *, threads: int = 1
    ) -> list[int]:
        """Mean and variance of what batch norms see in training mode, into those of `moments`.

        Returns:
            Of how many values each is.
        """
        asked = (Moments * len(moments))(*moments)
        self._check(
            self._dll.spc_plan_statistics(self._plan, batch, images, asked, len(moments), threads)
        )
        return [one.count for one in asked]

    def infer(
        self,
        batch: int,
        images: Images,
        *,
        logits: int | None = None,
        labels: int | None = None,
        threads: int = 1,
    ) -> tuple[float, int]:
        """Inference into `logits`; mean loss and number correct of `labels`."""
        self._check(
            self._dll.spc_plan_infer(
                self._plan, batch, images, logits, labels, threads, self._loss, self._correct
            )
        )
        return self._loss.value, self._correct.value

    def seconds(self) -> NDArray[np.float64]:
        """Seconds of each node in the last run: [2, nodes], forward and backward."""
        seconds = np.zeros((2, self._num_nodes))
        self._dll.spc_plan_seconds(self._plan, seconds.ctypes.data)
        return seconds

    def _check(self, status: int) -> None:
        if status:
            self._fail()

    def _fail(self) -> None:
        raise SparseModelError(self._dll.spc_last_error().decode())
