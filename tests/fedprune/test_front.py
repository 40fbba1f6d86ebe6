"""fedprune.run with networks, data and methods of the caller's own, and with what is none."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import fedprune
from fedprune.exchange.pooled import Pooled
from fedprune.front import Result
from fedprune.given import given_dataset, name_dataset
from fedprune.methods.base import RunState
from prunelab.data.datasets import ImageSet, fingerprint
from prunelab.errors import DataWarning
from prunelab.runs.settings import OR_ELSEWHERE

IMAGES = np.random.default_rng(0).integers(0, 256, (60, 1, 4, 4), dtype=np.uint8)
LABELS = np.arange(60) % 3
SETTINGS = {"server.per_class": 1, "data.partition": "iid"}


def network(num_classes: int = 3, hidden: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
    )


class Networks:
    @classmethod
    def build(cls, num_classes: int) -> nn.Module:
        return network(num_classes)


@dataclass(frozen=True)
class Half(fedprune.Method):
    """Federated averaging that goes a part of the way."""

    name: ClassVar[str] = "half"
    part: float = 0.5

    def update(self, state: RunState, pooled: Pooled) -> RunState:
        old, mean = state.model.values, pooled.model
        moved = {name: old[name] + self.part * (v - old[name]) for name, v in mean.values.items()}
        return super().update(state, pooled.with_model(mean.replace(moved)))


@dataclass(frozen=True)
class Stopped(fedprune.Method):
    """Is interrupted once, in its second round."""

    name: ClassVar[str] = "stopped"
    rounds_left: ClassVar[list[int]] = []

    def update(self, state: RunState, pooled: Pooled) -> RunState:
        if self.rounds_left and self.rounds_left.pop() == 0:
            raise KeyboardInterrupt
        return super().update(state, pooled)


class Plain(fedprune.Method):
    part: float = 0.5


@dataclass(frozen=True)
class Nameless(fedprune.Method):
    part: float = 0.5


def run(folder: Path, **given: Any) -> Result:
    given = {"model": network, "data": (IMAGES, LABELS), "method": "fedavg", "rounds": 1} | given
    settings = {**SETTINGS, **given.pop("settings", {})}
    return fedprune.run(folder=folder, settings=settings, clients=given.pop("clients", 2), **given)


@pytest.mark.parametrize(
    "model",
    [network, lambda: network(hidden=5), network(), Networks.build, f"{__name__}:network"],
    ids=["function", "lambda", "network", "class method", "module:function"],
)
def test_a_network_in_any_form(model: Any, tmp_path: Path) -> None:
    """And a folder with a space in its name."""
    result = run(tmp_path / "a run", model=model, method=fedprune.FedTiny(density=0.3))
    assert result.model(torch.zeros(2, 1, 4, 4)).shape == (2, 3)
    assert not result.model.training
    assert result.report.is_file()
    assert result.state.patterns is not None


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint64])
def test_labels_of_any_whole_type(dtype: Any, tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    same = run(tmp_path / "same", data=(IMAGES, LABELS.astype(dtype)))
    assert plain.model[1].weight.equal(same.model[1].weight)


def test_images_of_double_precision_are_taken_as_single(tmp_path: Path) -> None:
    double = run(tmp_path / "double", data=(IMAGES / 255.0, LABELS))
    single = run(tmp_path / "single", data=((IMAGES / 255.0).astype(np.float32), LABELS))
    assert double.model[1].weight.equal(single.model[1].weight)


def test_a_class_that_the_test_side_lacks(tmp_path: Path) -> None:
    data = {"train": (IMAGES, LABELS), "test": (IMAGES[LABELS < 2], LABELS[LABELS < 2])}
    assert run(tmp_path / "run", data=data).model[3].out_features == 3


def test_a_client_of_one_sample_is_left_out_where_there_is_batch_norm(tmp_path: Path) -> None:
    images, labels = torch.from_numpy(IMAGES), torch.from_numpy(LABELS)
    groups = torch.tensor([1] * 9 + [0] + [1] * 20 + [2] * 30)
    mark = fingerprint(images, labels)
    data = ImageSet("own", images, labels, images, labels, 3, mark, train_groups=groups)

    def normed(num_classes: int) -> nn.Module:
        layers = [nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, num_classes)]
        return nn.Sequential(*layers)

    for model, expected in ((normed, ["batch norm needs at least 2"]), (network, [])):
        result = run(
            tmp_path / str(len(expected)), data=data, model=model, clients=3,
            settings={"data.partition": "natural"},
        )  # fmt: skip
        skipped = [entry for line in result.metrics for entry in line.get("skipped", [])]
        assert [entry["reason"].partition("; ")[2] for entry in skipped] == expected


def natural(tmp_path: Path, given: list[int], *, clients: int, **settings: Any) -> list[str]:
    """What is said of a run on data of these natural clients."""
    images, labels = torch.from_numpy(IMAGES), torch.from_numpy(LABELS)
    data = ImageSet("own", images, labels, images, labels, train_groups=torch.tensor(given))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run(tmp_path / "run", data=data, clients=clients, settings=settings)
    return [str(warning.message) for warning in seen if warning.category is DataWarning]


def test_clients_of_the_data_that_are_not_the_runs_are_mentioned(tmp_path: Path) -> None:
    groups = [0, 1, 2, 3] * 15
    ways = {"data.partition": "natural"}
    assert natural(tmp_path / "same", groups, clients=4, **ways) == []
    (line,) = natural(tmp_path / "fewer", groups, clients=3, **ways)
    assert line.startswith("4 natural clients are dealt to data.clients = 3, several to each; set")
    (line,) = natural(tmp_path / "iid", groups, clients=4)
    assert "(4 natural clients), but are divided among 4 by data.partition = 'iid'" in line
    with pytest.raises(ValueError, match=r"only 4 natural groups; set data\.clients to 4 "):
        natural(tmp_path / "more", groups, clients=5, **ways)


class Own(nn.Module):
    """A network whose class builds it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(16, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.flatten(1))


def test_a_class_builds_the_network_wherever_it_was_defined(tmp_path: Path) -> None:
    class Inner(Own):
        pass

    outer, inner = run(tmp_path / "outer", model=Own), run(tmp_path / "inner", model=Inner)
    assert outer.model.linear.weight.equal(inner.model.linear.weight)


def test_clients_compute_in_single_precision_whatever_the_network_came_in(tmp_path: Path) -> None:
    torch.manual_seed(0)
    single = network()
    double = copy.deepcopy(single).double()
    expected = run(tmp_path / "single", model=single).model[1].weight
    assert run(tmp_path / "double", model=double).model[1].weight.equal(expected)
    assert double[1].weight.dtype == torch.float64
    torch.set_default_dtype(torch.float64)
    try:
        found = run(tmp_path / "default", model=single, data=(IMAGES, LABELS)).model[1].weight
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.equal(expected)


def test_a_method_of_a_script(tmp_path: Path) -> None:
    result = run(tmp_path / "object", method=Half(part=0.25))
    assert result.summary["method"] == "half"
    named = run(tmp_path / "name", method=f"{__name__}:Half", settings={"method.part": 0.25})
    assert named.model[1].weight.equal(result.model[1].weight)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "fedtinny"}, "unknown method 'fedtinny'; known methods: fedavg"),
        ({"method": fedprune.FedTiny}, "got the class FedTiny: call it"),
        ({"method": 3}, r"expected a name, or an object such as .* got 3"),
        ({"method": "nowhere:Thing"}, r"'nowhere:Thing' cannot be imported: .*is looked for in"),
        ({"method": "math:pi"}, "'math:pi' is no class derived from fedprune.Method"),
        ({"method": Plain()}, r"write @dataclass\(frozen=True\) above the class"),
        ({"method": Nameless()}, "is called 'fedavg', as one that there is"),
        (
            {"method": "small-dense"},
            "narrower network is asked for, and .*network has a fixed width",
        ),
        ({"model": 3}, "expected a name, a function or a network, got int"),
        ({"model": nn.Linear}, "may ask for num_classes, input_shape, seed"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(9, 3))}, "does not fit images"),
        ({"model": nn.Conv2d(1, 3, 3)}, r"gives \(2, 3, 2, 2\), expected logits \[2, classes\]"),
        ({"model": lambda: network(2)}, "gives 2 logits, and the data have 3 classes"),
        ({"data": "digitz"}, "unknown data set 'digitz'"),
        ({"data": 5}, "data is a int; expected"),
        ({"data": (IMAGES, LABELS[1:])}, "60 images but 59 labels"),
        ({"data": (IMAGES, LABELS * 1j)}, "expected whole numbers"),
        ({"data": (IMAGES, LABELS * 1000)}, "the labels reach 2000, and 48 training samples"),
        ({"data": {"test": (IMAGES, LABELS)}}, "expected the sides train and test, got test"),
        (
            {"data": {"train": (IMAGES, LABELS), "test": (IMAGES[:, :, :2], LABELS)}},
            r"are torch.uint8 \[1, 4, 4\] with labels, test samples torch.uint8 \[1, 2, 4\]",
        ),
        (
            {"data": {"train": (IMAGES, LABELS), "test": (IMAGES / 255.0, LABELS)}},
            r"are torch.uint8 \[1, 4, 4\] with labels, test samples torch.float32",
        ),
        (
            {"data": {"train": (IMAGES, LABELS % 2), "test": (IMAGES, LABELS)}},
            r"test label 2 of row 2 lies outside 0 ... 1",
        ),
        ({"settings": {"data.num_train": 20}}, "cut these data yourself"),
        ({"settings": {"trainin.lr": 1}}, "did you mean 'training.lr'"),
        ({"clients": 400}, "cannot divide 45 training samples among 400 clients"),
        ({"rounds": "two"}, "training.rounds: expected int, got 'two'"),
        ({"engine": "ray"}, "unknown engine 'ray'; expected one of flower, inline, batched"),
        ({"engine": "flower"}, "do not have this run's data"),
        ({"resume": True}, "nothing to resume in"),
    ],
)
def test_what_cannot_be_run_is_one_clear_error(
    given: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Before anything is computed: no folder is left."""
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_flower_refuses_a_method_of_this_process_alone(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Inner(Half):
        name: ClassVar[str] = "inner"

    with pytest.raises(ValueError, match="give a name, module:function, module:Class"):
        run(tmp_path / "run", model="resnet8", data="digits", method=Inner(), engine="flower")
    assert run(tmp_path / "run", method=Inner()).summary["method"] == "inner"


def test_a_second_run_goes_nowhere_over_the_first(tmp_path: Path) -> None:
    run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"already holds a run; .*resume=True, or another folder"):
        run(tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; give a folder"):
        run(tmp_path / "file")


def a_lambda(hidden: int) -> Callable[[], nn.Module]:
    """A new object with each call."""
    return lambda: network(hidden=hidden)


def test_an_interrupted_run_goes_on_with_equal_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data and functions made anew, as when a notebook's cells are run again, are the same."""
    whole = run(tmp_path / "whole", model=a_lambda(8), method=Stopped(), rounds=3)
    monkeypatch.setattr(Stopped, "rounds_left", [0, 1])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", model=a_lambda(8), method=Stopped(), rounds=3)
    again: dict[str, Any] = {"method": Stopped(), "rounds": 3, "resume": True}
    with pytest.raises(ValueError, match=r"is of another network than .*: continue with the"):
        run(tmp_path / "run", model=a_lambda(5), **again)
    with pytest.raises(ValueError, match=r"other settings: data.dataset was"):
        run(tmp_path / "run", model=a_lambda(8), data=(IMAGES, LABELS[::-1].copy()), **again)
    data = (IMAGES.copy(), LABELS.astype(np.int32))
    result = run(tmp_path / "run", model=a_lambda(8), data=data, **again)
    for name, value in result.model.state_dict().items():
        assert value.equal(whole.model.state_dict()[name])


def test_a_run_that_goes_on_keeps_the_settings_that_are_not_given(tmp_path: Path) -> None:
    """Defaults (20 rounds, 8 clients, fedtiny) are no wishes."""
    first = run(tmp_path / "run", data="digits", model="resnet8", settings={"model.width": 4})
    again = fedprune.run(folder=tmp_path / "run", resume=True)
    assert again.summary == first.summary
    rounds = first.summary["rounds"]
    assert fedprune.run(folder=tmp_path / "run", rounds=rounds, resume=True).folder == first.folder
    told = re.escape(f"training.rounds was {rounds}, now {rounds + 1}; {OR_ELSEWHERE}") + "$"
    with pytest.raises(ValueError, match=told):
        fedprune.run(folder=tmp_path / "run", rounds=rounds + 1, resume=True)


def test_networks_are_known_by_their_weights(tmp_path: Path) -> None:
    """A run with a network goes on with an equal one, and not with another."""
    torch.manual_seed(0)
    first, other = network(), network()
    run(tmp_path / "run", model=first)
    equal = network()
    equal.load_state_dict(first.state_dict())
    assert run(tmp_path / "run", model=equal, resume=True).summary["rounds"] == 1
    with pytest.raises(ValueError, match=r"other settings: model.name was 'Sequential@"):
        run(tmp_path / "run", model=other, resume=True)


def test_the_seed_of_a_configuration_splits_given_data(tmp_path: Path) -> None:
    by_name = run(tmp_path / "name", seed=3)
    by_setting = run(tmp_path / "setting", settings={"seed": 3})
    assert by_name.summary["dataset"] == by_setting.summary["dataset"]
    assert by_name.summary["dataset"] != run(tmp_path / "zero").summary["dataset"]


def test_data_whose_classes_are_called_otherwise_are_other_data() -> None:
    names = [name_dataset((IMAGES, [f"{word}{label}" for label in LABELS])) for word in "ab"]
    found = [given_dataset(name) for name in names]
    assert [data.class_names for data in found if data] == [("a0", "a1", "a2"), ("b0", "b1", "b2")]
