"""Embeddings: controls by hand, SimCLR's views, bits and resuming, named networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from datapruning.embeddings.embed import embed, pca
from datapruning.embeddings.simclr import SimclrConfig, train_simclr, view
from datapruning.scores.prototypes import self_supervised
from prunelab.data.datasets import load_dataset
from prunelab.data.samples import ImageSamples, TokenSamples
from prunelab.data.tensors import prepare
from prunelab.errors import DataError, ModelError, RunError
from prunelab.networks import build_model
from prunelab.training.task import ImageClassification

TINY = SimclrConfig(width=4, epochs=2, batch_size=16, projection=8)


def pictures(n: int = 40, *, channels: int = 1, size: int = 8, seed: int = 0) -> ImageSamples:
    generator = torch.Generator().manual_seed(seed)
    shape = (n, channels, size, size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return ImageSamples(images, torch.arange(n) % 3)


# --- controls and tasks --------------------------------------------------------------------------


def test_pixels_are_the_prepared_images_in_order() -> None:
    samples = pictures()
    found = embed(samples, "pixels")
    assert found.dtype == torch.float32
    assert torch.equal(found, prepare(samples.images).reshape(40, 64))


def test_pca_is_the_eigenbasis_of_the_covariance() -> None:
    """Against eigh in float64, up to the sign of each component."""
    samples = pictures()
    x = embed(samples, "pixels").double()
    centred = x - x.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    expected = centred @ vectors.flip(1)[:, :5]
    found = pca(samples, num_components=5, seed=0).double()
    torch.testing.assert_close(found.abs(), expected.abs(), atol=1e-4, rtol=1e-4)
    assert embed(samples, "pca").shape == (40, 40)  # no more than samples allow
    assert torch.equal(embed(samples, "pca", seed=3), embed(samples, "pca", seed=3))


def test_a_task_and_a_model_give_the_tasks_embedding_in_eval_mode() -> None:
    samples = pictures()
    model = build_model("resnet8", num_classes=3, input_shape=(1, 8, 8), seed=0, width=4)
    model.train()
    model.bn1.eval()
    found = embed(samples, task=ImageClassification(), model=model, batch_size=7)
    assert model.training
    assert not model.bn1.training
    model.eval()
    with torch.no_grad():
        whole = ImageClassification().embedding(model, samples.batch(torch.arange(40)))
    torch.testing.assert_close(found, whole)


def test_sources_that_cannot_be_followed() -> None:
    samples = pictures()
    tokens = TokenSamples(torch.ones(2, 3).long(), torch.ones(2, 3).long(), torch.tensor([0, 1]))
    with pytest.raises(ModelError, match="unknown source of embeddings 'clip'; known: pixels, pca"):
        embed(samples, "clip")
    with pytest.raises(ModelError, match="give a source, or both task and model"):
        embed(samples)
    with pytest.raises(ModelError, match="give a source, or both task and model"):
        embed(samples, "pixels", task=ImageClassification(), model=nn.Identity())
    for source in ("pixels", "pca"):
        with pytest.raises(DataError, match="need images"):
            embed(tokens, source)
    with pytest.raises(DataError, match="needs images"):
        embed(tokens, "simclr")


# --- SimCLR --------------------------------------------------------------------------------------


def test_views_differ_are_seeded_and_leave_the_global_state() -> None:
    images = prepare(pictures(6, channels=3).images)
    state = torch.get_rng_state()
    first, again, other = (
        view(images, config=SimclrConfig(), generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == images.shape
    assert torch.equal(torch.get_rng_state(), state)


def test_a_view_without_any_change_is_the_image() -> None:
    images = prepare(pictures(6).images)
    plain = SimclrConfig(min_area=1.0, jitter=0.0, noise=0.0)
    seen = view(images, config=plain, generator=torch.Generator().manual_seed(0))
    # Shape of the crop still varies (3 : 4 to 4 : 3); a square image of one value stays one.
    flat = torch.full((6, 3, 8, 8), 0.7)
    torch.testing.assert_close(
        view(flat, config=plain, generator=torch.Generator().manual_seed(0)), flat
    )
    assert float(seen.min()) >= float(images.min()) - 1e-6
    assert float(seen.max()) <= float(images.max()) + 1e-6


def ramps(n: int) -> Tensor:
    """Images that grow brighter to the right: mirrored ones grow darker."""
    return torch.linspace(-1, 1, 16).expand(n, 1, 16, 16).clone()


def slopes(images: Tensor) -> Tensor:
    return images[..., 8:].mean((1, 2, 3)) - images[..., :8].mean((1, 2, 3))


def test_views_are_mirrored_only_where_asked_for() -> None:
    config = SimclrConfig(noise=0.0)
    seen = view(ramps(300), config=config, generator=torch.Generator().manual_seed(0))
    assert bool((slopes(seen) > 0).all())
    flipped = replace(config, flip=True)
    share = (slopes(view(ramps(300), config=flipped, generator=torch.Generator())) < 0).double()
    assert 0.38 < float(share.mean()) < 0.62
    assert not SimclrConfig().flip


def test_each_image_of_a_batch_is_changed_in_its_own_way() -> None:
    seen = view(ramps(50), config=SimclrConfig(noise=0.0), generator=torch.Generator())
    assert len({round(float(s), 5) for s in slopes(seen)}) > 45
    colours = torch.zeros(40, 3, 8, 8)
    colours[:, 0] = 1
    config = SimclrConfig(noise=0.0, min_area=1.0)
    seen = view(colours, config=config, generator=torch.Generator().manual_seed(0))
    spread = (seen[:, 0] - seen[:, 1]).mean((1, 2))
    gray = spread.abs() < 1e-6
    assert 2 <= int(gray.sum()) <= 18  # a fifth of 40 in the mean
    assert len({round(float(s), 5) for s in spread[~gray]}) == int((~gray).sum())


@pytest.fixture
def lightly() -> None:
    pytest.importorskip("lightly")


@pytest.mark.usefixtures("lightly")
def test_the_seed_decides_every_bit_and_resuming_changes_none(tmp_path: Path) -> None:
    samples = pictures(33)
    whole = embed(samples, "simclr", seed=1, config=TINY)
    assert whole.shape == (33, 16)
    torch.rand(3)
    assert torch.equal(embed(samples, "simclr", seed=1, config=TINY), whole)
    assert not torch.equal(embed(samples, "simclr", seed=2, config=TINY), whole)

    class CutError(Exception):
        pass

    def cut(epoch: int, _: float) -> None:
        raise CutError(epoch)

    path = tmp_path / "simclr.pt"
    with pytest.raises(CutError, match="0"):
        train_simclr(samples, config=TINY, seed=1, checkpoint=path, on_epoch=cut)
    epochs: list[int] = []
    encoder = train_simclr(
        samples, config=TINY, seed=1, checkpoint=path, on_epoch=lambda e, _: epochs.append(e)
    )
    assert epochs == [1]
    with torch.no_grad():
        assert torch.equal(encoder(samples.batch(torch.arange(33))[0]), whole)
    assert torch.equal(embed(samples, "simclr", seed=1, config=TINY, checkpoint=path), whole)
    with pytest.raises(RunError, match="belongs to another run: seed is 2"):
        embed(samples, "simclr", seed=2, config=TINY, checkpoint=path)


@pytest.mark.usefixtures("lightly")
def test_labels_are_not_looked_at() -> None:
    samples = pictures(20)
    other = ImageSamples(samples.images, samples.labels.flip(0))
    found = [embed(s, "simclr", seed=0, config=TINY) for s in (samples, other)]
    assert torch.equal(found[0], found[1])


@pytest.mark.usefixtures("lightly")
def test_simclr_learns_on_real_digits() -> None:
    """The loss falls, and neighbours in the embedding share their class far above a tenth."""
    data = load_dataset("digits", num_train=400)
    samples = ImageSamples.of(data)
    losses: list[float] = []
    config = SimclrConfig(width=8, epochs=8, batch_size=100)
    encoder = train_simclr(samples, config=config, seed=0, on_epoch=lambda _, x: losses.append(x))
    assert losses[-1] < losses[0] - 0.3
    with torch.no_grad():
        embedded = encoder(samples.batch(torch.arange(400))[0])
    unit = nn.functional.normalize(embedded, dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-1)
    same = samples.labels[similarity.argmax(1)] == samples.labels
    assert float(same.double().mean()) > 0.6
    scores = self_supervised(embedded, num_clusters=10, seed=0)
    assert float(scores.std()) > 0


def test_what_simclr_refuses() -> None:
    with pytest.raises(RunError, match=r"epochs must be.*temperature must be.*min_area must be"):
        SimclrConfig(epochs=0, temperature=0, min_area=2)
    with pytest.raises(DataError, match="two or more, got 1"):
        train_simclr(pictures(1), config=TINY, seed=0)


# --- named networks ------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cache and a proxy that refuses, so that no test depends on the network."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request._opener", None)  # it would keep the proxy for later tests
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


@pytest.mark.usefixtures("offline")
def test_weights_that_cannot_be_had_are_an_error_and_never_random() -> None:
    with pytest.raises(ModelError, match=r"no weights for the model 'resnet18'.*resnet18\?random"):
        embed(pictures(2), "model:resnet18")


def test_random_weights_where_asked_for_follow_the_seed() -> None:
    samples = pictures(2)
    name = "model:squeezenet1_1?random"
    with pytest.raises(ModelError, match="no linear layer"):
        embed(samples, name)
    found = [embed(samples, "model:torchvision/resnet18?random", seed=s) for s in (0, 0, 1)]
    assert found[0].shape == (2, 512)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    with pytest.raises(ModelError, match="torchvision has no classification network 'resnet19'"):
        embed(samples, "model:torchvision/resnet19")


def test_images_are_given_as_the_network_was_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's resnet18: 224×224, three channels, ImageNet's mean and deviation."""
    import torchvision.models  # noqa: PLC0415

    seen: list[Tensor] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return self.fc(x.mean((2, 3)))

    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: Watching())
    white = ImageSamples(torch.full((1, 1, 8, 8), 255, dtype=torch.uint8), torch.tensor([0]))
    embed(white, "model:resnet18?random")
    assert seen[0].shape == (1, 3, 224, 224)
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(seen[0].mean((0, 2, 3)), expected)


def test_timm_networks_give_their_pooled_features() -> None:
    timm = pytest.importorskip("timm")
    samples = pictures(2, channels=3)
    found = embed(samples, "model:timm/test_resnet?random", seed=0)
    assert found.shape == (2, timm.create_model("test_resnet", num_classes=0).num_features)


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """A BERT of a few thousand weights, written by transformers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_folder_of_transformers_embeds_tokens(text_folder: Path) -> None:
    """The mean hidden state over tokens: padding changes nothing, and weights are the folder's."""
    import transformers  # noqa: PLC0415

    ids = torch.randint(1, 30, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    samples = TokenSamples(ids, mask, torch.tensor([0, 1, 0]))
    found = embed(samples, f"model:{text_folder}")
    model = transformers.AutoModel.from_pretrained(text_folder).eval()
    with torch.no_grad():
        hidden = model(input_ids=ids[1:2, :4]).last_hidden_state
    torch.testing.assert_close(found[1:2], hidden.mean(1), atol=1e-5, rtol=1e-4)
    assert not torch.equal(embed(samples, f"model:{text_folder}?random"), found)
    torch.testing.assert_close(embed(samples, f"model:{text_folder}", batch_size=1), found)


def test_a_folder_that_holds_no_model(tmp_path: Path, text_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"not a folder of a transformers or timm model: config"):
        embed(pictures(2), f"model:{tmp_path}")
    (text_folder / "model.safetensors").unlink()
    tokens: Any = TokenSamples(
        torch.ones(2, 3).long(), torch.ones(2, 3).long(), torch.tensor([0, 1])
    )
    with pytest.raises(ModelError, match="no weights for the model"):
        embed(tokens, f"model:{text_folder}")
