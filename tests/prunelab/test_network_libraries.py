"""Networks of torchvision, timm and transformers by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunelab.data.samples import ImageSamples, TokenSamples, sizes
from prunelab.errors import ModelError
from prunelab.networks import build_model, check_model, float_state
from prunelab.training.task import CausalLM, ImageClassification, TextClassification, check_fits

GRAY = (1, 32, 32)


def images(shape: tuple[int, ...] = GRAY, classes: int = 7) -> ImageSamples:
    drawn = torch.randn(14, *shape, generator=torch.Generator().manual_seed(0))
    return ImageSamples(drawn, torch.arange(14) % classes)


@pytest.mark.parametrize(
    "name", ["torchvision/mobilenet_v3_small", "timm/test_vit", "timm/test_resnet"]
)
def test_classes_channels_and_size_reach_a_library(name: str) -> None:
    """And the seed decides every bit, whatever torch's own generator does."""
    if name.startswith("timm"):
        pytest.importorskip("timm")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    check_model(name)
    one = build_model(name, num_classes=7, input_shape=GRAY, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    other = build_model(name, num_classes=7, input_shape=GRAY, seed=3)
    assert one.eval()(torch.zeros(2, *GRAY)).shape == (2, 7)
    check_fits(ImageClassification(), one, images(), num_classes=None)
    assert all(torch.equal(v, float_state(other)[n]) for n, v in float_state(one).items())


def test_torchvisions_vision_transformers_take_images_of_any_size() -> None:
    model = build_model("torchvision/vit_b_32", num_classes=2, input_shape=(3, 64, 64), seed=0)
    assert model.seq_length == 1 + 2 * 2
    with pytest.raises(ModelError, match=r"torchvision/vit_b_32: it takes square images, got 64×3"):
        build_model("torchvision/vit_b_32", num_classes=2, input_shape=(3, 64, 32), seed=0)
    with pytest.raises(ModelError, match=r"cannot be built for classes 2, shape \(3, 60, 60\)"):
        build_model("torchvision/vit_b_32", num_classes=2, input_shape=(3, 60, 60), seed=0)


def test_a_network_gives_logits_alone_in_training_too() -> None:
    """googlenet has two classifiers beside the last in training, where nobody says otherwise."""
    model = build_model("torchvision/googlenet", num_classes=4, input_shape=GRAY, seed=0)
    assert model.train()(torch.zeros(2, *GRAY)).shape == (2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations of transformers, a folder each; that of the language model asks for halves."""
    hf = pytest.importorskip("transformers")
    out = tmp_path_factory.mktemp("configurations")
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    text = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 1}
    size["num_hidden_layers"] = 1
    hf.ViTConfig(**size, image_size=224, patch_size=8).save_pretrained(out / "vit")
    hf.BertConfig(**size, vocab_size=20, max_position_embeddings=8).save_pretrained(out / "bert")
    hf.LlamaConfig(**size, **text, dtype="bfloat16").save_pretrained(out / "llama")
    return out


def texts(targets: torch.Tensor, *, largest: int = 19, length: int = 6) -> TokenSamples:
    ids = torch.arange(4 * length).reshape(4, length) % 20
    ids[2, 1] = largest
    return TokenSamples(ids, torch.ones_like(ids), targets)


def built(folder: Path, samples: Any) -> nn.Module:
    num_classes, shape = sizes(samples)
    return build_model(f"hf/{folder}", num_classes=num_classes, input_shape=shape, seed=0)


def test_samples_decide_the_head_of_transformers_networks(folder: Path) -> None:
    pictures, labelled = images(), texts(torch.arange(4) % 3)
    spoken = texts(torch.arange(24).reshape(4, 6) % 20)
    for kind, task, samples, head in (
        ("vit", ImageClassification(), pictures, "ViTForImageClassification"),
        ("bert", TextClassification(), labelled, "BertForSequenceClassification"),
        ("llama", CausalLM(), spoken, "LlamaForCausalLM"),
    ):
        model = built(folder / kind, samples)
        assert type(model).__name__ == head
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        check_fits(task, model, samples, num_classes=None)
    assert built(folder / "vit", pictures)(torch.zeros(2, *GRAY)).logits.shape == (2, 7)


def test_texts_that_do_not_fit_are_told_before_they_are_reached(folder: Path) -> None:
    """Of all texts the longest and one with the largest token are tried."""
    labels = torch.arange(4) % 3
    model = built(folder / "bert", texts(labels)).train()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    random = torch.get_rng_state()
    with pytest.raises(ModelError, match=r"texts \[2, 6\] of tokens up to 20: IndexError"):
        check_fits(TextClassification(), model, texts(labels, largest=20), num_classes=None)
    with pytest.raises(ModelError, match=r"does not fit texts \[2, 9\]"):
        check_fits(TextClassification(), model, texts(labels, length=9), num_classes=None)
    with pytest.raises(ModelError, match="gives 3 logits, and the data have 4 classes"):
        check_fits(TextClassification(), model, texts(torch.arange(4)), num_classes=None)
    with pytest.raises(ModelError, match="gives 3 logits, and the data have 9 classes"):
        check_fits(TextClassification(), model, texts(labels), num_classes=9)
    with pytest.raises(ModelError, match=r"does not fit images \[2, 1, 32, 32\]: "):
        check_fits(ImageClassification(), model, images(), num_classes=None)
    assert model.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_images_that_are_too_small_are_called_so() -> None:
    model = build_model("torchvision/alexnet", num_classes=7, input_shape=GRAY, seed=0)
    with pytest.raises(ModelError, match=r"\[2, 1, 32, 32\]: .*; the images are too small for it"):
        check_fits(ImageClassification(), model, images(), num_classes=None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torchvision/mobilnet_v3_smal", "did you mean 'mobilenet_v3_small'"),
        ("torchvision/", "torchvision has no such network; it has"),
        ("timm/resnet18d_", "did you mean 'resnet18d'"),
        ("mobilenet_v3_small", "did you mean 'torchvision/mobilenet_v3_small'"),
        ("reznet8", "known models: resnet8, .*torchvision/NAME, timm/NAME, hf/NAME; did you mean"),
        ("hf/./nowhere", "there is no folder ./nowhere"),
        ("torchvision.models:resnet17", "has no 'resnet17'"),
    ],
)
def test_unknown_names_are_told_with_those_like_them(name: str, words: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(ModelError, match=words):
        check_model(name)
    with pytest.raises(ModelError, match=words):
        build_model(name, num_classes=2, input_shape=(3, 32, 32), seed=0)


def test_what_a_library_cannot_do_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name, classes, shape, words in (
        (f"hf/{tmp_path}", 2, (3, 8, 8), "cannot be built .*model_type"),
        (f"hf/{folder}/bert", 2, (3, 8, 8), "cannot be built .*BertConfig"),
        ("torchvision/resnet18", None, None, "it is for labelled images"),
        ("torchvision/resnet18", 2, (64,), "it is for labelled images"),
        ("torchvision/resnet18", 2, (3, 0, 8), "image height must be at least 1, got 0"),
    ):
        with pytest.raises(ModelError, match=words) as raised:
            build_model(name, num_classes=classes, input_shape=shape, seed=0)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "package"), [("timm/x", "timm"), ("hf/x", "transformers")])
def test_a_library_that_is_missing_says_what_to_install(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelError, match=rf"needs {package}: pip install 'fedprune\[embeddings\]'"):
        check_model(name)
