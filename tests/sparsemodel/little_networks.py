"""Small networks for the tests of sparse layers: residual, sequential, grouped."""

import torch
from torch import nn
from torch.nn import functional

from sparsemodel.masks.mask import Mask, prunable_parameters


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Residual(nn.Module):
    """Stem, three stages of blocks, global pool, classifier: a small CIFAR residual network."""

    def __init__(self, blocks: int = 1, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        for stage in range(3):
            wide = width << stage
            stages.append(Block(wide if stage == 0 else wide // 2, wide, 1 if stage == 0 else 2))
            stages.extend(Block(wide, wide, 1) for _ in range(blocks - 1))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(4 * width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stages(functional.relu(self.bn1(self.conv1(x))))
        logits: torch.Tensor = self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def pooled() -> nn.Sequential:
    """Convolutions with bias, groups and depthwise, max, average and global pools, two linears."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding="same", groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2, groups=2),
        nn.BatchNorm2d(12),
        nn.AvgPool2d(2, stride=1, padding=1, count_include_pad=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 16),
        nn.ReLU(),
        nn.Linear(16, 5),
    )


def random_mask(model: nn.Module, density: float = 0.2, seed: int = 1) -> Mask:
    """A random mask of the prunable parameters, each with one weight at least."""
    generator = torch.Generator().manual_seed(seed)
    patterns = {}
    for name, parameter in prunable_parameters(model).items():
        pattern = torch.rand(parameter.shape, generator=generator) < density
        pattern.view(-1)[-1] = True
        patterns[name] = pattern
    return Mask(patterns)


def masked(model: nn.Module, density: float = 0.2) -> Mask:
    """A random mask, applied to `model`."""
    mask = random_mask(model, density)
    mask.apply(model)
    return mask


def images(seed: int, count: int = 6, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images [count, 3, size, size] and labels in [0, 5)."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, 3, size, size, generator=generator),
        torch.randint(0, 5, (count,), generator=generator),
    )


def backward(model: nn.Module, seed: int) -> float:
    """Add one batch's gradients; its loss."""
    x, labels = images(seed)
    loss = functional.cross_entropy(model(x), labels)
    loss.backward()
    return loss.item()
