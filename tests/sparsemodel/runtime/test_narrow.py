"""Narrower networks: their programs, and that their states are leading slices of the wide one's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from prunelab.networks import build_model, float_state
from sparsemodel.errors import ProgramError
from sparsemodel.layers.from_state import load_state_
from sparsemodel.plans.module import ProgramModule
from sparsemodel.plans.program import program_of
from sparsemodel.runtime.narrow import (
    channels_of,
    leading,
    narrowed,
    narrowed_to,
    output_layer,
    scaled_norms,
)
from sparsemodel.runtime.program import Node, Program
from sparsemodel.runtime.state import SparseState
from sparsemodel.runtime.trainer import Trainer
from sparsemodel.storage.cost import layer_macs

COLOUR = (3, 32, 32)


def network(name: str, width: int | None = None) -> nn.Module:
    return build_model(name, num_classes=10, input_shape=COLOUR, seed=0, width=width)


def state_of(model: nn.Module, *, seed: int = 0) -> SparseState:
    """Its state, norms drawn too, so that nothing is told by ones and zeros."""
    draw = np.random.default_rng(seed)
    return SparseState(
        {
            name: draw.uniform(0.5, 1.5, value.shape).astype(np.float32)
            if value.dim() == 1
            else value.numpy()
            for name, value in float_state(model).items()
        }
    )


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet18"])
def test_a_share_of_the_channels_is_the_network_of_that_width(name: str) -> None:
    """The program is that of the network built so wide, to the last letter."""
    wide = program_of(network(name, 16), COLOUR)
    for rate, width in ((1.0, 16), (0.5, 8), (0.25, 4)):
        built = network(name, width)
        narrow = narrowed(wide, rate)
        assert narrow == program_of(built, COLOUR)
        assert narrow.layer_macs() == layer_macs(
            built, lambda model: model(torch.zeros(1, *COLOUR))
        )
        shapes = {name: tuple(value.shape) for name, value in float_state(built).items()}
        assert narrow.shapes() == shapes


class Flat(nn.Module):
    """Depthwise layers, pools, images flattened with their pixels, hidden linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 10, 3, padding=1, bias=True), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(10, 20, 3, padding=1, groups=10), nn.BatchNorm2d(20), nn.ReLU(),
            nn.AvgPool2d(4), nn.Flatten(), nn.Linear(320, 7), nn.BatchNorm1d(7), nn.ReLU(),
            nn.Linear(7, 10),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        return y


@pytest.mark.parametrize(
    ("name", "rate"),
    [("resnet8", 0.5), ("resnet8", 0.3), ("resnet18", 0.5), ("vgg11_bn", 0.3), ("flat", 0.5)],
)
def test_states_of_narrow_networks_are_leading_slices(name: str, rate: float) -> None:
    """The wide network whose other weights are 0 gives the logits of the narrow one."""
    wide = Flat() if name == "flat" else network(name, None if name == "vgg11_bn" else 8)
    program, state = program_of(wide, COLOUR), state_of(wide)
    narrow = narrowed(program, rate)
    own = leading(state, narrow.shapes())
    blanked = {}
    for key, value in state.values.items():
        assert own.values[key].shape == tuple(narrow.shapes()[key])
        part = tuple(slice(size) for size in own.values[key].shape)
        assert np.array_equal(own.values[key], value[part])
        blanked[key] = np.zeros_like(value) if value.ndim > 1 else value.copy()
        blanked[key][part] = value[part]
    load_state_(wide, SparseState(blanked))
    images = np.random.default_rng(1).random((3, *COLOUR), dtype=np.float32)
    logits = Trainer(narrow, own, batch_size=3).forward(images)
    with torch.no_grad():
        expected = wide.eval()(torch.from_numpy(images)).numpy()
    assert logits.shape == (3, 10)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    numbers = sum(math.prod(shape) for shape in narrow.shapes().values())
    assert numbers < 1.2 * max(rate**2, 0.1) * sum(v.size for v in state.values.values()) + 500


def test_channels_say_it_to_the_layer() -> None:
    """⌈rate · channels⌉ of every layer but the last; what floats add to 0.2 · 15 does not count."""
    program = program_of(network("resnet8", 15), COLOUR)
    channels = channels_of(program, 0.2)
    assert channels[:3] == [3, 3, 3]
    assert channels[-1] == 10
    assert narrowed_to(program, channels) == narrowed(program, 0.2)
    with pytest.raises(ProgramError, match="expected channels of 10 layers, got 2"):
        narrowed_to(program, [1, 2])
    with pytest.raises(ProgramError, match="expected 1 to 15 channels, got 16"):
        narrowed_to(program, [16, *channels[1:]])
    with pytest.raises(ProgramError, match="the network's widths do not nest"):
        narrowed_to(program, [2, *channels[1:]])  # the sum of two results needs as many


def test_networks_whose_widths_do_not_nest_are_refused() -> None:
    grouped = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10),
    )  # fmt: skip
    with pytest.raises(ProgramError, match="its 2 groups of 4 channels do not nest"):
        narrowed(program_of(grouped, COLOUR), 0.5)
    last = Program(
        (4,),
        (Node("input"), Node("conv", (0,), weight="w"), Node("relu", (1,), "end")),
        (("w", (3, 4)),),
    )
    with pytest.raises(ProgramError, match=r"'end'.*expected a layer that gives the logits"):
        output_layer(last)


def test_scaled_norms_train_as_if_their_inputs_were_divided() -> None:
    """x / r in front of each norm, as HeteroFL has it, in float64; evaluation is as before."""
    model, rate = network("resnet8", 4).double(), 0.25
    program = program_of(network("resnet8", 4), COLOUR)
    scaled = ProgramModule(scaled_norms(program, rate)).double()
    scaled.load_state_dict(model.state_dict())
    # Small enough that epsilon is seen.
    with torch.no_grad():
        model.get_parameter("conv1.weight").mul_(1e-3)
        scaled.get_parameter("conv1.weight").mul_(1e-3)
    images = torch.rand(6, *COLOUR, dtype=torch.float64)
    plain = model.train()(images)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0] / rate,))
    expected = model(images)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(scaled.train()(images), expected, rtol=1e-9, atol=1e-9)
    bare = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ProgramError, match=r"'1'.*no batch norm follows it"):
        scaled_norms(program_of(bare, (3, 2, 2)), 0.5)
