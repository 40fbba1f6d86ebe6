"""The cases of tests/sparsemodel/kernels on a device; skipped where there is none."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparsemodel.kernels.cuda import launch as kernels

# The modules of the cases lie there and are no package.
_CASES = Path(__file__).parent.parent / "sparsemodel" / "kernels"
sys.path.insert(0, str(_CASES))


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors are made on the GPU; skips without one, or without a way to compile for it."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and a CUDA build of torch")
    why = kernels.obstacle()
    if why is not None:
        pytest.skip(why)
    monkeypatch.setenv(kernels.ENVIRONMENT, "on")
    torch.manual_seed(0)
    with torch.device("cuda"):
        yield


@pytest.fixture
def cuda() -> kernels.Runner:
    """Runs kernels on the current GPU."""
    runner = kernels.runner(torch.device("cuda"))
    assert runner is not None, "the kernels compiled but did not load"
    return runner
