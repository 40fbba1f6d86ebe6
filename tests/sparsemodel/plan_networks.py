"""Small networks of the layouts that training plans meet."""

import pytest
import torch
from little_networks import Residual
from torch import nn
from torch.nn import functional

from sparsemodel.masks.mask import Mask
from sparsemodel.plans.plan import TrainingPlan


class InPlaceBlock(nn.Module):
    """A residual block as torchvision writes it: in-place ReLU and addition, `downsample`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class InPlaceResidual(nn.Module):
    """Four stages of two blocks, with a stem for small images and no max pool."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity()
        wide = [width << stage for stage in range(4)]
        self.layer1 = nn.Sequential(*(InPlaceBlock(width, width, 1) for _ in range(2)))
        for stage in range(1, 4):
            first = InPlaceBlock(wide[stage - 1], wide[stage], 2)
            blocks = nn.Sequential(first, InPlaceBlock(wide[stage], wide[stage], 1))
            setattr(self, f"layer{stage + 1}", blocks)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(wide[-1], 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: torch.Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def vgg() -> nn.Sequential:
    """Convolutions with bias and batch norm, max pools between, a pooled linear classifier."""
    layers: list[nn.Module] = []
    channels = 3
    for entry in (8, "pool", 12, "pool", 16, 16, "pool"):
        if isinstance(entry, str):
            layers.append(nn.MaxPool2d(2, 2))
            continue
        layers += [nn.Conv2d(channels, entry, 3, padding=1), nn.BatchNorm2d(entry)]
        layers.append(nn.ReLU(inplace=True))
        channels = entry
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))
    return nn.Sequential(nn.Sequential(*layers), *tail)


NETWORKS = {
    "resnet8": lambda: Residual(blocks=1),
    "resnet20": lambda: Residual(blocks=3, width=4),
    "resnet18": InPlaceResidual,
    "vgg11_bn": vgg,
}


def network(name: str) -> nn.Module:
    """One of NETWORKS with the same weights each time, running statistics moved off 0 and 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NETWORKS[name]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def batch(size: int, seed: int = 0, shape: tuple[int, ...] = (3, 16, 16)) -> tuple:
    """Images and labels of 5 classes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, *shape, generator=generator)
    return images, torch.randint(0, 5, (size,), generator=generator)


def assert_gradients_match(model: nn.Module, dense: nn.Module, mask: Mask) -> None:
    """Those of a sparsified model are those of the masked dense one, in float64."""
    expected = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        weight = name.removesuffix("values") + "weight" if name.endswith("values") else name
        gradient = expected[weight].grad
        assert gradient is not None
        gradient = gradient[mask[weight]] if name.endswith("values") else gradient
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), gradient, rtol=2e-4, atol=2e-6)


def assert_step_matches(
    plan: TrainingPlan,
    sparse: nn.Module,
    dense: nn.Module,
    mask: Mask,
    data: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Loss, hits and gradients of a plan's step are those of the masked dense model in float64."""
    images, labels = data
    loss, num_correct = plan.step(images, labels)
    dense.zero_grad()
    logits = dense(images.double())
    expected = functional.cross_entropy(logits, labels)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert num_correct == int((logits.argmax(1) == labels).sum())
    assert_gradients_match(sparse, dense, mask)
