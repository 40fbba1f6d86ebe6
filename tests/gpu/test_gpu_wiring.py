"""The cases of test_cuda_wiring.py on a GPU."""

from test_cuda_wiring import *  # noqa: F403
