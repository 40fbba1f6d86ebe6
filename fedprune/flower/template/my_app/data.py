"""The data that are divided among the clients."""

from typing import Any

import numpy as np
from sklearn.datasets import load_digits


def make_data() -> dict[str, Any]:
    """Both sides of a data set, the same on every machine that asks.

    A side is (inputs, labels) in arrays or tensors, or a data set of torch's or Hugging Face's.
    """
    digits = load_digits()
    images = (digits.images * 15).astype(np.uint8)
    return {
        "train": (images[:1400], digits.target[:1400]),
        "test": (images[1400:], digits.target[1400:]),
    }
