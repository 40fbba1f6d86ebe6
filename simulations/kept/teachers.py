"""Teachers that somebody else has trained: files of weights, and images as these networks take.

Published residual networks for small images often have shortcuts without parameters where the shape
changes (option A of He et al., Deep Residual Learning for Image Recognition, CVPR 2016); ours have
1×1 convolutions (option B). A file without such convolutions makes a network of the other kind.
Their classifier may be called `linear`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from prunelab.data.tensors import PREPROCESSING
from prunelab.errors import RunError
from prunelab.networks.builtin import BasicBlock
from simulations.kept.grid import Setting


def given_teacher(model: nn.Module, setting: Setting, teacher: str) -> nn.Module:
    """A network with the weights of its file in `setting.teachers`.

    Raises:
        RunError: there is no such file, or it is of another network.
    """
    file = Path(setting.teachers) / f"{teacher}.safetensors"
    try:
        weights = {re.sub(r"^linear\.", "fc.", name): v for name, v in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file} is no {teacher}: {error}") from None
    if not any(".downsample." in name for name in weights):
        without_projections(model)
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise RunError(f"{file} is no {teacher}: {error}") from None
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise RunError(f"{file} is no {teacher}: {[*missing, *unexpected][0]} does not match")
    return Renormalised(model, setting.mean, setting.std) if setting.mean else model


def without_projections(model: nn.Module) -> None:
    """Put shortcuts without parameters in the place of 1×1 convolutions."""
    for block in model.modules():
        if isinstance(block, BasicBlock) and len(block.downsample):
            conv = block.downsample[0]
            assert isinstance(conv, nn.Conv2d)
            block.downsample = nn.Sequential(
                Padded(conv.stride[0], conv.in_channels, conv.out_channels)
            )


class Padded(nn.Module):
    """Every `stride`-th pixel, and channels of zeros on both sides of the others."""

    def __init__(self, stride: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.stride, before = stride, (out_channels - in_channels) // 2
        self.channels = before, out_channels - in_channels - before

    def forward(self, images: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H / stride, W / stride], rounded up."""
        kept = images[:, :, :: self.stride, :: self.stride]
        return functional.pad(kept, (0, 0, 0, 0, *self.channels))


class Renormalised(nn.Module):
    """A network that takes images as we prepare them, and was trained on others.

    Args:
        mean, std: of each channel, that its own images were normalised by.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> logits."""
        raw = images * PREPROCESSING.std[0] + PREPROCESSING.mean[0]
        logits: Tensor = self.network((raw - self.mean) / self.std)
        return logits
