"""The cases of test_cuda_nearest.py on a GPU."""

from test_cuda_nearest import *  # noqa: F403
