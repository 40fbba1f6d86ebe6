"""The cases of test_cuda_arrays.py on a GPU."""

from test_cuda_arrays import *  # noqa: F403
