"""What several tests of the native library stand on."""

import platform
from collections.abc import Iterator

import pytest

from sparsemodel.errors import SparseModelError
from sparsemodel.kernels import cpu

IS_ARM = platform.machine().lower() in ("aarch64", "arm64")


@pytest.fixture(params=["neon", "scalar"] if IS_ARM else ["avx512", "avx2", "scalar"])
def lib(request: pytest.FixtureRequest) -> Iterator[cpu.CpuLibrary]:
    """The library in each instruction set that it has for this kind of processor."""
    loaded = cpu.library()
    assert loaded is not None
    try:
        loaded.set_isa(request.param)
    except SparseModelError as error:
        pytest.skip(f"{error} (needs another processor)")
    yield loaded
    loaded.set_isa("best")
