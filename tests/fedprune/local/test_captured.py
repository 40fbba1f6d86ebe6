"""Captured steps: the weights of eager training, and nothing in a step that waits for the host."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from little_clients import narrow, network_from, random_mask, samples, state_of
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("flwr", reason="needs flwr, which fedprune installs")
sys.path.insert(0, str(Path(__file__).parent.parent))  # whose modules are no package

from federation import tiny

from fedprune.config import RunConfig
from fedprune.errors import ConfigError
from fedprune.local import captured
from fedprune.local.captured import (
    Body,
    CapturedTraining,
    Job,
    NotCapturableError,
    Plainly,
    Watch,
    check_capturable,
    forget_trainings,
)
from fedprune.local.model import Sgd, open_model
from fedprune.local.torch_models import DenseModel, MaskedModel, TorchModel
from fedprune.local.training import train_epochs, training_plan
from fedprune.rounds.folder import read_metrics
from fedprune.rounds.run import run
from fedprune.settings import PRECISIONS, TrainingConfig
from prunelab.training import precision
from prunelab.training.task import ImageClassification
from sparsemodel.masks.mask import Mask
from sparsemodel.runtime.state import SparseState

SGD = Sgd(0.1, 0.9, 5e-4)
META = torch.device("meta")

# The fused update computes nothing where nothing has a value.
_on_meta = torch.library.Library("aten", "IMPL", "Meta")
_on_meta.impl("_fused_sgd_.tensor_lr", lambda *_, **__: None)


class Tape(TorchDispatchMode):
    """A graph on the CPU: the operators of one run, each with the tensors that it got and made.

    Played, each operator reads and writes those tensors and no others, and no Python runs between
    them, so that whatever was not read from a tensor is what it was.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch's compiler is imported, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        inputs = {_storage(t) for t in _tensors([args, kwargs])}
        made = [t for t in _tensors(found) if _storage(t) not in inputs]
        if made or func._schema.is_mutable:  # others are views
            self._calls.append((func, args, kwargs, made))
        return found

    @torch.no_grad()
    def play(self) -> None:
        for func, args, kwargs, made in self._calls:
            inputs = {_storage(t) for t in _tensors([args, kwargs])}
            found = _tensors(func(*args, **kwargs))
            again = [t for t in found if _storage(t) not in inputs]
            for old, new in zip(made, again, strict=True):
                old.copy_(new)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Tapes:
    """Captures each body at its first run, as `CudaGraphs` does at its fourth."""

    made = 0

    def running(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def repeated(self, body: Body) -> Body:
        tapes: list[Tape] = []

        def run() -> None:
            if tapes:
                return tapes[0].play()
            Tapes.made += 1
            with Watch(torch.device("cpu")) as watch, Tape() as tape:
                body()
            if watch.obstacles:
                raise NotCapturableError(watch.obstacles[0])
            return tapes.append(tape)

        return run


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    Tapes.made = 0
    yield
    forget_trainings()


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Local training on the CPU goes by tapes, as by graphs on a GPU."""
    monkeypatch.setattr(captured, "replays_on", lambda device: Tapes)


def opened(
    mask: Mask | None,
    *,
    build: Callable[[], nn.Module] = narrow,
    key: str | None = "narrow",
    number: int = 0,
    **training: Any,
) -> TorchModel:
    """A model of a client: another one's has other weights."""
    state = state_of(build(), mask)
    values = {
        n: v + np.float32(0.01 * number) if n == "fc.bias" else v for n, v in state.values.items()
    }
    kind = DenseModel if mask is None else MaskedModel
    state, config = SparseState(values, state.patterns), TrainingConfig(batch_size=8, **training)
    return kind(build, state, config, key=key)


def trained(
    model: TorchModel, count: int = 37, *, sgd: Sgd = SGD, epochs: int = 2, augmented: bool = False
) -> tuple[TorchModel, float]:
    images, labels = samples(count)
    loss = train_epochs(
        model, images, labels, sgd=sgd, epochs=epochs, batch_size=8, seed=3, augmented=augmented
    )
    return model, loss


def assert_close(ours: TorchModel, theirs: TorchModel, *, atol: float = 2e-6) -> None:
    mine, other = ours.state(), theirs.state()
    assert mine.patterns == other.patterns
    for name, value in other.values.items():
        np.testing.assert_allclose(mine.values[name], value, rtol=2e-5, atol=atol, err_msg=name)


# --- the same weights --------------------------------------------------------------------------


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("density", [None, 0.3])
@pytest.mark.parametrize("sgd", [SGD, Sgd(0.1, 0.0, 0.0)])
def test_replayed_steps_train_as_eager_ones(
    density: float | None, augmented: bool, sgd: Sgd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps in two epochs, the last of five samples; running statistics are compared too."""
    mask = None if density is None else random_mask(density)
    eager, expected = trained(opened(mask), sgd=sgd, augmented=augmented)
    monkeypatch.setattr(captured, "replays_on", lambda device: Tapes)
    ours, loss = trained(opened(mask), sgd=sgd, augmented=augmented)
    assert Tapes.made == 2  # of eight samples and of five
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_close(ours, eager)
    for name in mask or ():
        assert mask is not None
        assert not ours._module.get_parameter(name).detach()[~mask[name]].any()
    monkeypatch.setattr(captured, "replays_on", lambda device: Plainly)
    forget_trainings()
    plainly, plain_loss = trained(opened(mask), sgd=sgd, augmented=augmented)
    assert loss == plain_loss
    for name, value in plainly.state().values.items():
        assert np.array_equal(ours.state().values[name], value)


def test_a_graph_serves_other_clients_rounds_rates_and_masks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clients = [
        {"number": 1, "count": 37, "rate": 0.1, "seed": 5},
        {"number": 2, "count": 48, "rate": 0.05, "seed": 5},
        {"number": 3, "count": 37, "rate": 0.02, "seed": 6},  # another mask
        {"number": 4, "count": 45, "rate": 0.02, "seed": 6},
    ]
    results: list[list[TorchModel]] = []
    for way in (None, Tapes):
        monkeypatch.setattr(captured, "replays_on", lambda device, way=way: way)
        results.append([])
        for client in clients:
            mask = random_mask(0.3, seed=int(client["seed"]))
            model = opened(mask, number=int(client["number"]))
            sgd = Sgd(client["rate"], 0.9, 5e-4)
            results[-1].append(trained(model, int(client["count"]), sgd=sgd)[0])
    assert Tapes.made == 2  # of eight and of five; the others have whole batches or the same rest
    for theirs, ours in zip(*results, strict=True):
        assert_close(ours, theirs)


def test_larger_clients_and_another_decay_are_captured_anew(taped: None) -> None:
    other = Sgd(0.1, 0.9, 0.0)
    for count, sgd, made in ((12, SGD, 2), (18, SGD, 4), (12, SGD, 5), (12, other, 7)):
        ours, _ = trained(opened(None), count, sgd=sgd, epochs=1)
        assert Tapes.made == made
        eager, _ = trained(opened(None, key=None), count, sgd=sgd, epochs=1)
        assert_close(ours, eager)


@pytest.mark.parametrize("density", [None, 0.3])
def test_bfloat16_steps_are_those_of_eager_training(
    density: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of each; they differ from float32's by more than from each other."""
    mask = None if density is None else random_mask(density)
    models = []
    for way, kind in ((None, "float32"), (None, "bfloat16"), (Tapes, "bfloat16")):
        monkeypatch.setattr(captured, "replays_on", lambda device, way=way: way)
        models.append(trained(opened(mask, precision=kind), 8, epochs=1)[0])
    full, eager, ours = (model.state().values for model in models)
    for name, value in eager.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6)
    assert any(np.abs(full[name] - value).max() > 1e-5 for name, value in eager.items())
    assert precision.PRECISIONS == PRECISIONS


def test_what_bfloat16_is_not_for(tmp_path: Path) -> None:
    """The runtime and stacked clients compute in float32: a pruned model is masked, by torch."""
    config = RunConfig.parse({"training.precision": "bfloat16"})
    model = open_model(network_from(narrow), state_of(narrow(), random_mask(0.3)), config.training)
    assert isinstance(model, MaskedModel)
    with pytest.raises(ConfigError, match="the batched engine computes in float32"):
        run(config, tmp_path, engine="batched")


def test_a_run_keeps_one_training_for_all_clients_and_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(
        method__name="magnitude", training__rounds=2, training__execution="masked",
        training__lr=0.02, training__local_epochs=1,
    )  # fmt: skip
    keep, keys = captured.kept_training, list[Any]()

    def counted(key: Any, make: Callable[[], CapturedTraining]) -> CapturedTraining:
        keys.append(key)
        return keep(key, make)

    monkeypatch.setattr(captured, "kept_training", counted)
    for folder, way in (("eager", None), ("ours", Tapes)):
        monkeypatch.setattr(captured, "replays_on", lambda device, way=way: way)
        run(config, tmp_path / folder, engine="inline")
    eager, ours = (read_metrics(tmp_path / folder) for folder in ("eager", "ours"))
    for mine, other in zip(ours[1:], eager[1:], strict=True):
        assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
    assert len(keys) == 2 * config.data.clients
    assert len(set(keys)) == 1
    assert not captured._kept  # with the run its memory goes


def test_what_training_holds_is_told(taped: None) -> None:
    """Of the copy that is trained weights, gradients, momentum and masks of a byte a weight; and
    the model's own weights."""
    mask = random_mask(0.3)
    model, _ = trained(opened(mask))
    weights = 4 * sum(p.numel() for p in narrow().parameters())
    assert model.held_bytes() == 4 * weights + mask.num_weights


# --- what falls back ---------------------------------------------------------------------------


class Guarded(nn.Module):
    """A network that does something to its input first."""

    def __init__(self, does: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.inner, self.does = narrow(), does

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.does(images)
        result: torch.Tensor = self.inner(images)
        return result


class Dropped(nn.Module):
    """A network with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = narrow()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(functional.dropout(images, 0.5, self.training))
        return result


def waits(images: torch.Tensor) -> None:
    assert images.abs().max().item() < 100


@pytest.mark.parametrize("build", [lambda: Guarded(waits), Dropped], ids=["waits", "draws"])
def test_a_step_that_no_graph_repeats_is_made_as_ever(
    build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, expected = trained(opened(None, build=build))
    monkeypatch.setattr(captured, "replays_on", lambda device: Tapes)
    for _ in range(2):  # the second is not tried
        ours, loss = trained(opened(None, build=build))
        assert loss == expected
        for name, value in eager.state().values.items():
            assert np.array_equal(ours.state().values[name], value)
    assert Tapes.made == 1


def test_corrections_hooks_and_momentum_under_way_are_not_captured(taped: None) -> None:
    images, labels = samples(16)
    numbers = {"sgd": SGD, "epochs": 1, "batch_size": 8, "seed": 3}
    seen: list[int] = []
    train_epochs(opened(None), images, labels, correction=lambda v, g: None, **numbers)  # type: ignore[arg-type]
    train_epochs(opened(None), images, labels, before_step=seen.append, **numbers)  # type: ignore[arg-type]
    begun = opened(None)
    begun.step(images[:8], labels[:8], sgd=SGD)
    train_epochs(begun, images, labels, **numbers)  # type: ignore[arg-type]
    trained(opened(None, key=None))
    assert seen == [0, 1]
    assert Tapes.made == 0


# --- nothing in a step waits for the host ------------------------------------------------------


def on_meta(
    mask: Mask | None = None, *, augmented: bool = True, build: Callable[[], nn.Module] = narrow
) -> CapturedTraining:
    """A training whose device is not the host's, with nothing on it."""
    training = CapturedTraining(
        build().to(META), ImageClassification(), precision="float32", replays=Plainly
    )
    images, labels = samples(16)
    plan = training_plan(images, epochs=1, batch_size=8, seed=0, augmented=augmented)
    patterns = None if mask is None else mask.csr()
    training.ground(Job(images, labels, plan, patterns, SGD))
    return training


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("density", [None, 0.3])
def test_a_step_neither_waits_nor_copies(density: float | None, augmented: bool) -> None:
    mask = None if density is None else random_mask(density)
    training = on_meta(mask, augmented=augmented)
    with Watch(META) as watch:
        training.step(8)
    assert not watch.obstacles
    assert watch.operators.count("aten._fused_sgd_.tensor_lr") == 1
    assert watch.operators.count("aten.masked_fill_.Scalar") == len(mask or ())
    assert not [name for name in watch.operators if "pin" in name or "scalar_dense" in name]


FAULTS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu", non_blocking=True),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "boolean assignment": lambda x: x.clone().__setitem__(x > 0, 0.0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x[0, 0, 0].repeat_interleave(x[0, 0, 1].long()),
    "from_numpy": lambda x: x + torch.from_numpy(np.ones(8, np.float32)),
    "from_numpy and copy": lambda x: torch.from_numpy(np.ones(8, np.float32)).to(x.device),
    "tensor of the host": lambda x: torch.zeros(3),
    "pinned": lambda x: torch.zeros(3, pin_memory=True),
    "dropout": lambda x: functional.dropout(x, 0.5),
    "randn": lambda x: torch.randn(3, device=x.device),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_waits_or_copies_is_seen(fault: str) -> None:
    """Fails if the check misses one of them, put into a step's forward pass."""
    training = on_meta(build=lambda: Guarded(FAULTS[fault]))
    with contextlib.suppress(Exception), Watch(META) as watch:  # without values they fail, too
        training.step(8)
    assert watch.obstacles


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda: torch.ones(()).item(), r"_local_scalar_dense.*the host waits for a value"),
        (lambda: torch.ones(2).mul_(torch.tensor([2.0, 3.0])), "new data come from the host"),
        (lambda: torch.ones(2)[torch.zeros(2) > 0], "number of true entries"),
        (lambda: torch.ones(2, 3).t().view(6), "view size is not compatible"),
    ],
)
def test_the_check_says_what_and_why(body: Body, why: str) -> None:
    with pytest.raises(NotCapturableError, match=why):
        check_capturable(body, torch.device("cpu"))


def test_a_body_of_plain_operators_passes_the_check() -> None:
    numbers, places = torch.zeros(3), torch.arange(3)

    def body() -> None:
        numbers.index_put_((places,), numbers[places] + 1)

    check_capturable(body, torch.device("cpu"))
    assert numbers.tolist() == [1, 1, 1]
