"""A program as a torch module computes what the network does that it was made of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunelab.networks import build_model
from sparsemodel.errors import PlanError
from sparsemodel.plans.module import ProgramModule
from sparsemodel.plans.program import program_of

IMAGE = (3, 32, 32)


def pools() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, dilation=2, padding=1), nn.ReLU(),
        nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 2, 1, count_include_pad=False),
        nn.BatchNorm2d(4, affine=False, track_running_stats=False), nn.Flatten(),
        nn.Linear(100, 6), nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 10, bias=False),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["resnet8", "pools"])
def test_values_gradients_and_statistics_are_the_networks(name: str) -> None:
    model = (
        pools() if name == "pools" else build_model(name, num_classes=10, input_shape=IMAGE, seed=0)
    )
    module = ProgramModule(program_of(model, IMAGE))
    module.load_state_dict(model.state_dict())
    images = torch.rand(4, *IMAGE)
    for training in (True, False):
        expected, logits = model.train(training)(images), module.train(training)(images)
        assert torch.equal(logits, expected)
    model.train()(images).square().sum().backward()
    module.train()(images).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert torch.equal(module.get_parameter(key).grad, parameter.grad)
    for key, buffer in model.named_buffers():
        assert torch.equal(module.get_buffer(key), buffer)


def test_a_layer_without_a_path_is_refused() -> None:
    program = program_of(nn.Linear(5, 3), (5,))
    with pytest.raises(PlanError, match="'weight' is of no module"):
        ProgramModule(program)
