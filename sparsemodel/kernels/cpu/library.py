"""Bindings of the native CPU library: raw addresses or numpy arrays in, no torch.

Nothing loads at import. `library()` loads the library on first use and gives None, after one
warning, where it was not built or does not run; callers then compute by the reference. Layouts
and meanings are those of csrc/cpu/sparse_cpu.h.

The environment variable SPARSEMODEL_CPU names the instruction set to use: "avx512", "avx2",
"neon", "scalar", or "off" for no native library.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsemodel.errors import NativeLibraryWarning, SparseModelError

ENVIRONMENT = "SPARSEMODEL_CPU"
_ABI_VERSION = 1
_FILE_NAMES = {"win32": "sparse_cpu.dll", "darwin": "libsparse_cpu.dylib"}
_FILE_NAME = _FILE_NAMES.get(sys.platform, "libsparse_cpu.so")

# An address (torch's Tensor.data_ptr()), a C-contiguous array, or None for a null pointer.
Data = int | NDArray[Any] | None


class Geometry(ctypes.Structure):
    """Sizes of one convolution call: `spc_geometry`. Build it with `conv` or `linear`."""

    _fields_ = tuple(
        (name, ctypes.c_int32)
        for name in (
            *("batch", "in_channels", "out_channels", "in_h", "in_w", "out_h", "out_w"),
            *("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w"),
            *("dilation_h", "dilation_w", "groups"),
        )
    )

    @classmethod
    def conv(
        cls,
        batch: int,
        in_channels: int,
        out_channels: int,
        size: tuple[int, int],
        kernel: tuple[int, int],
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> Geometry:
        """A convolution of a plane of `size` (h, w); the output's size follows."""
        out = [
            (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
            for i in range(2)
        ]
        return cls(
            batch, in_channels, out_channels, *size, *out, *kernel, *stride, *padding, *dilation,
            groups,
        )  # fmt: skip

    @classmethod
    def linear(cls, batch: int, in_features: int, out_features: int) -> Geometry:
        """A linear layer: a 1x1 convolution of a 1x1 plane."""
        return cls.conv(batch, in_features, out_features, (1, 1), (1, 1))


class PoolGeometry(ctypes.Structure):
    """Sizes of one pooling call: `spc_pool_geometry`."""

    _fields_ = tuple(
        (name, ctypes.c_int32)
        for name in (
            *("batch", "channels", "in_h", "in_w", "out_h", "out_w"),
            *("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w"),
        )
    )

    @classmethod
    def pool(
        cls,
        batch: int,
        channels: int,
        size: tuple[int, int],
        kernel: tuple[int, int],
        *,
        stride: tuple[int, int],
        padding: tuple[int, int] = (0, 0),
    ) -> PoolGeometry:
        """Pooling of a plane of `size` (h, w); the output's size follows (floor)."""
        out = [(size[i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2)]
        return cls(batch, channels, *size, *out, *kernel, *stride, *padding)


_INT, _LONG, _REAL = ctypes.c_int32, ctypes.c_int64, ctypes.c_double
_Geometry, _Pool = ctypes.POINTER(Geometry), ctypes.POINTER(PoolGeometry)


class _Array:
    """The parameter type of an array of one dtype: takes what `Data` says."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._dtype = np.dtype(dtype)

    def address(self, data: Data) -> int | None:
        if not isinstance(data, np.ndarray):
            return data
        if data.dtype != self._dtype or not data.flags.c_contiguous:
            raise SparseModelError(
                f"expected a C-contiguous {self._dtype} array, got {data.dtype} of shape "
                f"{data.shape} and strides {data.strides}"
            )
        return int(data.__array_interface__["data"][0])


_F, _I, _L, _U, _W = (_Array(t) for t in (np.float32, np.int32, np.int64, np.uint8, np.uint16))

# Function -> types of its arguments, as sparse_cpu.h declares them; all return a status.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "check_geometry": (_Geometry,),
    "check_pattern": (_Geometry, _I, _I),
    "transpose_pattern": (_Geometry, _I, _I, _I, _I, _I),
    "conv_forward": (_Geometry, _I, _I, _F, _F, _F, _F, _INT),
    "conv_input_grad": (_Geometry, _I, _I, _I, _F, _F, _F, _INT),
    "conv_backward": (_Geometry, _I, _I, _I, _F, _F, _F, _F, _F, _F, _INT),
    "conv_weight_grad": (_Geometry, _I, _I, _F, _F, _F, _F, _INT),
    "topk_grad": (_Geometry, _I, _I, _F, _F, _LONG, _LONG, _L, _F, _L, _INT),
    "pattern_bits": (_LONG, _LONG, _I, _I, _W, _INT),
    "dense_weight": (_LONG, _LONG, _I, _W, _F, _F, _INT),
    "active_values": (_LONG, _LONG, _I, _W, _F, _F, _INT),
    "linear_few": (_LONG, _LONG, _LONG, _I, _W, _F, _F, _F, _F, _INT),
    "linear_few_backward": (*(_LONG, _LONG, _LONG, _I, _W, _F, _F, _F, _F, _F, _F, _INT),),
    "batchnorm_train": (
        *(_LONG, _LONG, _F, _F, _F, _F, _REAL, _REAL, _F, _F, _INT, _F, _F, _F, _INT),
    ),
    "batchnorm_infer": (_LONG, _LONG, _F, _F, _F, _F, _REAL, _F, _F, _INT, _F, _INT),
    "batchnorm_backward": (*(_LONG, _LONG, _F, _F, _F, _F, _F, _F, _INT, _F, _F, _F, _F, _INT),),
    "relu_forward": (_LONG, _F, _F, _INT),
    "relu_backward": (_LONG, _F, _F, _F, _INT),
    "maxpool_forward": (_Pool, _F, _F, _U, _INT),
    "maxpool_backward": (_Pool, _U, _F, _F, _INT),
    "avgpool_forward": (_Pool, _INT, _F, _F, _INT),
    "avgpool_backward": (_Pool, _INT, _F, _F, _INT),
    "global_avgpool_forward": (_LONG, _LONG, _LONG, _F, _F, _INT),
    "global_avgpool_backward": (_LONG, _LONG, _LONG, _F, _F, _INT),
    "transpose": (_LONG, _LONG, _F, _F, _INT),
    "transpose_planes": (_LONG, _LONG, _LONG, _F, _LONG, _LONG, _F, _LONG, _LONG, _INT),
    "sgd_step": (_LONG, _F, _F, _F, _REAL, _REAL, _REAL, _INT),
    "adam_step": (*(_LONG, _F, _F, _F, _F, _REAL, _REAL, _REAL, _REAL, _REAL, _INT, _LONG, _INT),),
    "fixed_add": (_LONG, _L, _L, _L, _LONG, _L, _L, _L, _INT),  # addresses as int64
}


class CpuLibrary:
    """The loaded library: one method for each function of sparse_cpu.h, without the `spc_`.

    A method takes the C function's arguments in the C order; arrays are addresses or numpy
    arrays of the right dtype (their sizes are the caller's care).

    Raises:
        SparseModelError: the library refused the arguments; the message says which and why.
    """

    def __init__(self, path: Path) -> None:
        self._dll = ctypes.CDLL(str(path))
        self._dll.spc_abi_version.restype = _INT
        found = self._dll.spc_abi_version()
        if found != _ABI_VERSION:
            raise OSError(f"{path} has ABI version {found}, expected {_ABI_VERSION}; install anew")
        for name in ("spc_last_error", "spc_isa"):
            getattr(self._dll, name).restype = ctypes.c_char_p
        self._dll.spc_release_scratch.restype = None
        self._dll.spc_set_isa.argtypes = (ctypes.c_char_p,)
        self._dll.spc_transposed_rows.argtypes = (_Geometry,)
        self._dll.spc_transposed_rows.restype = _LONG
        for name, types in _SIGNATURES.items():
            function = getattr(self._dll, f"spc_{name}")
            function.restype = _INT
            function.argtypes = [ctypes.c_void_p if isinstance(t, _Array) else t for t in types]
            setattr(self, name, functools.partial(self._call, function, types))

    def _call(self, function: Any, types: tuple[Any, ...], *arguments: Any) -> None:
        try:
            status = function(*arguments)  # addresses alone go the short way
        except ctypes.ArgumentError:
            pairs = zip(types, arguments, strict=False)  # the call below counts them
            plain = [t.address(a) if isinstance(t, _Array) else a for t, a in pairs]
            try:
                status = function(*plain, *arguments[len(types) :])
            except ctypes.ArgumentError as error:
                raise SparseModelError(f"{function.__name__}: {error}") from error
        if status:
            self._fail()

    def _fail(self) -> None:
        raise SparseModelError(self._dll.spc_last_error().decode())

    def __getattr__(self, name: str) -> Any:  # for type checkers: set in __init__
        raise AttributeError(f"the native library has no function {name!r}")

    def isa(self) -> str:
        """The instruction set in use."""
        return str(self._dll.spc_isa().decode())

    def set_isa(self, name: str) -> None:
        """Use "avx512", "avx2", "neon", "scalar" or "best" from now on, in all threads."""
        if self._dll.spc_set_isa(name.encode()):
            self._fail()

    def transposed_rows(self, geometry: Geometry) -> int:
        """Rows of the transposed index of a pattern."""
        rows = int(self._dll.spc_transposed_rows(geometry))
        if rows < 0:
            self._fail()
        return rows

    def release_scratch(self) -> None:
        """Free this thread's and the workers' scratch memory."""
        self._dll.spc_release_scratch()


def library_path() -> Path | None:
    """Where the native library is: beside this file, or where an editable install put it."""
    site = Path(sysconfig.get_path("platlib")) / "sparsemodel" / "kernels" / "cpu"
    for folder in (Path(__file__).parent, site):
        if (folder / _FILE_NAME).is_file():
            return folder / _FILE_NAME
    return None


@functools.cache
def library() -> CpuLibrary | None:
    """The native library, loaded once; None, after one warning, where there is none.

    Raises:
        SparseModelError: SPARSEMODEL_CPU names an instruction set that this processor lacks.
    """
    wanted = os.environ.get(ENVIRONMENT, "best")
    if wanted == "off":
        return None
    path = library_path()
    try:
        if path is None:
            raise OSError(f"{_FILE_NAME} is not installed")
        loaded = CpuLibrary(path)
    except (OSError, AttributeError) as error:
        warnings.warn(
            f"no native sparse kernels ({error}): sparse layers compute by the slow reference. "
            "With a C++ compiler at hand, `pip install --force-reinstall --no-deps fedprune` "
            f"builds them; {ENVIRONMENT}=off silences this",
            NativeLibraryWarning,
            stacklevel=2,
        )
        return None
    loaded.set_isa(wanted)
    return loaded


def isa() -> str | None:
    """The instruction set of the native kernels in use, or None without them."""
    loaded = library()
    return None if loaded is None else loaded.isa()
