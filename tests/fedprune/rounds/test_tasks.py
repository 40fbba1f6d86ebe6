"""Whole runs of other tasks than classes of images, and runs that clients test themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional

import fedprune
from fedprune import Result
from fedprune.errors import ClientError, ConfigError
from fedprune.exchange.messages import Reply
from fedprune.given import given_task, name_object
from fedprune.local.data import Split
from fedprune.local.shares import open_client
from fedprune.local.site import TRAIN, split_seed
from fedprune.rounds.evaluation import evaluation_request
from fedprune.rounds.folder import stored_config
from fedprune.rounds.workspace import Workspace, open_workspace
from prunelab.data.samples import TargetSamples, TokenSamples
from prunelab.errors import DataError, ModelError
from prunelab.training.loop import evaluate
from prunelab.training.task import (
    CausalLM,
    ImageClassification,
    MultiLabel,
    Regression,
    Supervised,
    TextClassification,
    make_task,
)
from sparsemodel.runtime.state import SparseState

COUNT = 120
Array = np.ndarray[Any, Any]
pytestmark = pytest.mark.filterwarnings("ignore:the samples have no classes")


def features(*, outputs: int = 1) -> tuple[Array, Array]:
    """Inputs [N, 6] and a noisy linear function of them, [N] or [N, outputs]."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(COUNT, 6)).astype(np.float32)
    targets = inputs @ random.normal(size=(6, outputs))
    targets += 0.1 * random.normal(size=targets.shape)
    return inputs, (targets[:, 0] if outputs == 1 else targets).astype(np.float32)


def net(outputs: int) -> nn.Module:
    layers = [nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, outputs)]
    return nn.Sequential(*layers)


def one() -> nn.Module:
    return net(1)


def two() -> nn.Module:
    return net(2)


def three() -> nn.Module:
    return net(3)


def run(folder: Path, **named: Any) -> Result:
    settings = {"training.batch_size": 16, "server.pretrain_epochs": 1, **named.pop("settings", {})}
    given = {"rounds": 3, "clients": 3, "method": "fedavg", **named}
    return fedprune.run(folder=folder / "run", settings=settings, **given)


def workspace_of(result: Result) -> Workspace:
    return open_workspace(stored_config(result.folder))


def losses(result: Result) -> list[float]:
    return [line["test_loss"] for line in result.metrics if "round" in line]


@pytest.mark.parametrize("method", ["fedavg", "fedtiny", "magnitude", "ssfl", "fedprox"])
def test_regression_by_every_kind_of_method(method: str, tmp_path: Path) -> None:
    result = run(
        tmp_path, model=one, data=features(), method=method, optimizer="adam",
        settings={"training.lr": 0.02},
    )  # fmt: skip
    summary = result.summary
    assert (summary["metric"], summary["test_accuracy"]) == ("mae", None)
    assert losses(result)[-1] < losses(result)[0]
    again = evaluate(result.model, workspace_of(result).dataset.test, Regression())
    assert again.loss == pytest.approx(summary["test_loss"], rel=1e-4)
    page = result.report.read_text()
    assert "Mae by round" in page
    assert "They have no classes." in page


def test_federated_averaging_is_a_plain_loop(tmp_path: Path) -> None:
    """One batch a client and round: the weighted mean of single steps, by torch alone."""
    result = run(
        tmp_path, model=one, data=features(), rounds=2,
        settings={
            "training.local_epochs": 1, "training.batch_size": COUNT, "training.momentum": 0.0,
            "training.weight_decay": 0.0, "training.schedule": "constant",
            "server.pretrain_epochs": 0,
        },
    )  # fmt: skip
    work = workspace_of(result)
    work.lay_out(tmp_path / "setup", with_start=False)
    model = work.model()
    for _ in range(2):
        total, mean = 0, [torch.zeros_like(p) for p in model.parameters()]
        for client in range(3):
            own = clients_data(tmp_path / "setup", work, client).train
            output = model(torch.from_numpy(own.inputs))[:, 0]
            loss = ((output - torch.from_numpy(own.targets)) ** 2 / 2).mean()
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            total += len(own)
            for kept, value, gradient in zip(mean, model.parameters(), gradients, strict=True):
                kept.add_(len(own) * (value.detach() - 0.1 * gradient))
        with torch.no_grad():
            for parameter, kept in zip(model.parameters(), mean, strict=True):
                parameter.copy_(kept / total)
    for name, value in model.state_dict().items():
        assert np.allclose(result.state.values[name], value.numpy(), atol=1e-5), name


def clients_data(setup: Path, work: Workspace, client: int, *, with_test: bool = False) -> Any:
    seed = split_seed(work.config, client)
    return open_client(setup / TRAIN, client, seed=seed, with_test=with_test)


def test_several_labels_a_sample(tmp_path: Path) -> None:
    inputs, values = features(outputs=3)
    data = inputs, (values > 0).astype(np.int64)
    result = run(
        tmp_path, model=three, data=data, method="magnitude", optimizer="adam",
        settings={"training.lr": 0.02, "method.density": 0.5},
    )  # fmt: skip
    assert result.summary["metric"] == "label accuracy"
    assert result.summary["test_metric"] > 0.7
    found = evaluate(result.model, workspace_of(result).dataset.test, MultiLabel())
    assert found.loss == pytest.approx(result.summary["test_loss"], rel=1e-4)


def test_a_loss_and_a_metric_of_ones_own(tmp_path: Path) -> None:
    def robust(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.smooth_l1_loss(outputs, targets, reduction="none")

    def near(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs - targets).abs() < 0.5

    task = Supervised(robust, near, metric_name="within a half")
    result = run(tmp_path, model=one, data=features(), task=task)
    assert result.summary["metric"] == "within a half"
    test = workspace_of(result).dataset.test
    with torch.no_grad():
        outputs = result.model(test.inputs)[:, 0]
    share = float(near(outputs, test.targets).double().mean())
    assert result.summary["test_metric"] == pytest.approx(share)
    assert result.summary["test_loss"] == pytest.approx(
        float(robust(outputs, test.targets).mean()), rel=1e-4
    )


def texts(*, labels: bool) -> TokenSamples:
    """Ascending token ids, 4 to 10 of them."""
    random = np.random.default_rng(0)
    ids = np.cumsum(random.integers(1, 3, (COUNT, 10)), 1) % 29 + 1
    mask = (np.arange(10) < random.integers(4, 11, COUNT)[:, None]).astype(np.int64)
    targets = (ids[:, 0] > 15).astype(np.int64) if labels else np.where(mask > 0, ids, -100)
    return TokenSamples(ids * mask, mask, targets)


SIZES: dict[str, int] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


def language_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


def adapted() -> nn.Module:
    import peft  # noqa: PLC0415

    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model: nn.Module = peft.get_peft_model(language_model(), lora)
    return model


def classifier(num_classes: int) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification  # noqa: PLC0415

    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=num_classes))


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # peft asks by an old name
@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg", "fedtiny"])
@pytest.mark.parametrize("model", [language_model, adapted])
def test_a_language_model(model: Callable[[], nn.Module], method: str, tmp_path: Path) -> None:
    density = {"method.density": 0.5} if method == "fedtiny" else {}
    result = run(
        tmp_path, model=model, data=texts(labels=False), method=method, optimizer="adamw",
        settings={"training.lr": 0.01, **density},
    )  # fmt: skip
    work = workspace_of(result)
    found = evaluate(result.model, work.dataset.test, CausalLM())
    assert found.loss == pytest.approx(result.summary["test_loss"], rel=1e-3)
    assert losses(result)[-1] < losses(result)[0]
    assert result.summary["metric"] == ""
    assert "Loss by round" in result.report.read_text()
    if model is adapted:  # only the adapters travel; what is frozen is where it was
        assert all("lora_" in name for name in result.state.values)
        before, after = (dict(m.named_parameters()) for m in (work.model(), result.model))
        frozen = [name for name, p in before.items() if not p.requires_grad]
        assert frozen
        assert all(torch.equal(before[name], after[name]) for name in frozen)


@pytest.mark.slow
def test_texts_with_classes(tmp_path: Path) -> None:
    """Dropout is in it: two runs give the same bits all the same."""
    results = [
        run(
            tmp_path / str(turn), model=classifier, data=texts(labels=True), method="fedtiny",
            optimizer="adam", settings={"training.lr": 0.01},
        )
        for turn in range(2)
    ]  # fmt: skip
    one, other = (result.state.values for result in results)
    assert all(np.array_equal(one[name], other[name]) for name in one)
    test = workspace_of(results[0]).dataset.test
    found = evaluate(results[0].model, test, TextClassification())
    assert found.accuracy == pytest.approx(results[0].summary["test_accuracy"], abs=1e-9)


class Best3(ImageClassification):
    """A metric of its own, on a loss that programs know."""

    metric_name = "top 3"

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.count = count

    def measure(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits, labels = self.logits(model, batch), self.labels(batch)
        hits = (logits.topk(self.count).indices == labels[:, None]).any(1)
        return functional.cross_entropy(logits, labels, reduction="none"), hits.float()


def test_a_metric_of_ones_own_is_the_same_however_clients_compute(tmp_path: Path) -> None:
    found = {}
    for execution in ("sparse", "masked"):
        result = run(
            tmp_path / execution, method="magnitude", task=Best3(5), rounds=1,
            **digits(evaluate="server", **{"training.execution": execution}),
        )  # fmt: skip
        found[execution] = result.summary["test_metric"]
    assert found["sparse"] == pytest.approx(found["masked"], abs=0.05)
    data = workspace_of(result).dataset.test
    measured = evaluate(result.model, data, Best3(5))
    assert measured.metric == pytest.approx(found["masked"])
    assert (measured.num_correct, measured.accuracy != measured.accuracy) == (None, True)


def test_an_object_is_not_what_its_class_would_make() -> None:
    """Top 5 of an object; the class of the same name would make top 3."""
    name = name_object(Best3(5))
    assert "Best3()" in name
    assert make_task(given_task(name)).count == 5  # type: ignore[attr-defined]
    other = name_object(Best3)
    assert other != name
    assert make_task(given_task(other)).count == 3  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="Best3"):
        make_task("test_tasks:Best3()")


def test_a_loaded_run_is_told_its_task_again(tmp_path: Path) -> None:
    result = run(tmp_path, method="magnitude", task=Best3(5), rounds=1, **digits(evaluate="server"))
    named = {"task": Best3(5), "method": "magnitude", "rounds": 1, **digits(evaluate="server")}
    resumed = run(tmp_path, resume=True, **named)  # the same task, made anew
    assert resumed.summary == result.summary
    again = fedprune.load(result.folder, task=Best3(5))
    assert again.evaluate().metric == pytest.approx(result.summary["test_metric"])


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = functional.dropout(self.fc(x.flatten(1)).relu(), 0.4, self.training)
        return self.last(hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("cohort", [1, 2])
def test_the_batched_engine_draws_by_the_seed(cohort: int, tmp_path: Path) -> None:
    """Whatever a network draws with, and however torch was seeded: the inline engine's bits."""
    settings = {**digits(evaluate="server")["settings"], "training.cohort": cohort}
    values = []
    for engine in ("batched", "inline"):
        torch.manual_seed(len(values))
        result = run(
            tmp_path / engine, model=Drawing, data="digits", engine=engine, rounds=1,
            method="magnitude", settings={**settings, "training.execution": "masked"},
        )  # fmt: skip
        values.append(result.state.values)
    assert all(np.array_equal(values[0][name], v) for name, v in values[1].items())


def test_a_run_goes_on_with_the_columns_that_it_began_with(tmp_path: Path) -> None:
    inputs, values = features()
    frame = pd.DataFrame(inputs, columns=list("abcdef")).assign(price=values)
    first = run(tmp_path, model=one, data=frame, settings={"data.columns": "label=price"})
    again = fedprune.run(folder=first.folder, model=one, data=frame, resume=True)
    assert again.summary == first.summary


@pytest.mark.slow
def test_a_network_of_transformers_by_its_folder(tmp_path: Path) -> None:
    model = classifier(2)
    model.config.save_pretrained(tmp_path / "bert")
    data = {"train": texts(labels=True), "test": texts(labels=True)}
    result = run(tmp_path, model=f"hf/{tmp_path / 'bert'}", data=data, rounds=1, optimizer="adam")
    assert result.summary["metric"] == "accuracy"


# --- clients that test ---------------------------------------------------------------------------


def digits(*, evaluate: str, **more: Any) -> dict[str, Any]:
    settings = {"data.num_train": 300, "data.num_test": 60, "federation.evaluate": evaluate}
    settings |= more
    return {"data": "digits", "model": "resnet8", "settings": settings}


@pytest.mark.filterwarnings("ignore:60 test samples are left aside")
@pytest.mark.parametrize("method", ["fedavg", "fedtiny"])
def test_clients_test_on_samples_of_their_own(method: str, tmp_path: Path) -> None:
    result = run(tmp_path, method=method, **digits(evaluate="clients"))
    work, setup = workspace_of(result), tmp_path / "setup"
    work.lay_out(setup, with_start=False)
    assert not (setup / "test").exists()
    right = total = 0
    for entry in result.metrics[-1]["test_clients"]:
        test = clients_data(setup, work, entry["client"], with_test=True).test
        found = evaluate(result.model, (test.inputs, test.targets))
        assert found.num_correct is not None
        assert entry["metric"] == pytest.approx(found.accuracy, abs=1e-9)
        assert entry["samples"] == len(test) > 0
        right, total = right + found.num_correct, total + len(test)
    assert result.summary["test_accuracy"] == pytest.approx(right / total)
    # Clients keep the model that they tested: the next round sends it to nobody again.
    tested = run(tmp_path / "other", method=method, **digits(evaluate="server"))
    down, plain = ([x["bytes_down"] for x in r.metrics if "round" in x] for r in (result, tested))
    assert down[1] < 1.3 * plain[1]


@pytest.mark.filterwarnings("ignore::prunelab.errors.DataWarning")
def test_a_client_that_is_too_small_to_test_is_not_asked(tmp_path: Path) -> None:
    """Three samples are two for training and one for development."""
    inputs, values = features()
    share = np.array([0, 1, 2]), np.arange(3, 60)
    result = run(
        tmp_path, model=one, data=(inputs, values), clients=2, rounds=1,
        partition=lambda labels, num_clients, seed: share,
        settings={"federation.evaluate": "clients", "server.pretrain_epochs": 0},
    )  # fmt: skip
    line = result.metrics[-1]
    assert line["clients"] == [0, 1]
    assert [entry["client"] for entry in line["test_clients"]] == [1]
    assert line["skipped"] == []


@pytest.mark.filterwarnings("ignore:60 test samples are left aside")
def test_clients_test_samples_decide_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other targets in every client's test split each bit of the model is the same."""
    plain = run(tmp_path / "plain", method="fedtiny", **digits(evaluate="clients"))

    def poisoned(folder: Path, client: int, **named: Any) -> Any:
        data = open_client(folder, client, **named)
        object.__setattr__(data, "test", Split(data.test.inputs, (data.test.targets + 1) % 10))
        return data

    monkeypatch.setattr("fedprune.local.site.open_client", poisoned)
    other = run(tmp_path / "other", method="fedtiny", **digits(evaluate="clients"))
    assert other.summary["test_accuracy"] != plain.summary["test_accuracy"]
    values = plain.state.values
    assert all(np.array_equal(values[n], v) for n, v in other.state.values.items())


@pytest.mark.parametrize(
    ("loss", "hits"),
    [(-1.0, 1), (float("nan"), 1), ("low", 1), (1.0, 6), (1.0, -1), (1.0, 0.5), (1.0, None)],
)
def test_what_a_client_that_tests_cannot_say(loss: Any, hits: Any) -> None:
    state = SparseState({"w": np.ones(2, np.float32)})
    request = evaluation_request(state, 1, metric="accuracy")
    request.check(Reply(5, {"loss": 2.0, "metric": 5.0}))
    with pytest.raises(ClientError):
        request.check(Reply(5, {"loss": loss, "metric": hits}))


# --- what cannot be ------------------------------------------------------------------------------


def test_what_does_not_go_together(tmp_path: Path) -> None:
    data = features()
    with pytest.raises(ModelError, match="unknown task 'regresion'; known: classification"):
        run(tmp_path, model=one, data=data, task="regresion")
    with pytest.raises(ModelError, match=r"gives \[\d+, 3\] for targets \[\d+\]"):
        run(tmp_path, model=three, data=data)
    with pytest.raises(DataError, match=r"the samples have no classes: data\.partition"):
        run(tmp_path, model=one, data=data, settings={"data.partition": "pathological"})
    with pytest.raises(ConfigError, match=r"training\.optimizer: expected sgd, adam, adamw or mod"):
        run(tmp_path, model=one, data=data, optimizer="adamm")
    with pytest.raises(ConfigError, match=r"data\.augment is for images"):
        run(tmp_path, model=one, data=data, settings={"data.augment": True})
    with pytest.raises(ConfigError, match="do not have this run's data: give"):
        run(tmp_path, model="resnet8", data=TargetSamples(*data), engine="flower")
    assert list(tmp_path.iterdir()) == []
