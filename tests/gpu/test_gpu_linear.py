"""The cases of test_cuda_linear.py on a GPU."""

from test_cuda_linear import *  # noqa: F403
