"""Costs against hand counts, torch's own counter and the known sizes of ResNet18."""

import copy

import hypothesis.strategies as st
import pytest
import torch
import torchvision
from hypothesis import given, settings
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparsemodel.errors import MaskError
from sparsemodel.masks.mask import Mask
from sparsemodel.storage.cost import layer_macs, model_bytes


def counted_by_torch(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *input_shape))
    return int(counter.get_total_flops())


def resnet18() -> nn.Module:
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def test_macs_by_hand() -> None:
    """Convolution 3 to 8, 3x3, stride 2 on 9x9: 4x4 outputs of 8 · 27 = 3456 products.

    Grouped 8 to 8 in 4 groups, dilated 2 on 4x4 padded 2: 4x4 outputs of 8 · 2 · 9 = 2304.
    Linear 128 to 5: 640.
    """
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.Conv2d(8, 8, 3, groups=4, padding=2, dilation=2),
        nn.Flatten(),
        nn.Linear(128, 5),
    )
    macs = layer_macs(model, (3, 9, 9))
    assert macs == {"0.weight": 3456, "1.weight": 2304, "3.weight": 640}
    assert 2 * sum(macs.values()) == 2 * 6400 == counted_by_torch(model, (3, 9, 9))


def test_a_layer_that_runs_twice_counts_twice_and_an_unused_one_not() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(3, 3)
            self.unused = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.used(self.used(x))
            return y

    assert layer_macs(Twice(), (3,)) == {"used.weight": 18, "unused.weight": 0}


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.booleans(),
    st.fixed_dictionaries(
        {
            "kernel_size": st.integers(1, 3),
            "groups": st.sampled_from([1, 2]),
            "stride": st.integers(1, 2),
            "padding": st.integers(0, 2),
            "dilation": st.integers(1, 2),
        }
    ),
)
def test_convolutions_agree_with_torch(
    dims: int, transposed: bool, options: dict[str, int]
) -> None:
    kinds = {
        (1, False): nn.Conv1d,
        (2, False): nn.Conv2d,
        (3, False): nn.Conv3d,
        (1, True): nn.ConvTranspose1d,
        (2, True): nn.ConvTranspose2d,
        (3, True): nn.ConvTranspose3d,
    }
    layer = kinds[dims, transposed](4, 6, **options)
    shape = (4, *[7] * dims)
    assert 2 * sum(layer_macs(layer, shape).values()) == counted_by_torch(layer, shape)


def test_resnet18_with_a_cifar_stem_has_its_known_sizes() -> None:
    """11,164,352 weights of 4 bytes, 10 biases, and 4,800 channels of 4 batch-norm values."""
    model = resnet18()
    macs = layer_macs(model, (3, 32, 32))
    weights = {name: model.get_parameter(name) for name in macs}
    assert sum(p.numel() for p in weights.values()) == 11_164_352
    assert model_bytes(model) == 4 * (11_164_352 + 10 + 4 * 4_800)
    assert 2 * sum(macs.values()) == counted_by_torch(model, (3, 32, 32))
    empty = Mask({name: torch.zeros(p.shape, dtype=torch.bool) for name, p in weights.items()})
    assert model_bytes(model, mask=empty) == 4 * (10 + 4 * 4_800)


def test_a_model_in_train_mode_runs_on_a_single_sample() -> None:
    """In train mode batch norm refuses a batch of one value per channel."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).train()
    assert layer_macs(model, (3,)) == {"0.weight": 6}


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train()
    state = copy.deepcopy(model.state_dict())
    layer_macs(model, (1, 4, 4))
    assert model.training
    assert model[1].training
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert not any(module._forward_hooks for module in model.modules())


def test_masks_that_do_not_fit_are_refused() -> None:
    model = nn.Linear(3, 2)
    for name, shape in (("x", (1,)), ("weight", (3, 2))):
        mask = Mask({name: torch.ones(shape, dtype=torch.bool)})
        with pytest.raises(MaskError, match="the model's parameter has shape"):
            model_bytes(model, mask=mask)
