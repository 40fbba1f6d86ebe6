"""The widest network that fits into bytes, of any function with a width."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunelab.errors import ModelError
from prunelab.networks import build_model, float_state, narrow_width

SHAPE = (1, 8, 8)


def two_layers(num_classes: int, width: int = 64) -> nn.Module:
    """65 w + (w + 1) · classes floats."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, num_classes)
    )


def in_eights(num_classes: int, width_mult: float = 1.0) -> nn.Module:
    """32 channels as published, each width to the next multiple of 8."""
    return two_layers(num_classes, width=max(8, round(32 * width_mult / 8) * 8))


def of_heads(num_classes: int, width: int = 48) -> nn.Module:
    """A width that its twelve heads divide; it knows no values."""
    if width % 12:
        raise ValueError("embed_dim must be divisible by num_heads")
    model = two_layers(num_classes, width)
    model.register_buffer("scale", torch.tensor(float(torch.ones(1).sum())))  # not on "meta"
    return model


def falling(num_classes: int, width: int = 64) -> nn.Module:
    """Every tenth width takes as little as six less do."""
    return two_layers(num_classes, width=width - 6 if width % 10 == 0 else width)


def alike(num_classes: int, width: int = 1) -> nn.Module:
    return two_layers(num_classes, width=4)


def bytes_of(model: nn.Module) -> int:
    return 4 * sum(value.numel() for value in float_state(model).values())


def built(model: object, width: int) -> nn.Module:
    return build_model(model, num_classes=3, input_shape=SHAPE, seed=0, width=width)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [two_layers, in_eights, of_heads, falling])
@pytest.mark.parametrize("max_bytes", [14_000, 20_000, 27_200])
def test_no_other_width_that_fits_is_wider(model: object, max_bytes: int) -> None:
    width = narrow_width(model, num_classes=3, input_shape=SHAPE, max_bytes=max_bytes)  # type: ignore[arg-type]
    assert bytes_of(built(model, width)) <= max_bytes
    for wider in range(width + 1, 3 * width + 24):
        try:
            assert bytes_of(built(model, wider)) > max_bytes, wider
        except ValueError:
            assert model is of_heads


def test_a_width_reaches_the_function_and_a_factor_is_in_eighths() -> None:
    assert built(two_layers, 5)[1].out_features == 5
    assert built(in_eights, 8)[1].out_features == 32
    assert built(in_eights, 2)[1].out_features == 8
    whole = build_model(two_layers, num_classes=3, input_shape=SHAPE, seed=0)
    assert whole[1].out_features == 64


def test_torchvisions_networks_with_a_factor_have_a_width() -> None:
    name, shape = "torchvision/mobilenet_v2", (3, 32, 32)
    with torch.device("meta"):
        own, half = (
            build_model(name, num_classes=3, input_shape=shape, seed=0, width=width)
            for width in (None, 4)
        )
    assert own.features[1].conv[1].out_channels == 2 * half.features[1].conv[1].out_channels == 16
    limit = bytes_of(own) // 2
    width = narrow_width(name, num_classes=3, input_shape=shape, max_bytes=limit)
    assert 4 <= width < 8


def test_what_has_no_width_is_refused_and_told_how_to_get_one() -> None:
    def fixed(num_classes: int) -> nn.Module:
        return nn.Linear(64, num_classes)

    def needed(num_classes: int, width: int) -> nn.Module:
        return two_layers(num_classes, width)

    def broken(num_classes: int, width: int = 8) -> nn.Module:
        raise TypeError("no such layer")

    size = {"num_classes": 3, "input_shape": SHAPE}
    for model in (fixed, "torchvision/resnet18", nn.Linear(2, 2)):
        with pytest.raises(ModelError, match=r"fixed width; use one of .* a parameter width"):
            narrow_width(model, **size, max_bytes=9)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="fixed width: give the function a parameter width"):
        built(fixed, 4)
    with pytest.raises(ModelError, match=r"width is fixed; .*parameter width"):
        build_model("torchvision/resnet18", num_classes=3, input_shape=(3, 8, 8), seed=0, width=4)
    with pytest.raises(ModelError, match="needed has a parameter width without a default"):
        build_model(needed, **size, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"broken: no width was found .*of width 1: no such layer"):
        narrow_width(broken, **size, max_bytes=9)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"alike: no width was found .* takes 1100 bytes of"):
        narrow_width(alike, **size, max_bytes=10_000)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"two_layers of width 1 takes 284 bytes; allowed are 9"):
        narrow_width(two_layers, **size, max_bytes=9)  # type: ignore[arg-type]
