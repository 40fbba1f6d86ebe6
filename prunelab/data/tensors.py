"""Images as torch's tensors: the same preprocessing and augmentation as `batches`."""

from __future__ import annotations

import numpy as np
import torch

from prunelab.data.batches import Preprocessing, augment

PREPROCESSING = Preprocessing()


def prepare(images: torch.Tensor, *, preprocessing: Preprocessing = PREPROCESSING) -> torch.Tensor:
    """`Preprocessing.apply` where the images are: uint8 [..., C, H, W] -> float32.

    Float images pass as they are.

    >>> prepare(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)).flatten()
    tensor([-2.,  2.])
    """
    if images.is_floating_point():
        return images.float()
    values = images.float().div_(255.0)  # in place: a batch of floats is four times its pictures
    if len(preprocessing.mean) == 1:  # numbers need no way to a GPU
        return values.sub_(preprocessing.mean[0]).div_(preprocessing.std[0])
    mean, std = (
        torch.from_numpy(part).to(images.device)[:, None, None]
        for part in preprocessing.normalization(images.shape[-3])
    )
    return values.sub_(mean).div_(std)


def augmented(images: torch.Tensor, *, rng: np.random.Generator) -> torch.Tensor:
    """`augment` of images on the CPU, uint8 or float32 [N, C, H, W]."""
    return torch.from_numpy(augment(images.numpy(), rng=rng))
