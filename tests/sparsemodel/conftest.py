"""What several tests of the sparse core stand on."""

from collections.abc import Iterator

import pytest
import torch

from sparsemodel.kernels.cpu import native


@pytest.fixture
def plans_on_one_thread() -> Iterator[None]:
    """Skips without the native library; the number of threads is put back afterwards."""
    if not native.loaded():
        pytest.skip("build the native library to run training plans")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
