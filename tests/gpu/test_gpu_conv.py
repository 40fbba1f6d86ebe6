"""The cases of test_cuda_conv.py on a GPU."""

from test_cuda_conv import *  # noqa: F403
