"""What a run leaves can be used: its model is loaded, and fed as in training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from federation import run_inline, tiny
from flwr.app import Context, Message
from torch import nn

import sparsemodel
from fedprune.flower import client
from fedprune.front import Result
from fedprune.rounds.folder import read_summary
from fedprune.rounds.workspace import open_workspace
from prunelab.data.batches import Preprocessing
from prunelab.data.datasets import load_dataset
from prunelab.errors import DataError, RunError
from prunelab.networks import build_model
from sparsemodel.layers.sparsify import mask_of


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = run_inline(tiny(training__local_epochs=4), tmp_path_factory.mktemp("final") / "run")
    return Result(folder, read_summary(folder))


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


def test_a_model_says_what_its_input_is(result: Result) -> None:
    data = open_workspace(tiny(training__local_epochs=4)).dataset
    pictures, labels = data.test.images, data.test.labels
    assert result.preprocessing == Preprocessing((0.5,), (0.25,))
    images = torch.from_numpy(result.preprocessing.apply(pictures.numpy()))
    expected = result.summary["test_accuracy"]
    assert accuracy(result.model, images, labels) == pytest.approx(expected, abs=1e-9)
    assert accuracy(result.model, pictures / 255, labels) < expected - 0.1


def test_a_runs_own_file_is_loaded_into_its_network(result: Result) -> None:
    """It holds no batch counters of batch norms."""
    path = result.folder / "model.safetensors"
    stored = sparsemodel.load(path)
    assert not any(name.endswith("num_batches_tracked") for name in stored.state)
    assert stored.metadata["inputs"] == "uint8"
    assert Preprocessing.from_metadata(stored.metadata) == result.preprocessing
    network = build_model("resnet8", num_classes=10, input_shape=(1, 8, 8), seed=3, width=4)
    loaded = sparsemodel.load(path, network).eval()
    assert mask_of(loaded).csr() == result.state.patterns
    images = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(loaded(images), result.model(images))


def test_metadata_without_preprocessing_is_refused() -> None:
    with pytest.raises(DataError, match=r"no 'preprocessing' among its metadata \['dataset'\]"):
        Preprocessing.from_metadata({"dataset": "digits"})
    for text in ("", "3", "[]", "{}", '{"mean": [0], "std": [0]}', '{"mean": ["x"], "std": [1]}'):
        with pytest.raises(DataError, match="preprocessing"):
            Preprocessing.from_metadata({"preprocessing": text})
    own = Preprocessing((0.1, 0.2, 0.3), (1.0, 2.0, 1 / 3))
    assert Preprocessing.from_metadata(own.to_metadata()) == own


@pytest.mark.parametrize("method", ["fedtiny", "ssfl", "fedavg"])
def test_a_start_that_diverges_says_that_the_learning_rate_is_too_high(
    method: str, tmp_path: Path
) -> None:
    config = tiny(method__name=method, training__lr=1e6)
    with pytest.raises(RunError, match=r"training\.lr=1e\+06 is too high; lower it") as caught:
        run_inline(config, tmp_path / "run")
    assert "more samples" not in str(caught.value)


@pytest.mark.parametrize("method", ["fedtiny", "ssfl", "magnitude"])
def test_clients_that_diverge_say_so(method: str, tmp_path: Path) -> None:
    config = tiny(method__name=method, training__lr=1e6, server__pretrain_epochs=0)
    with pytest.raises(RunError, match=r"client 0: .*is training\.lr too high\?"):
        run_inline(config, tmp_path / "run")


@pytest.mark.parametrize("method", ["fedtiny", "ssfl"])
def test_a_start_without_answers_gives_the_clients_reasons(method: str, tmp_path: Path) -> None:
    """The reason is the client's, not a guess."""
    joined: set[int] = set()

    def broken(message: Message, context: Context) -> Message | None:
        if context.node_id in joined:
            raise ValueError("battery empty")
        joined.add(context.node_id)
        return client.app(message, context)

    with pytest.raises(RunError, match=r"no client could measure .*client 0: .*battery empty"):
        run_inline(tiny(method__name=method), tmp_path / "run", clients=broken)


def test_images_of_digits_are_bytes() -> None:
    assert load_dataset("digits").test_images.numpy().dtype == np.uint8
