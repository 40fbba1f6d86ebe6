"""Built-in networks by name, with stems for small images.

Convolutional residual networks after He et al., Deep Residual Learning for Image Recognition
(CVPR 2016), VGG after Simonyan and Zisserman (ICLR 2015).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional, init

from prunelab.errors import ModelError

InputShape = tuple[int, int, int]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut; a 1×1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.downsample.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
            self.downsample.append(nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in, H, W] -> [N, out, H/stride, W/stride]."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet(nn.Module):
    """A 3×3 stem of width w, stages of basic blocks of width w, 2w, 4w, ..., a linear classifier.

    Shortcuts that change shape are 1×1 convolutions (option B of the paper), so that every
    layer can be pruned. Parameters have torchvision's names.
    """

    # Not torchvision's class: importing that takes a second, most of it for a compiler.

    def __init__(
        self, stages: int, blocks: int, *, width: int, in_channels: int, num_classes: int
    ) -> None:
        super().__init__()
        self.width = width
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = [width, *(width * 2**stage for stage in range(stages))]
        self._stages = [f"layer{stage + 1}" for stage in range(stages)]
        for name, (before, after) in zip(self._stages, pairwise(channels), strict=True):
            stride = 1 if before == after else 2
            self.add_module(name, _stage(before, after, blocks, stride=stride))
        self.fc = nn.Linear(channels[-1], num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> logits [N, num_classes]."""
        x = functional.relu(self.bn1(self.conv1(x)))
        for name in self._stages:
            x = getattr(self, name)(x)
        logits: torch.Tensor = self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def _stage(in_channels: int, out_channels: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride=stride)
    rest = (BasicBlock(out_channels, out_channels, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


def _cifar_resnet(blocks: int) -> Callable[[int, InputShape, int | None], nn.Module]:
    """Three stages, for images from 8×8 up; the depth is 6 · blocks + 2."""

    def build(num_classes: int, input_shape: InputShape, width: int | None) -> nn.Module:
        return ResNet(
            3, blocks, width=width or 16, in_channels=input_shape[0], num_classes=num_classes
        )

    return build


def _resnet18(num_classes: int, input_shape: InputShape, width: int | None) -> nn.Module:
    """Four stages of two blocks, of torchvision's start values."""
    model = ResNet(4, 2, width=width or 64, in_channels=input_shape[0], num_classes=num_classes)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return model


def _vgg11_bn(num_classes: int, input_shape: InputShape, width: int | None) -> nn.Module:
    """torchvision's vgg11_bn convolutions, a global average pool and one linear classifier."""
    # Not vgg11_bn() itself: it first draws 124 million weights of a classifier for ImageNet.
    from torchvision.models import vgg  # noqa: PLC0415

    refuse_width("vgg11_bn", width)
    if min(input_shape[1:]) < 32:
        raise ModelError(
            f"vgg11_bn halves the image five times and needs 32×32 or more; got "
            f"{input_shape[1]}×{input_shape[2]}; use resnet8 or resnet20"
        )
    features: nn.Sequential = vgg.make_layers(vgg.cfgs["A"], batch_norm=True)
    if input_shape[0] != 3:
        features[0] = nn.Conv2d(input_shape[0], 64, 3, padding=1)
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return nn.Sequential(
        OrderedDict(
            features=features,
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(512, num_classes),
        )
    )


def refuse_width(name: str, width: int | None) -> None:
    """Raise ModelError if a network of one width (64 channels) is asked for in another."""
    if width not in (None, 64):
        raise ModelError(f"{name} has a fixed width; leave model.width at 0, got {width}")


MODELS: dict[str, Callable[[int, InputShape, int | None], nn.Module]] = {
    "resnet8": _cifar_resnet(1),
    "resnet20": _cifar_resnet(3),
    "resnet32": _cifar_resnet(5),
    "resnet44": _cifar_resnet(7),
    "resnet56": _cifar_resnet(9),
    "resnet18": _resnet18,
    "vgg11_bn": _vgg11_bn,
}
ADJUSTABLE_WIDTH = ("resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet18")
