"""The cases of test_cuda_loss.py on a GPU."""

from test_cuda_loss import *  # noqa: F403
