"""Networks by name, by "module:function" or by object, and views of their state.

The named ones have stems for small images.

Convolutional residual networks after He et al., Deep Residual Learning for Image Recognition
(CVPR 2016), VGG after Simonyan and Zisserman (ICLR 2015).
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional, init

from prunelab.errors import ModelError
from prunelab.runs.imported import imported
from sparsemodel.layers.from_state import carried_tensors, fixed_tensors
from sparsemodel.masks.mask import prunable_parameters
from sparsemodel.masks.probe import probing

InputShape = tuple[int, int, int]
Network = str | Callable[..., nn.Module] | nn.Module
"""What `build_model` takes."""
GRANULARITIES = ("layer", "block", "entire")
BatchNorm = nn.modules.batchnorm._BatchNorm


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

    _refuse_width("vgg11_bn", width)
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


def _refuse_width(name: str, width: int | None) -> None:
    if width not in (None, 64):
        raise ModelError(f"{name} has a fixed width; leave model.width at 0, got {width}")


MODELS: dict[str, Callable[[int, InputShape, int | None], nn.Module]] = {
    "resnet8": _cifar_resnet(1),
    "resnet20": _cifar_resnet(3),
    "resnet18": _resnet18,
    "vgg11_bn": _vgg11_bn,
}
ADJUSTABLE_WIDTH = ("resnet8", "resnet20", "resnet18")


def check_model(name: str) -> None:
    """Raise ModelError unless `name` is a known model, or a "module:function" that is there."""
    if ":" in name:
        _imported(name)
    elif name not in MODELS:
        raise ModelError(
            f"unknown model {name!r}; known models: {', '.join(MODELS)}; or give module:function"
        )


def build_model(
    model: Network,
    *,
    num_classes: int | None,
    input_shape: tuple[int, ...] | None,
    seed: int,
    width: int | None = None,
) -> nn.Module:
    """A network, the same bits for the same arguments; the global seed is not touched.

    Its numbers are float32, whatever torch's default is; a given network keeps its own type.

    Args:
        model: a name; "module:function", imported from the working folder or from what is
            installed; a function or class, called with those of num_classes, input_shape and seed
            that it has parameters for (one parameter of another name is the seed); or a network,
            which is copied with its weights.
        num_classes: None where samples have no classes; names need it.
        input_shape: (channels, height, width) of one image; None where samples are none.
        width: channels of the first stage, where the model's is adjustable; None: its own.

    Raises:
        ModelError: unknown name, a width or image size that the model cannot have, or a function
            that asks for something else or returns something else.

    >>> model = build_model("resnet8", num_classes=10, input_shape=(1, 8, 8), seed=0)
    >>> model.eval()(torch.zeros(1, 1, 8, 8)).shape
    torch.Size([1, 10])
    >>> def linear(num_classes):
    ...     return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
    >>> build_model(linear, num_classes=10, input_shape=(1, 8, 8), seed=0)[1].out_features
    10
    """
    if isinstance(model, str) and ":" not in model:
        return _named(model, num_classes, input_shape, seed=seed, width=width)
    if isinstance(model, nn.Module):
        _refuse_width(type(model).__name__, width)
        return copy.deepcopy(model)
    function = _imported(model) if isinstance(model, str) else model
    if not callable(function):
        raise ModelError(
            f"model: expected a name, a function or a network, got {type(model).__name__}"
        )
    _refuse_width(_title(function), width)
    offered = {"num_classes": num_classes, "input_shape": input_shape, "seed": seed}
    arguments = _arguments(function, offered)
    with _drawing(seed):
        built = function(**arguments)
    if not isinstance(built, nn.Module):
        raise ModelError(
            f"{_title(function)} returned a {type(built).__name__}, expected a torch.nn.Module"
        )
    return built


def _named(
    name: str,
    num_classes: int | None,
    input_shape: tuple[int, ...] | None,
    *,
    seed: int,
    width: int | None,
) -> nn.Module:
    check_model(name)
    if num_classes is None or input_shape is None or len(input_shape) != 3:
        raise ModelError(
            f"{name} is for labelled images [channels, height, width], and these samples are none "
            f"(classes {num_classes}, shape {input_shape}); give a network of your own"
        )
    sizes = {"classes": num_classes, "width": 1 if width is None else width}
    sizes |= dict(zip(("channels", "image height", "image width"), input_shape, strict=True))
    for what, size in sizes.items():
        if size < 1:
            raise ModelError(f"{name}: {what} must be at least 1, got {size}")
    channels, height, side = input_shape
    with _drawing(seed):
        return MODELS[name](num_classes, (channels, height, side), width)


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Inside, weights are float32 and drawn by the seed; torch's own state stays as it was."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def fitted(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Images in the floating-point type of a network's weights."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return images.to(next(dtypes, images.dtype))


@torch.no_grad()
def check_fits(model: nn.Module, *, input_shape: tuple[int, ...], num_classes: int) -> None:
    """Raise ModelError unless a network takes such samples and tells so many classes apart.

    The network is left as it was.
    """
    size = (2, *input_shape)
    what = f"the network does not fit images {list(size)}"
    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device
    with probing(model):
        model.eval()
        try:
            logits = model(fitted(model, torch.zeros(size, dtype=torch.float32, device=device)))
        except Exception as error:  # whatever the network's own code raises
            raise ModelError(f"{what}: {type(error).__name__}: {error}") from error
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != 2:
        raise ModelError(f"{what}: it gives {shape}, expected logits [2, classes]")
    if logits.shape[1] < num_classes:
        raise ModelError(
            f"the network gives {logits.shape[1]} logits, and the data have {num_classes} classes; "
            "a function that builds it may ask for num_classes"
        )


def _imported(name: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    try:
        found = imported(name)
    except ImportError as error:
        raise ModelError(f"model {name!r}: {error}") from error
    if not callable(found):
        raise ModelError(f"model {name!r} is a {type(found).__name__}, expected a function")
    function: Callable[..., Any] = found
    return function


def _arguments(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Of what is offered, what the function has a parameter for."""
    parameters = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}
    ]
    needed = [p.name for p in parameters if p.default is p.empty and p.name not in offered]
    if len(needed) == 1 and len(parameters) == 1:
        return {needed[0]: offered["seed"]}
    if needed:
        raise ModelError(
            f"{_title(function)} has parameters {needed}; a model's function may ask for "
            f"{', '.join(offered)}: wrap it in one that does"
        )
    return {p.name: offered[p.name] for p in parameters if offered.get(p.name) is not None}


def _title(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


@contextmanager
def uninitialised() -> Iterator[None]:
    """Inside, layers draw no weights: for models whose state is overwritten.

    Parameters hold whatever is in memory; buffers and constant parameters are as always.
    """
    names = [name for name in vars(init) if name.endswith("_") and "uniform" in name]
    names += [name for name in vars(init) if name.endswith("_") and "normal" in name]
    kept = {name: getattr(init, name) for name in names}
    for name in names:
        setattr(init, name, _untouched)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(init, name, function)


def _untouched(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return tensor


def parameter_blocks(model: nn.Module, *, granularity: str) -> list[list[str]]:
    """Prunable parameters in groups from the input to the output.

    Args:
        granularity: "layer" (each its own), "block" or "entire" (one group). Blocks are the
            stages of a residual network, the classifier with the last; VGG's parts between max
            pools, where the first holds only the stem, with the classifier as the fifth; and of
            other networks what lies in one child of the model, or of its only child that has
            prunable parameters, the last layer with the block before it.

    Raises:
        ModelError: another granularity.
    """
    names = list(prunable_parameters(model))
    if granularity == "layer":
        return [[name] for name in names]
    if granularity == "entire":
        return [names]
    if granularity != "block":
        raise ModelError(f"granularity: expected layer, block or entire; got {granularity!r}")
    groups: dict[int, list[str]] = {}
    for name in names:
        stage = _stage_of(model, name, last=max(groups, default=None))
        if stage is None:
            return _blocks_by_child(names)
        groups.setdefault(stage, []).append(name)
    return [groups[stage] for stage in sorted(groups)]


def _blocks_by_child(names: list[str]) -> list[list[str]]:
    """Consecutive names that share the first parts of their paths, as few as tell them apart."""
    for depth in range(1, max(name.count(".") for name in names) + 1):
        blocks: list[list[str]] = []
        for name in names:
            if blocks and blocks[-1][0].split(".")[:depth] == name.split(".")[:depth]:
                blocks[-1].append(name)
            else:
                blocks.append([name])
        if len(blocks) > 1:
            *before, last = blocks
            if len(last) == 1 and len(before) > 1:
                return [*before[:-1], before[-1] + last]
            return blocks
    return [names]


def _stage_of(model: nn.Module, name: str, *, last: int | None) -> int | None:
    """Number of a parameter's stage, None where stages are not known; `last` is that before it."""
    first, *rest = name.split(".")
    features = getattr(model, "features", None)
    if first.startswith("layer") and first[5:].isdigit():
        return int(first[5:])
    if first in ("features", "classifier") and isinstance(features, nn.Sequential):
        before = features if first == "classifier" else features[: int(rest[0])]
        return sum(isinstance(layer, nn.MaxPool2d) for layer in before)
    if first == "fc" and last is not None:
        return last
    return None


def float_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what clients and server exchange of a model, by name.

    Its trained parameters and its lasting floating-point buffers, a tensor of several names (tied
    weights) once, by the first of them. Frozen parameters are left out: every node builds them
    from the seed; where no parameter is trained, all are in it. Batch norm's integer batch
    counters are left out, too: a mean of them means nothing.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> _ = model[0].requires_grad_(False)
    >>> list(float_state(model))
    ['1.weight', '1.bias']
    """
    return {name: tensor.clone() for name, tensor in carried_tensors(model).items()}


def is_wholly_exchanged(model: nn.Module) -> bool:
    """Whether `float_state` is all that a network knows, so that its own weights need no drawing.

    Frozen parameters, tables, and tensors that are no buffers are the network's own, and have to
    be built by the seed as they are everywhere.
    """
    own = (value for module in model.modules() for value in vars(module).values())
    return not fixed_tensors(model) and not any(isinstance(v, torch.Tensor) for v in own)


def narrow_width(name: str, *, num_classes: int, input_shape: InputShape, max_bytes: int) -> int:
    """The largest width whose fp32 state (parameters, batch-norm statistics) fits `max_bytes`.

    Raises:
        ModelError: the model's width is fixed, or even width 1 needs more.
    """
    if name not in ADJUSTABLE_WIDTH:
        raise ModelError(
            f"a narrower network is asked for, and {name} has a fixed width; use one of "
            f"{', '.join(ADJUSTABLE_WIDTH)}"
        )

    def size(width: int) -> int:
        with torch.device("meta"):  # shapes alone: the dense net may be far larger
            model = MODELS[name](num_classes, input_shape, width)
        return 4 * sum(value.numel() for value in float_state(model).values())

    if size(1) > max_bytes:
        raise ModelError(f"{name} of width 1 takes {size(1)} bytes; allowed are {max_bytes}")
    low, high = 1, 2
    while size(high) <= max_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= max_bytes else (low, middle)
    return low
