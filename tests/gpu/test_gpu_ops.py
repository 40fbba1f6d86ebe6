"""The cases of test_cuda_ops.py on a GPU."""

import pytest
from test_cuda_ops import *  # noqa: F403


@pytest.fixture
def _computed_by() -> None:
    """The operators themselves choose: the kernels."""
