"""Networks: sizes worked by hand, seeds, shapes, blocks, views of the state."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional

from prunelab.errors import ModelError
from prunelab.networks import (
    ADJUSTABLE_WIDTH,
    MODELS,
    build_model,
    check_model,
    float_state,
    is_wholly_exchanged,
    narrow_width,
    parameter_blocks,
)
from sparsemodel.masks.mask import prunable_parameters

CIFAR = (3, 32, 32)
SHAPES = [(1, 8, 8), (3, 8, 8), (1, 28, 28), CIFAR]


def small(seed: int = 0) -> nn.Module:
    return build_model("resnet8", num_classes=3, input_shape=(1, 8, 8), seed=seed, width=2)


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build_model(request.param, num_classes=10, input_shape=CIFAR, seed=0)


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def resnet8_floats(width: int, *, channels: int, num_classes: int) -> int:
    """Floats of resnet8's state: convolutions, 21 w batch-norm channels of 4 values, classifier.

    Stem 9 C w; stage 1 (9 + 9) w²; stage 2 (18 + 36 + 2) w²; stage 3 (72 + 144 + 8) w².
    """
    convolutions = 298 * width**2 + 9 * channels * width
    return convolutions + 4 * 21 * width + 4 * width * num_classes + num_classes


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "size"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)]
)
def test_deep_resnets_have_the_published_sizes_and_two_projections(depth: int, size: int) -> None:
    """Of parameter-free shortcuts; the 1×1 ones add 16 · 32 + 64 and 32 · 64 + 128."""
    model = build_model(f"resnet{depth}", num_classes=10, input_shape=CIFAR, seed=0)
    assert num_parameters(model) == size + 16 * 32 + 64 + 32 * 64 + 128
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == depth - 1 + 2


@pytest.mark.parametrize(("width", "channels", "num_classes"), [(16, 3, 10), (5, 1, 7)])
def test_resnet8_has_the_size_worked_by_hand(width: int, channels: int, num_classes: int) -> None:
    """At w = 16 on CIFAR-10: 78,042 parameters, and 2 · 336 batch-norm statistics."""
    shape = (channels, 32, 32)
    model = build_model("resnet8", num_classes=num_classes, input_shape=shape, seed=0, width=width)
    expected = resnet8_floats(width, channels=channels, num_classes=num_classes)
    assert sum(v.numel() for v in float_state(model).values()) == expected
    assert num_parameters(model) == expected - 2 * 21 * width
    if width == 16:
        assert num_parameters(model) == 78_042


def test_resnet18_has_the_known_numbers_of_weights_and_batch_norm_channels() -> None:
    """11,164,352 convolution and classifier weights; 4,800 batch-norm channels; 10 biases."""
    model = build_model("resnet18", num_classes=10, input_shape=CIFAR, seed=0)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sum(m.weight.numel() for m in layers) == 11_164_352
    means = (v for name, v in float_state(model).items() if name.endswith("running_mean"))
    assert sum(v.numel() for v in means) == 4_800
    assert num_parameters(model) == 11_164_352 + 2 * 4_800 + 10


def test_resnet18_is_torchvisions_but_for_its_stem() -> None:
    """The same state, names and logits; start values of the same spread."""
    from torchvision.models import resnet18  # noqa: PLC0415

    reference = resnet18(num_classes=7)
    reference.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    reference.maxpool = nn.Identity()
    model = build_model("resnet18", num_classes=7, input_shape=CIFAR, seed=0)
    for name, value in reference.state_dict().items():
        if value.dim() == 4 and name != "conv1.weight":
            own = model.get_parameter(name)
            assert own.std().item() == pytest.approx(value.std().item(), rel=0.05)
    reference.load_state_dict(model.state_dict())
    images = torch.randn(3, *CIFAR, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(images), reference(images))  # batch statistics
    torch.testing.assert_close(model.eval()(images), reference.eval()(images))


def test_resnet18_keeps_the_resolution_up_to_its_second_stage() -> None:
    """A stem of stride 1 and no max pool: 32, 32, 16, 8, 4 pixels."""
    model = build_model("resnet18", num_classes=10, input_shape=CIFAR, seed=0).eval()
    sizes: list[int] = []
    for name in ("conv1", "layer1", "layer2", "layer3", "layer4"):
        model.get_submodule(name).register_forward_hook(lambda *a: sizes.append(a[2].shape[-1]))
    model(torch.zeros(1, *CIFAR))
    assert sizes == [32, 32, 16, 8, 4]


def test_vgg11_has_torchvisions_features_and_one_linear_layer() -> None:
    """9 · 1,024,192 weights, three values for each of 2,752 channels, 5,130 in the classifier."""
    from torchvision.models import vgg11_bn  # noqa: PLC0415

    with torch.device("meta"):
        features = vgg11_bn().features
    model = build_model("vgg11_bn", num_classes=10, input_shape=CIFAR, seed=0)
    own = {n: v.shape for n, v in model.state_dict().items() if n.startswith("features.")}
    assert own == {f"features.{n}": v.shape for n, v in features.state_dict().items()}
    pairs = [(3, 64), (64, 128), (128, 256), (256, 256), (256, 512), *[(512, 512)] * 3]
    weights = 9 * sum(a * b for a, b in pairs)
    channels = sum(b for _, b in pairs)
    assert num_parameters(model) == weights + 3 * channels + 512 * 10 + 10 == 9_231_114
    gray = build_model("vgg11_bn", num_classes=10, input_shape=(1, 40, 32), seed=0).eval()
    assert gray(torch.zeros(1, 1, 40, 32)).shape == (1, 10)


def test_no_model_has_dropout(model: nn.Module) -> None:
    assert not any(isinstance(m, nn.Dropout) for m in model.modules())


# --- building ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_decides_every_bit_and_leaves_the_global_stream_alone(name: str) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = build_model(name, num_classes=10, input_shape=CIFAR, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(321)
    again = build_model(name, num_classes=10, input_shape=CIFAR, seed=7).state_dict()
    assert list(again) == list(first.state_dict())
    assert all(torch.equal(v, again[n]) for n, v in first.state_dict().items())


def test_seeds_give_different_weights() -> None:
    one, two = float_state(small(0)), float_state(small(1))
    assert not torch.equal(one["layer1.0.conv1.weight"], two["layer1.0.conv1.weight"])
    assert not torch.equal(one["fc.weight"], two["fc.weight"])


@pytest.mark.parametrize("name", ADJUSTABLE_WIDTH)
@pytest.mark.parametrize("shape", SHAPES)
def test_images_of_all_sizes_and_batches_of_one_fit(name: str, shape: tuple[int, int, int]) -> None:
    model = build_model(name, num_classes=4, input_shape=shape, seed=0, width=3)
    assert model.eval()(torch.zeros(1, *shape)).shape == (1, 4)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    logits = model.train()(images)
    logits.sum().backward()
    assert logits.shape == (2, 4)
    assert all(p.grad is not None for p in model.parameters())


def test_resnet_computes_what_the_paper_says() -> None:
    """Every block by hand: relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)); mean over pixels."""
    model = small().double().eval()
    generator = torch.Generator().manual_seed(1)
    state = model.state_dict()
    for name, value in state.items():  # trained-like statistics, so that none is an identity
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator, dtype=torch.float64) - 0.3)
        if name.endswith("running_var"):
            value.abs_().add_(0.1)

    def bn(x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias, mean, var = (
            state[f"{name}.{key}"].reshape(1, -1, 1, 1)
            for key in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv(x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        weight = state[f"{name}.weight"]
        return functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    images = torch.randn(2, 1, 8, 8, generator=generator, dtype=torch.float64)
    x = bn(conv(images, "conv1"), "bn1").clamp(min=0)
    for stage, stride in (("layer1.0", 1), ("layer2.0", 2), ("layer3.0", 2)):
        y = bn(conv(x, f"{stage}.conv1", stride), f"{stage}.bn1").clamp(min=0)
        y = bn(conv(y, f"{stage}.conv2"), f"{stage}.bn2")
        if stride == 2:
            x = bn(conv(x, f"{stage}.downsample.0", 2), f"{stage}.downsample.1")
        x = (y + x).clamp(min=0)
    logits = x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(model(images), logits)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("resnet9", {}, "resnet8, resnet20, .*, resnet18, vgg11_bn"),
        ("vgg11_bn", {"width": 16}, "fixed width"),
        ("vgg11_bn", {"input_shape": (3, 32, 31)}, "32×31"),
        ("resnet8", {"width": 0}, "width must be at least 1, got 0"),
        ("resnet8", {"num_classes": 0}, "classes must be at least 1"),
        ("resnet8", {"input_shape": (0, 8, 8)}, "channels must be at least 1"),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, change: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {"num_classes": 10, "input_shape": CIFAR, "seed": 0, **change}
    with pytest.raises(ModelError, match=words):
        build_model(name, **arguments)  # type: ignore[arg-type]


def test_check_model_knows_the_names() -> None:
    for name in MODELS:
        check_model(name)
    with pytest.raises(ModelError, match="resnet8, resnet20"):
        check_model("")


# --- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["layer", "block", "entire"])
def test_every_prunable_name_is_in_one_block_in_order(model: nn.Module, granularity: str) -> None:
    blocks = parameter_blocks(model, granularity=granularity)
    assert [name for block in blocks for name in block] == list(prunable_parameters(model))
    assert all(blocks)


def test_layer_and_entire_are_the_two_ends() -> None:
    names = list(prunable_parameters(small()))
    assert parameter_blocks(small(), granularity="layer") == [[name] for name in names]
    assert parameter_blocks(small(), granularity="entire") == [names]


@pytest.mark.parametrize(
    ("name", "sizes", "ends"),
    [
        # A stage of resnet20 has six convolutions and, from the second on, a shortcut.
        ("resnet20", [6, 7, 8], ["layer1.2.conv2", "layer2.2.conv2", "fc"]),
        (
            "resnet18",
            [4, 5, 5, 6],
            ["layer1.1.conv2", "layer2.1.conv2", "layer3.1.conv2", "fc"],
        ),
        # Convolutions 64 | 128 | 256 256 | 512 512 | 512 512 | classifier; the first is the stem.
        (
            "vgg11_bn",
            [1, 2, 2, 2, 1],
            ["features.4", "features.11", "features.18", "features.25", "classifier"],
        ),
    ],
)
def test_blocks_are_the_stages(name: str, sizes: list[int], ends: list[str]) -> None:
    with torch.device("meta"):
        model = MODELS[name](10, CIFAR, None)
    blocks = parameter_blocks(model, granularity="block")
    assert [len(block) for block in blocks] == sizes
    assert [block[-1] for block in blocks] == [f"{end}.weight" for end in ends]


def test_unknown_granularity_is_refused() -> None:
    with pytest.raises(ModelError, match="layer, block or entire; got 'stage'"):
        parameter_blocks(small(), granularity="stage")


@pytest.mark.parametrize(
    ("model", "blocks"),
    [
        # The stem apart; the last layer goes with the block before it.
        (
            nn.Sequential(
                OrderedDict(
                    stem=nn.Conv2d(1, 2, 3),
                    first=nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)),
                    second=nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)),
                    head=nn.Linear(2, 2),
                )
            ),
            [
                ["first.0.weight", "first.1.weight"],
                ["second.0.weight", "second.1.weight", "head.weight"],
            ],
        ),
        # All in one child: its children count.
        (
            nn.Sequential(OrderedDict(body=nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(4))))),
            [["body.1.weight"], ["body.2.weight", "body.3.weight"]],
        ),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), [["1.weight"]]),
        (nn.Linear(2, 2), [["weight"]]),
    ],
)
def test_blocks_of_other_networks_are_their_children(
    model: nn.Module, blocks: list[list[str]]
) -> None:
    assert parameter_blocks(model, granularity="block") == blocks


# --- state ---------------------------------------------------------------------------------------


def test_float_state_is_a_copy_without_counters() -> None:
    model = small()
    state = float_state(model)
    counters = {name for name in model.state_dict() if name.endswith("num_batches_tracked")}
    assert len(counters) == 9
    assert list(state) == [name for name in model.state_dict() if name not in counters]
    for value in state.values():
        value.fill_(9)
        assert not value.requires_grad
    assert not any((value == 9).all() for value in float_state(model).values())


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = torch.arange(3)  # neither parameter nor buffer


def test_what_is_exchanged_is_what_is_trained() -> None:
    """An adapter on a frozen layer: a node that draws no weights would train on another layer."""
    base, adapter = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
    model = nn.Sequential(base, nn.BatchNorm1d(2), adapter)
    assert [name for name in float_state(model) if name.startswith("0.")] == []
    assert {"1.running_mean", "2.weight", "2.bias"} < set(float_state(model))
    assert not is_wholly_exchanged(model)
    assert is_wholly_exchanged(model.requires_grad_(True))
    adapter.weight = base.weight
    assert "2.weight" not in float_state(model)
    assert is_wholly_exchanged(model)
    assert not is_wholly_exchanged(nn.Sequential(adapter, Table()))
    assert all(is_wholly_exchanged(small(seed)) for seed in range(2))


# --- equal bytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 7, 16, 33])
def test_narrow_width_is_the_largest_that_fits(width: int) -> None:
    size = 4 * resnet8_floats(width, channels=1, num_classes=10)
    for spare, expected in ((0, width), (1, width), (-1, width - 1)):
        if expected:
            found = narrow_width(
                "resnet8", num_classes=10, input_shape=(1, 8, 8), max_bytes=size + spare
            )
            assert found == expected


def test_narrow_width_refuses_what_cannot_be() -> None:
    """Width 1 on gray images with 10 classes: 298 + 9 + 84 + 40 + 10 = 441 floats, 1,764 bytes."""
    with pytest.raises(ModelError, match="takes 1764 bytes; allowed are 1763"):
        narrow_width("resnet8", num_classes=10, input_shape=(1, 8, 8), max_bytes=1763)
    with pytest.raises(ModelError, match="fixed width; use one of resnet8, resnet20"):
        narrow_width("vgg11_bn", num_classes=10, input_shape=CIFAR, max_bytes=10**9)
    with pytest.raises(ModelError, match="a narrower network is asked for, and mine has a fixed"):
        narrow_width("mine", num_classes=10, input_shape=CIFAR, max_bytes=10**9)


def test_narrow_width_draws_nothing_and_holds_no_large_model() -> None:
    """298 w² floats fill 10¹³ bytes near w = 91,593: a model that no machine here could hold."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    width = narrow_width("resnet8", num_classes=10, input_shape=CIFAR, max_bytes=10**13)
    assert torch.equal(torch.get_rng_state(), before)
    assert 4 * resnet8_floats(width, channels=3, num_classes=10) <= 10**13
    assert 4 * resnet8_floats(width + 1, channels=3, num_classes=10) > 10**13


def test_a_parameter_of_another_name_is_not_guessed() -> None:
    with pytest.raises(ModelError, match=r"parameters \['classes'\] \(did you mean 'num_classes'"):
        build_model(lambda classes: nn.Linear(4, classes), num_classes=3, input_shape=(4,), seed=7)


def test_samples_without_classes_have_no_number_of_them_to_give() -> None:
    def net(num_classes: int) -> nn.Module:
        return nn.Linear(4, num_classes)

    with pytest.raises(ModelError, match="asks for num_classes, which these samples do not have"):
        build_model(net, num_classes=None, input_shape=(4,), seed=0)


def test_lazy_layers_learn_their_sizes_from_the_samples() -> None:
    def lazy(num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(num_classes))

    models = [build_model(lazy, num_classes=3, input_shape=(1, 4, 4), seed=0) for _ in range(2)]
    assert models[0].training
    assert tuple(models[0][1].weight.shape) == (8, 16)
    assert torch.equal(models[0][3].weight, models[1][3].weight)
    given = build_model(lazy(3), num_classes=3, input_shape=(1, 4, 4), seed=0)
    assert tuple(given[3].weight.shape) == (3, 8)
    with pytest.raises(ModelError, match="lazy layers: run it once on a batch"):
        build_model(lazy, num_classes=3, input_shape=None, seed=0)
