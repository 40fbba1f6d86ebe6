"""GraNd against torch.func on real networks, and VoG by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from datapruning.errors import ScoreError
from datapruning.scores.error import el2n
from datapruning.scores.gradient import grand, vog
from prunelab.data.samples import ImageSamples, TokenSamples
from prunelab.networks import build_model
from prunelab.training.task import CausalLM, ImageClassification, TextClassification
from sparsemodel.layers.sparsify import sparsify
from sparsemodel.masks.mask import Mask

IMAGES = ImageClassification()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def resnet8() -> nn.Module:
    model = build_model("resnet8", num_classes=10, input_shape=(3, 16, 16), seed=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def images(count: int) -> ImageSamples:
    return ImageSamples(torch.randn(count, 3, 16, 16), torch.arange(count) % 10)


def functional_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Norms of torch.func.vmap's per-sample gradients."""
    state = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, parameters, (x[None],))
        return functional.cross_entropy(logits, y[None])

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(state, x, y)
    squares = [g.flatten(1).double().square().sum(1) for g in gradients.values()]
    return torch.stack(squares).sum(0).sqrt()


def looped_norms(
    model: nn.Module, task: Any, samples: Any, names: set[str] | None = None
) -> Tensor:
    """One batch of one and one backward pass a sample."""
    parameters = [p for n, p in model.named_parameters() if p.requires_grad and (
        names is None or n in names)]  # fmt: skip
    norms = []
    for row in range(len(samples)):
        loss = task.loss(model, samples.batch(torch.tensor([row])))
        gradients = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)
        norms.append(sum(g.double().square().sum() for g in gradients if g is not None).sqrt())
    return torch.stack(norms)


def in_batches(model: nn.Module, task: Any, samples: Any, size: int) -> Tensor:
    parts = torch.arange(len(samples)).split(size)
    return torch.cat([grand(task, model, samples.batch(rows)) for rows in parts])


@pytest.mark.parametrize("size", [1, 3, 7])
def test_grand_of_a_resnet_equals_vmap_in_any_batch_size(size: int) -> None:
    """Seven samples, so that the last batch of three has one."""
    model, samples = resnet8(), images(7)
    expected = functional_norms(model, *samples.batch(torch.arange(7)))
    torch.testing.assert_close(
        in_batches(model, IMAGES, samples, size), expected, rtol=1e-5, atol=0
    )


def test_grand_of_the_last_layer_is_el2n_times_the_input() -> None:
    """∇_W = (p − y) ⊗ h and ∇_b = p − y: together EL2N · √(1 + ‖h‖²)."""
    model, samples = resnet8(), images(4)
    batch = samples.batch(torch.arange(4))
    scores = grand(IMAGES, model, batch, parameters=["fc.weight", "fc.bias"])
    with torch.no_grad():
        hidden = IMAGES.embedding(model, batch).double()
        errors = el2n(model(batch[0]), batch[1])
    torch.testing.assert_close(
        scores, errors * (1 + hidden.square().sum(1)).sqrt(), rtol=1e-5, atol=0
    )


def test_grand_of_a_sparse_model_is_of_its_active_weights() -> None:
    model, samples = resnet8(), images(5)
    generator = torch.Generator().manual_seed(0)
    names = [n for n, p in model.named_parameters() if p.dim() > 1 and n != "conv1.weight"]
    mask = Mask(
        {n: torch.rand(model.get_parameter(n).shape, generator=generator) < 0.2 for n in names}
    )
    sparse = sparsify(model, mask)
    expected = looped_norms(sparse, IMAGES, samples)
    torch.testing.assert_close(in_batches(sparse, IMAGES, samples, 2), expected, rtol=2e-5, atol=0)


def token_samples(count: int, *, classes: int = 0) -> TokenSamples:
    """Texts of different lengths; the prompts of a language model have no targets."""
    lengths = torch.arange(count) % 5 + 6
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = torch.randint(1, 50, (count, 12)) * mask
    targets = ids.masked_fill(mask == 0, -100)
    targets[:, :2] = -100
    return TokenSamples(ids, mask, torch.arange(count) % classes if classes else targets)


def language_model(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model: nn.Module
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **common)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings="tied" in kind,
            attn_implementation="eager" if "eager" in kind else "sdpa", **common,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    for p in model.parameters():  # norms and biases start at ones and zeros
        nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "llama tied", "llama eager", "gpt2"])
def test_grand_of_language_models(kind: str) -> None:
    """Tied heads, embedded positions, RMS norms, Conv1D; batches of 1, 2 and a last partial one."""
    model, samples = language_model(kind), token_samples(5)
    expected = looped_norms(model, CausalLM(), samples)
    for size in (1, 2, 5):
        scores = in_batches(model, CausalLM(), samples, size)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0)


def test_grand_of_a_text_classifier() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    samples = token_samples(5, classes=3)
    expected = looped_norms(model, TextClassification(), samples)
    scores = in_batches(model, TextClassification(), samples, 2)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft and transformers to each other
def test_grand_of_adapters_is_of_what_is_trainable() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1
    )
    model = peft.get_peft_model(language_model("llama"), config).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:  # starts at zero
            nn.init.normal_(p)
    samples = token_samples(4)
    assert all("lora" in n for n, p in model.named_parameters() if p.requires_grad)
    expected = looped_norms(model, CausalLM(), samples)
    scores = in_batches(model, CausalLM(), samples, 3)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0)


def test_grand_refuses_train_mode_and_unknown_names() -> None:
    model, batch = resnet8(), images(2).batch(torch.arange(2))
    with pytest.raises(ScoreError, match=r"no parameter 'fc\.odd'"):
        grand(IMAGES, model, batch, parameters=["fc.odd"])
    model.get_submodule("layer1.0.bn1").train()
    with pytest.raises(ScoreError, match=r"layer1\.0\.bn1.* is in train mode.*model\.eval\(\)"):
        grand(IMAGES, model, batch)


def linear(*rows: list[float]) -> nn.Module:
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows))
    return nn.Sequential(nn.Flatten(), layer).eval()


def test_vog_by_hand() -> None:
    """Input gradients of label 0 are (1, 5), (3, 5), (5, 5): deviations √(8/3) and 0.

    Their mean is √(8/3) / 2. Label 1 has the same gradient everywhere: 0.
    """
    models = [linear([first, 5.0], [7.0, 7.0]) for first in (1.0, 3.0, 5.0)]
    batch = torch.randn(2, 1, 1, 2), torch.tensor([0, 1])
    assert vog(IMAGES, models, batch).tolist() == pytest.approx([(8 / 3) ** 0.5 / 2, 0])


def test_vog_of_a_network_equals_a_plain_loop() -> None:
    models = [resnet8() for _ in range(3)]
    for model in models:
        nn.init.normal_(model.get_parameter("fc.weight"))
    samples = images(4)
    gradients = torch.empty(3, 4, 3, 16, 16)
    for k, model in enumerate(models):
        for row in range(4):
            x, y = samples.batch(torch.tensor([row]))
            x.requires_grad_()
            gradients[k, row] = torch.autograd.grad(model(x)[0, y[0]], x)[0][0]
    expected = gradients.double().std(0, correction=0).flatten(1).mean(1)
    scores = vog(IMAGES, models, samples.batch(torch.arange(4)))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0)


def test_vog_refusals() -> None:
    batch = images(2).batch(torch.arange(2))
    with pytest.raises(ScoreError, match="two or more, got 1"):
        vog(IMAGES, [resnet8()], batch)
    with pytest.raises(ScoreError, match="not CausalLM"):
        vog(CausalLM(), [], batch)
    with pytest.raises(ScoreError, match="tokens have none"):
        vog(
            TextClassification(),
            [resnet8()] * 2,
            token_samples(2, classes=2).batch(torch.arange(2)),
        )


def test_scoring_leaves_the_model_alone() -> None:
    model, batch = resnet8(), images(3).batch(torch.arange(3))
    before = copy.deepcopy(model.state_dict())
    grand(IMAGES, model, batch)
    vog(IMAGES, [model, model], batch)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
