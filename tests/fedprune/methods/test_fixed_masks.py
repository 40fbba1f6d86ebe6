"""Masks chosen once by the server: criteria against float64 references, densities, runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import digest, run_inline, tiny
from light import run_light
from torch import nn
from torch.nn import functional

from fedprune.errors import ConfigError
from fedprune.exchange.messages import Reply, Request
from fedprune.methods import METHODS
from fedprune.methods.base import Start
from fedprune.methods.fixed_mask import FixedMask, largest
from fedprune.rounds.folder import read_metrics, read_model
from fedprune.rounds.setup import Setup
from fedprune.rounds.workspace import Workspace, open_workspace
from prunelab.data.batches import Preprocessing
from prunelab.data.samples import stored
from sparsemodel.errors import DensityError
from sparsemodel.layers.from_state import load_state_
from sparsemodel.masks.distribution import (
    erk,
    erk_conv,
    global_ranking,
    minimum_threshold,
    uniform,
)
from sparsemodel.runtime.pattern import Patterns

SCORED = ("magnitude", "snip", "grasp", "synflow")
CHOSEN = (*SCORED, "random")
Scores = dict[str, np.ndarray[Any, np.dtype[np.float64]]]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Setup]:
    """What a run starts from: 200 labelled samples on the server, in two batches of a criterion."""
    config = tiny(method__name="snip", data__num_train=500, server__per_class=20)
    folder = tmp_path_factory.mktemp("setup")
    workspace = open_workspace(config)
    workspace.lay_out(folder, with_start=True)
    return workspace, Setup(config, folder)


def server_of(setup: Setup, *, seed: int = 7) -> Start:
    def nobody(request: Request) -> Iterator[tuple[int, Reply]]:
        raise AssertionError("clients have no part in it")

    return Start(
        setup.start_state, setup.prunable, setup.blocks, nobody, 4, seed, place=setup.place
    )


def method_of(name: str, **settings: Any) -> FixedMask:
    method = METHODS[name](**settings)
    assert isinstance(method, FixedMask)
    return method


# --- what the server has -----------------------------------------------------------------------


def test_the_server_s_samples_are_its_own(work: tuple[Workspace, Setup]) -> None:
    workspace, setup = work
    place = setup.place()
    inputs, targets = stored(workspace.dataset.train)
    rows = workspace.server_indices
    assert len(rows) == 200
    assert np.array_equal(place.data.train.inputs, inputs[rows])
    assert np.array_equal(place.data.train.targets, targets[rows])
    assert len(place.data.dev) == len(place.data.test) == 0
    assert not set(rows) & set(np.concatenate(workspace.shares))
    assert place.client not in range(setup.config.data.clients)


# --- the criteria, written once more -----------------------------------------------------------


def start_model(setup: Setup) -> nn.Module:
    model: nn.Module = setup.network.build()
    load_state_(model, setup.start_state())
    return model.double().train()


def batches(setup: Setup) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every second sample, and the others: 200 are more than a criterion takes at once."""
    data = setup.place().data.train
    inputs = torch.from_numpy(Preprocessing().apply(data.inputs)).double()
    targets = torch.from_numpy(data.targets)
    return [(inputs[part::2], targets[part::2]) for part in (0, 1)]


def gradient_of(
    model: nn.Module, names: list[str], batch: Any, temperature: float = 1.0
) -> list[torch.Tensor]:
    loss = functional.cross_entropy(model(batch[0]) / temperature, batch[1])
    return list(torch.autograd.grad(loss, [model.get_parameter(name) for name in names]))


def snip_by_hand(setup: Setup) -> Scores:
    model, names = start_model(setup), list(setup.prunable)
    scores = {name: np.zeros(shape) for name, shape in setup.prunable.items()}
    for batch in batches(setup):
        for name, gradient in zip(names, gradient_of(model, names, batch), strict=True):
            scores[name] += (gradient * model.get_parameter(name)).abs().detach().numpy() / 2
    return scores


def grasp_by_hand(setup: Setup) -> Scores:
    """w (H g) with H g by central differences along g, so near that no ReLU changes its side."""
    names = list(setup.prunable)
    scores = {name: np.zeros(shape) for name, shape in setup.prunable.items()}
    for batch in batches(setup):
        model = start_model(setup)
        weights = [model.get_parameter(name) for name in names]
        along = gradient_of(model, names, batch, 200.0)
        length = float(torch.stack([(g**2).sum() for g in along]).sum()) ** 0.5
        sides = []
        for step in (1e-8 / length, -2e-8 / length):
            with torch.no_grad():
                for weight, g in zip(weights, along, strict=True):
                    weight.add_(step * g)
            sides.append(gradient_of(model, names, batch, 200.0))
        load_state_(model, setup.start_state())
        for name, weight, up, down in zip(names, weights, *sides, strict=True):
            product = (up - down) * length / 2e-8
            scores[name] += (weight * product).detach().numpy() / 2
    return scores


@pytest.mark.parametrize(("name", "by_hand"), [("snip", snip_by_hand), ("grasp", grasp_by_hand)])
def test_the_mask_is_that_of_the_published_scores(
    name: str, by_hand: Callable[[Setup], Scores], work: tuple[Workspace, Setup]
) -> None:
    """In train mode, at the start, over the server's samples; ranked over the whole network."""
    setup = work[1]
    patterns = method_of(name, density=0.2).mask(server_of(setup))
    scores = by_hand(setup)
    flat = np.concatenate([score.reshape(-1) for score in scores.values()])
    kept = round(0.2 * len(flat))
    threshold = np.sort(flat)[-kept]
    assert patterns.num_active == kept
    odd = [
        scores[name].reshape(-1)[at]
        for name, pattern in patterns.items()
        for at in np.setxor1d(pattern.positions(), np.flatnonzero(scores[name] >= threshold))
    ]
    # Only what float32 cannot tell from the threshold.
    assert len(odd) <= kept // 50
    np.testing.assert_allclose(odd, threshold, rtol=0.02)


def test_synflow_goes_down_in_a_hundred_steps(work: tuple[Workspace, Setup]) -> None:
    """Algorithm 1 once more: all parameters positive, an input of ones, batch norms as trained."""
    setup = work[1]
    patterns = method_of("synflow", density=0.1).mask(server_of(setup))
    model = start_model(setup).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    weights = {name: model.get_parameter(name) for name in setup.prunable}
    size = sum(weight.numel() for weight in weights.values())
    alive = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    for step in range(1, 101):
        flow = model(torch.ones(1, *setup.data.input_shape, dtype=torch.float64)).sum()
        gradients = torch.autograd.grad(flow, list(weights.values()))
        scores = {
            name: torch.where(alive[name], weight.detach() * gradient, -1)
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
        flat = torch.cat([score.reshape(-1) for score in scores.values()])
        threshold = flat.sort(descending=True).values[round(0.1 ** (step / 100) * size) - 1]
        with torch.no_grad():
            for name, weight in weights.items():
                alive[name] = scores[name] >= threshold
                weight.mul_(alive[name])
    found = {name: np.flatnonzero(mask.reshape(-1).numpy()) for name, mask in alive.items()}
    odd = sum(len(np.setxor1d(found[name], patterns[name].positions())) for name in found)
    assert odd <= patterns.num_active // 100


def test_synflow_needs_no_samples(work: tuple[Workspace, Setup]) -> None:
    """Others' labels change nothing."""
    setup = work[1]
    server = server_of(setup)
    place = setup.place()
    place.data.train.targets[:] = 0
    place.data.train.inputs[:] = 0
    blank = Start(
        server.state, server.prunable, server.blocks, server.ask, 4, 7, place=lambda: place
    )
    for name, same in (("synflow", True), ("snip", False)):
        masks = [method_of(name, density=0.1).mask(each) for each in (server, blank)]
        assert (masks[0] == masks[1]) == same


def test_a_random_mask_is_drawn_by_the_seed(work: tuple[Workspace, Setup]) -> None:
    setup, method = work[1], method_of("random", density=0.1)
    first, again, other = (method.mask(server_of(setup, seed=seed)) for seed in (7, 7, 8))
    assert first == again
    magnitude = method_of("magnitude", density=0.1).mask(server_of(setup))
    for one in (other, magnitude):
        both = sum(len(np.intersect1d(first[n].positions(), one[n].positions())) for n in first)
        assert both / first.num_active == pytest.approx(0.1, abs=0.05)


# --- densities ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize(
    ("distribution", "counts"), [("uniform", uniform), ("erk", erk), ("erk-conv", erk_conv)]
)
def test_layers_keep_what_the_distribution_says(
    name: str, distribution: str, counts: Any, work: tuple[Workspace, Setup]
) -> None:
    setup = work[1]
    method = method_of(name, density=0.1, distribution=distribution)
    assert method.mask(server_of(setup)).counts() == counts(setup.prunable, 0.1)


def test_masks_of_the_start_alone_need_no_torch() -> None:
    code = """
import numpy as np
from fedprune.methods import Magnitude, RandomMask, Start
from sparsemodel.runtime.state import SparseState
state = SparseState({"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(4)})
start = Start(lambda: state, {"a": (3, 4), "b": (4,)}, {}, None, 1, 0)
for method in (Magnitude(0.5), Magnitude(0.5, "erk"), Magnitude(0.5, "global"), RandomMask(0.5)):
    print(method.start(start).model.patterns.num_active)
"""
    done = run_light("-c", code)
    assert done.stdout.split() == ["8"] * 4, done.stderr


def test_magnitudes_ranked_over_the_whole_network(work: tuple[Workspace, Setup]) -> None:
    setup = work[1]
    values = setup.start_state().values
    scores = {name: np.abs(values[name]) for name in setup.prunable}
    patterns = method_of("magnitude", density=0.1, distribution="global").mask(server_of(setup))
    assert patterns.counts() == global_ranking(scores, 0.1)
    kept = {n: scores[n].reshape(-1)[p.positions()].min() for n, p in patterns.items()}
    left = {
        n: np.delete(scores[n].reshape(-1), p.positions()).max()
        for n, p in patterns.items()
        if p.num_active < p.num_weights
    }
    assert min(kept.values()) >= max(left.values())


def test_a_ranking_with_a_minimum(work: tuple[Workspace, Setup]) -> None:
    """A criterion that reads data and one that does not; every layer keeps a share of all."""
    setup = work[1]
    values = setup.start_state().values
    scores = {name: np.abs(values[name]) for name in setup.prunable}
    chosen: dict[str, Any] = {"density": 0.01, "distribution": "global-minimum"}
    counts = method_of("magnitude", **chosen).mask(server_of(setup)).counts()
    assert counts == minimum_threshold(scores, 0.01)
    sizes = {name: int(np.prod(shape)) for name, shape in setup.prunable.items()}
    least = round(0.0005 * sum(sizes.values()))
    counts = method_of("snip", **chosen).mask(server_of(setup)).counts()
    assert all(count >= min(least, sizes[name]) for name, count in counts.items())
    assert sum(counts.values()) == round(0.01 * sum(sizes.values()))


@pytest.mark.parametrize("name", CHOSEN)
def test_no_layer_loses_all_its_weights(name: str, work: tuple[Workspace, Setup]) -> None:
    """At one weight a layer, the lowest density that there is; below it none."""
    setup = work[1]
    layers = len(setup.prunable)
    size = sum(int(np.prod(shape)) for shape in setup.prunable.values())
    patterns = method_of(name, density=layers / size).mask(server_of(setup))
    assert set(patterns.counts().values()) == {1}
    with pytest.raises(DensityError, match="fewer than the"):
        method_of(name, density=0.4 * layers / size).mask(server_of(setup))


def test_a_collapsing_layer_keeps_its_best() -> None:
    """All the large scores are in one layer."""
    scores = {"a": np.float32([9, 8, 7, 6]), "b": np.float32([0, 3]), "c": np.float32([1, 2, 0])}
    assert {n: p.positions().tolist() for n, p in largest(scores, 5 / 9, "global").items()} == {
        "a": [0, 1, 2],
        "b": [1],
        "c": [1],
    }


@pytest.mark.parametrize("name", [*CHOSEN, "ssfl", "fedprox"])
def test_distributions_by_their_sources(name: str) -> None:
    expected = "uniform" if name in {"random", "magnitude", "fedprox"} else "global"
    assert method_of(name).distribution == expected
    with pytest.raises(ConfigError, match=r"method.distribution: expected one of uniform, erk"):
        METHODS[name](distribution="noise")  # type: ignore[call-arg]


def test_a_random_ranking_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected one of uniform, erk, erk-conv; got 'global'"):
        method_of("random", distribution="global")


def test_a_temperature_is_positive() -> None:
    for temperature in (0.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=r"method.temperature"):
            method_of("grasp", temperature=temperature)


# --- runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["random", "snip", "grasp", "synflow"])
def test_a_run_keeps_its_mask_and_has_the_same_bits_twice(name: str, tmp_path: Path) -> None:
    config = tiny(
        method__name=name, training__rounds=2, data__num_train=160, data__clients=2,
    )  # fmt: skip
    first, second = (run_inline(config, tmp_path / folder) for folder in ("one", "two"))
    assert digest(first) == digest(second)
    lines = read_metrics(first)
    assert [line["density"] for line in lines] == [lines[0]["density"]] * 3
    assert lines[0]["density"] == pytest.approx(0.2, rel=0.01)
    assert [line["adjusted"] for line in lines[1:]] == [[], []]
    patterns = mask_of(first)
    assert patterns.densities() == lines[0]["layer_densities"]


def mask_of(out: Path) -> Patterns:
    patterns = read_model(out)[0].patterns
    assert patterns is not None
    return patterns


def test_fedprox_without_its_term_is_the_magnitude_mask_of_any_densities(tmp_path: Path) -> None:
    digests = []
    for name in ("magnitude", "fedprox"):
        config = tiny(
            method__name=name, method__distribution="erk", method__mu=0.0, training__rounds=1,
            data__num_train=160, data__clients=2,
        )  # fmt: skip
        digests.append(mask_digest(run_inline(config, tmp_path / name)))
    assert digests[0] == digests[1]


def mask_digest(out: Path) -> tuple[str, bytes]:
    state = read_model(out)[0]
    assert state.patterns is not None
    return state.patterns.digest(), b"".join(v.tobytes() for v in state.values.values())
