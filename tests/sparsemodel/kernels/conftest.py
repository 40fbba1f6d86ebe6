"""What several tests of the native library and of the CUDA kernels stand on."""

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_host import COMPILER, HostRunner

from sparsemodel.errors import SparseModelError
from sparsemodel.kernels.cpu import library as cpu

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


@pytest.fixture(scope="session")
def host_runner(shared_folder: Path) -> HostRunner:
    """The CUDA kernels, built as C++ once a session."""
    if COMPILER is None:
        pytest.skip("needs a C++ compiler: install g++ or clang++, or set CXX")
    folder = shared_folder / "cuda_host"
    folder.mkdir(exist_ok=True)
    return HostRunner(folder)


@pytest.fixture(params=["in order", "shuffled"])
def cuda(request: pytest.FixtureRequest, host_runner: HostRunner) -> Iterator[HostRunner]:
    """Runs CUDA kernels on the host, threads in order or not; empty tensors are made NaN."""
    host_runner.seed = 0 if request.param == "in order" else 1
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty makes
    yield host_runner
    torch.use_deterministic_algorithms(False)
