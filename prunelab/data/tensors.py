"""Stored samples as torch's tensors: the same preprocessing and augmentation as `batches`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from prunelab.data.batches import Preprocessing, augment, padding

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


def cropped(images: torch.Tensor, crops: torch.Tensor) -> torch.Tensor:
    """`batches.cropped` where the images are: the same bits, laid out channels last.

    Args:
        images: uint8 or float32 [N, C, H, W].
        crops: int64 [3, N] on their device.
    """
    count, _, height, width = images.shape
    pad, (top, left, flip) = padding(height), crops[:, :, None]
    padded = functional.pad(images, (pad, pad, pad, pad))
    each, down, across = (
        torch.arange(size, device=images.device) for size in (count, height, width)
    )
    rows, columns = top + down, left + torch.where(flip > 0, width - 1 - across, across)
    cut = padded.permute(0, 2, 3, 1)[each[:, None, None], rows[:, :, None], columns[:, None]]
    return cut.permute(0, 3, 1, 2)


def batch_of(inputs: Any, targets: Any, device: torch.device | str = "cpu") -> Any:
    """A batch as tasks take it, of arrays as a `SampleStore` has them.

    Args:
        inputs: uint8 or float32 [B, ...], or token ids, int64 [B, T], -1 behind the end of a text.
        targets: [B] or [B, ...].

    Returns:
        (float32 inputs, targets), or of tokens a dict as transformers' models take it, cut at the
        longest text; on the device.
    """
    target = tensor_of(targets)
    if inputs.dtype != np.int64:
        values = prepare(
            tensor_of(inputs).to(device)
        )  # bytes are a quarter of what floats would send
        return values, target.to(device)
    ids = tensor_of(inputs)
    mask = (ids >= 0).long()
    length = max(1, int(mask.sum(1).max()))
    target = target if target.dim() == 1 else target[:, :length]
    batch = {
        "input_ids": ids[:, :length].clamp(min=0),
        "attention_mask": mask[:, :length],
        "labels": target,
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; to a GPU it goes from pinned memory, and the host does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def tensor_of(array: Any) -> torch.Tensor:
    """A tensor of an array, which may be a memory map: torch knows none that is read-only."""
    return torch.from_numpy(array if array.flags.writeable else np.array(array))
