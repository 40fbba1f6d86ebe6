"""Training in bfloat16: what it computes, that it repeats and resumes, what stays float32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_training import TASK, Counter, Watcher, image_samples, same_bits, small_model
from torch import Tensor, nn
from torch.nn import functional

import datapruning
from datapruning.errors import ScoreError
from datapruning.scoring.proxy import sparse_proxy
from prunelab.data.samples import TargetSamples, TokenSamples
from prunelab.data.tensors import prepare
from prunelab.errors import RunError
from prunelab.training.loop import TrainingConfig, evaluate, predict, train
from prunelab.training.precision import computing_in
from prunelab.training.task import CausalLM, Regression


def bfloat16(**changed: Any) -> TrainingConfig:
    values: dict[str, Any] = {"batch_size": 8, "lr": 0.02, "precision": "bfloat16"}
    return TrainingConfig(**values | changed)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_is_torchs_own_to_the_bit(precision: str) -> None:
    """float32 as ever; bfloat16 is autocast of the network, a loss of float32 logits."""
    samples, model, expected = image_samples(), small_model(), small_model()
    config = bfloat16(steps=1, precision=precision)
    watcher = Watcher()
    result = train(model, samples, TASK, config=config, seed=0, callbacks=[watcher])

    [(_, rows, seen, labels)] = watcher.batches
    images = prepare(samples.images[rows])
    optimizer = torch.optim.SGD(expected.parameters(), 0.02, 0.9, weight_decay=5e-4)
    if precision == "bfloat16":
        images = images.clone(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = expected(images)
        assert logits.dtype == torch.bfloat16
        logits = logits.float()
    else:
        logits = expected(images)
    loss = functional.cross_entropy(logits, labels)
    loss.backward()
    optimizer.step()
    assert same_bits(model, expected)
    assert seen.dtype == torch.float32
    assert torch.equal(seen, logits.detach())
    assert result.losses == pytest.approx([float(loss.detach())], rel=1e-6)


def test_comes_to_nearly_the_loss_of_float32_and_leaves_the_model_as_it_was() -> None:
    samples, held_out = image_samples(120), image_samples(300, seed=1)
    losses = {}
    for precision in ("float32", "bfloat16"):
        model = small_model()
        config = TrainingConfig(epochs=8, lr=0.05, precision=precision)
        losses[precision] = train(model, samples, TASK, config=config, seed=0).losses
        assert evaluate(model, held_out, TASK).accuracy > 0.95
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    assert losses["bfloat16"] != losses["float32"]
    assert "forward" not in vars(model)
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in model.parameters())
    logits, _ = predict(model, held_out, TASK)
    with torch.no_grad():
        torch.testing.assert_close(logits, model.eval()(prepare(held_out.images)))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_repeats_and_resumes_to_the_same_bits(tmp_path: Path, optimizer: str) -> None:
    config = bfloat16(epochs=4, augment=True, optimizer=optimizer)
    samples, file = image_samples(), tmp_path / "checkpoint.pt"

    def run(counter: Counter, checkpoint: Path | None = None) -> nn.Module:
        model = small_model(dropout=0.3)
        train(model, samples, TASK, config=config, seed=3, callbacks=[counter],
              checkpoint=checkpoint)  # fmt: skip
        return model

    expected = run(Counter())
    assert same_bits(run(Counter()), expected)
    with pytest.raises(KeyboardInterrupt):
        run(Counter(die_at=2), file)
    assert same_bits(run(Counter(), file), expected)


def test_files_from_before_there_was_a_choice_are_of_float32(tmp_path: Path) -> None:
    before = {
        "epochs", "batch_size", "lr", "momentum", "weight_decay", "augment", "steps", "optimizer",
    }  # fmt: skip
    assert TrainingConfig().signature().keys() == before
    assert bfloat16().signature().keys() == before | {"precision"}
    file, samples = tmp_path / "checkpoint.pt", image_samples()
    for precision in ("float32", "bfloat16"):
        config = bfloat16(epochs=1, precision=precision)
        if precision == "float32":
            train(small_model(), samples, TASK, config=config, seed=0, checkpoint=file)
            continue
        with pytest.raises(RunError, match="precision is 'bfloat16', the checkpoint's None"):
            train(small_model(), samples, TASK, config=config, seed=0, checkpoint=file)


@pytest.mark.parametrize(("num_rows", "batch_size"), [(1, 8), (6, 1), (9, 4)])
def test_few_samples(num_rows: int, batch_size: int) -> None:
    config = bfloat16(epochs=2, batch_size=batch_size)
    rows = torch.arange(num_rows)
    result = train(small_model(), image_samples(), TASK, config=config, seed=0, rows=rows)
    assert result.samples_seen == 2 * num_rows
    assert all(map(math.isfinite, result.losses))


def test_targets_and_objectives_are_not_rounded() -> None:
    """1001 is no number of bfloat16, and neither is the loss of outputs of 0."""
    network = nn.Linear(4, 1)
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    samples = TargetSamples(torch.ones(8, 4), torch.full((8,), 1001.0))
    result = train(network, samples, Regression(), config=bfloat16(steps=1), seed=0)
    assert result.losses == (1001.0**2 / 2,)

    teacher = small_model(seed=1)
    images = image_samples()

    def objective(logits: Tensor, batch: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        assert logits.dtype == torch.float32
        with torch.no_grad():
            answer = TASK.logits(teacher, batch)
            assert torch.equal(answer, teacher(prepare(images.images[rows])))
        return functional.mse_loss(logits, answer)

    train(small_model(), images, TASK, config=bfloat16(epochs=1), seed=0, objective=objective)


class Packed(NamedTuple):
    logits: Tensor
    more: dict[str, Tensor]


def test_outputs_are_float32_however_they_are_packed() -> None:
    class Network(nn.Linear):
        def forward(self, inputs: Tensor) -> Any:
            outputs = super().forward(inputs)
            assert outputs.dtype == torch.bfloat16
            return Packed(outputs, {"twice": 2 * outputs, "place": outputs.argmax(1)})

    network = Network(4, 3)
    with computing_in("bfloat16", network):
        found = network(torch.ones(2, 4))
    assert isinstance(found, Packed)
    assert found.logits.dtype == found.more["twice"].dtype == torch.float32
    assert found.more["place"].dtype == torch.int64


def test_language_models_train_in_bfloat16() -> None:
    transformers = pytest.importorskip("transformers")
    settings_ = transformers.LlamaConfig(
        vocab_size=13, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    ids = (torch.arange(8)[:, None] + torch.arange(6)) % 10 + 3
    samples = TokenSamples(ids, torch.ones_like(ids), ids.clone())
    losses = {}
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(settings_)
        config = TrainingConfig(
            epochs=30, batch_size=4, lr=0.02, optimizer="adamw", precision=precision
        )
        train(model, samples, CausalLM(), config=config, seed=0)
        losses[precision] = evaluate(model, samples, CausalLM()).loss
    assert losses["float32"] != losses["bfloat16"] < 0.3
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.05)


def test_refusals() -> None:
    samples = image_samples()
    with pytest.raises(RunError, match="precision must be one of float32, bfloat16, got 'half'"):
        TrainingConfig(precision="half")
    sparse = sparse_proxy(small_model(), samples, TASK, density=0.3)
    with pytest.raises(RunError, match=r"bfloat16 is for dense networks, and this .* sparsified"):
        train(sparse, samples, TASK, config=bfloat16(), seed=0)
    with pytest.raises(ScoreError, match="a sparse proxy is trained in float32"):
        datapruning.score(samples, method="el2n", density=0.3, training=bfloat16())

    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(144, 3)

        def forward(self, images: Tensor) -> Any:
            return self.head(self.conv(images).view(-1, 144))

    model = Viewing()
    with pytest.raises(RunError, match=r"Viewing calls view\(\) on one; let it call reshape"):
        train(model, samples, TASK, config=bfloat16(), seed=0)
    assert "forward" not in vars(model)
    train(model, samples, TASK, config=bfloat16(epochs=1, precision="float32"), seed=0)
