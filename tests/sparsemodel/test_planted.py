"""Every criterion finds what was planted for it: a new one needs a case here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_language import llama, texts
from torch import Tensor, nn

from sparsemodel.calibration.blocks import describe
from sparsemodel.calibration.collect import calibrate
from sparsemodel.masks.prune import prune
from sparsemodel.masks.registry import CRITERIA
from sparsemodel.units.registry import UNIT_CRITERIA, needs_of

NAMES = ["0.weight"]
LIVE = [0, 2, 3, 5]  # of six inputs or hidden units; the others are dead, their weights large


def found(name: str, model: nn.Module, *, data: object = None, seed: int = 0) -> Tensor:
    """The mask of the planted layer at the density of what was planted."""
    return prune(
        model, 4 / 6, criterion=name, names=NAMES, data=data, loss=half_square, seed=seed
    )["0.weight"]  # fmt: skip


def half_square(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * model(batch[0]).square().sum()


def layer(size: Tensor) -> nn.Linear:
    """Weights of random signs and these sizes, from .5 to 1 times."""
    made = nn.Linear(size.shape[1], size.shape[0], bias=False)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(size.shape, generator=generator) - 0.5
    with torch.no_grad():
        made.weight.copy_(size * (drawn + 0.5 * drawn.sign()))
    return made


def large_weights(name: str) -> None:
    size = torch.full((4, 6), 0.01)
    size[:, LIVE] = 1.0
    assert torch.equal(found(name, nn.Sequential(layer(size))), size == 1)


def live_inputs(name: str) -> None:
    """Inputs one at a time, so that curvature is diagonal and GraSP's scores are w² > 0."""
    size = torch.full((4, 6), 100.0)
    size[:, LIVE] = 1.0
    model = nn.Sequential(layer(size))
    data = torch.eye(6)[LIVE], torch.arange(4)
    assert torch.equal(found(name, model, data=data), size == 1)
    assert (found("magnitude", model) & (size == 100)).sum() == 8


def live_outputs(name: str) -> None:
    """Hidden units of which no weight leads on."""
    size = torch.full((6, 4), 100.0)
    size[LIVE] = 1.0
    onward = torch.zeros(2, 6)
    onward[:, LIVE] = 1.0
    model = nn.Sequential(layer(size), nn.Linear(6, 2, bias=False))
    with torch.no_grad():
        model.get_parameter("1.weight").copy_(onward)
    assert torch.equal(found(name, model, data=(torch.zeros(1, 4), torch.zeros(1))), size == 1)


def nothing(name: str) -> None:
    """A control: over seeds it finds what was planted as often as any other weight."""
    model = nn.Sequential(layer(torch.ones(4, 6)))
    shares = [found(name, model, seed=seed)[:, LIVE].float().mean() for seed in range(100)]
    assert torch.stack(shares).mean().item() == pytest.approx(4 / 6, abs=0.03)


PLANTED: dict[str, Callable[[str], None]] = {
    "magnitude": large_weights,
    "random": nothing,
    "snip": live_inputs,
    "taylor": live_inputs,
    "grasp": live_inputs,
    "synflow": live_outputs,
    "wanda": live_inputs,
    "gblm": live_inputs,
    "obs": live_inputs,
    "taylor-mixed": live_inputs,
    "dpruner": live_inputs,
}


@pytest.mark.parametrize("name", CRITERIA)
def test_planted_weights_are_found(name: str) -> None:
    assert name in PLANTED, f"plant weights that {name!r} has to find"
    PLANTED[name](name)


def lowest(name: str, model: nn.Module, kind: str, block: str) -> int:
    """The unit of lowest score; there is only one."""
    entry, blocks = UNIT_CRITERIA[name], describe(model)
    seen = calibrate(model, texts(), needs_of([name], blocks), num_heads=4)
    scores = entry.score(model, blocks, seen)
    if kind == "blocks":
        values = torch.cat([scores["blocks", b.name] for b in blocks])
    else:
        values = scores[kind, block]
    assert (values == values.min()).sum() == 1
    return int(values.argmin())


def scaled(model: nn.Module, layers: dict[str, slice], factor: float) -> None:
    with torch.no_grad():
        for name, rows in layers.items():
            model.get_parameter(f"{name}.weight")[rows] *= factor


def dead_units(name: str) -> None:
    """Head 2 and channel 5 give zero; what follows them is as large as ever."""
    model = llama(groups=4)
    block = describe(model)[1]
    scaled(model, {block.value: slice(8, 12), block.up: slice(5, 6)}, 0.0)
    for kind in UNIT_CRITERIA[name].units:
        assert lowest(name, model, kind, block.name) == {"heads": 2, "channels": 5}[kind]


def small_units(name: str) -> None:
    model = llama(groups=4)
    block = describe(model)[1]
    heads = {layer: slice(8, 12) for layer in (block.query, block.key, block.value)}
    scaled(model, {**heads, block.up: slice(5, 6), block.gate: slice(5, 6)}, 0.01)
    assert lowest(name, model, "heads", block.name) == 2
    assert lowest(name, model, "channels", block.name) == 5


def idle_block(name: str) -> None:
    model = llama(layers=3)
    block = describe(model)[1]
    scaled(model, {block.attention_out: slice(None), block.down: slice(None)}, 0.0)
    assert lowest(name, model, "blocks", "") == 1


def silent_dimension(name: str) -> None:
    model = llama()
    norms = [name for block in describe(model) for name in block.norms]
    scaled(model, dict.fromkeys(norms, slice(3, 4)), 0.0)
    assert lowest(name, model, "hidden", "") == 3


def no_unit(name: str) -> None:
    """A control: which unit is lowest differs from block to block."""
    model = llama(layers=8)
    places = {lowest(name, model, "channels", block.name) for block in describe(model)}
    assert len(places) > 3


PLANTED_UNITS: dict[str, Callable[[str], None]] = {
    "wifv": dead_units,
    "ifv": dead_units,
    "wifn": dead_units,
    "amp": dead_units,
    "minitron": dead_units,
    "cfsp": dead_units,
    "magnitude": small_units,
    "random": no_unit,
    "minitron-blocks": idle_block,
    "cfsp-blocks": idle_block,
    "minitron-hidden": silent_dimension,
}


@pytest.mark.parametrize("name", UNIT_CRITERIA)
def test_planted_units_are_found(name: str) -> None:
    assert name in PLANTED_UNITS, f"plant units that {name!r} has to find"
    PLANTED_UNITS[name](name)
