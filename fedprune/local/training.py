"""What a client does with its own data: local SGD at the mask, and evaluation.

Pure functions of a model, tensors and a seed; they know nothing of transport or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from fedprune.config import TrainingConfig
from fedprune.errors import ConfigError
from fedprune.exchange.messages import Entries
from fedprune.local.execution import local_model
from prunelab.data.batches import batches
from prunelab.data.tensors import augmented as varied
from prunelab.data.tensors import prepare
from prunelab.runs.seeds import rng
from sparsemodel.masks.mask import Mask

EVALUATION_BATCH = 256


@dataclass(frozen=True)
class LocalResult:
    """What local training did: mean loss of the last epoch, samples seen, bytes held.

    `state_bytes` is the storage of weights, gradients, momentum and indices really allocated.
    `growth` holds the gradients that a `GrowthBatch` asked for.
    """

    loss: float
    samples_seen: int
    state_bytes: int
    growth: Entries


@dataclass(frozen=True)
class GrowthBatch:
    """How many gradients at pruned weights are wanted of each layer, and on which samples."""

    counts: Mapping[str, int]
    samples: torch.Tensor


@dataclass(frozen=True)
class Evaluation:
    """Sums over samples, so that results of several clients can be added."""

    loss_sum: float
    num_correct: int
    num_samples: int

    @property
    def accuracy(self) -> float:
        """Share of samples classified right, in [0, 1]."""
        return self.num_correct / self.num_samples

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return self.loss_sum / self.num_samples


def round_learning_rate(config: TrainingConfig, round_index: int) -> float:
    """Cosine decay from `config.lr` in round 0 towards 0 after the last round."""
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * round_index / config.rounds))


def compute_device(name: str) -> torch.device:
    """The torch device of that name.

    Raises:
        ConfigError: "cuda" was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("training.device is 'cuda' but torch finds no CUDA device; use 'cpu'")
    return torch.device(name)


def train_locally(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    mask: Mask | None,
    config: TrainingConfig,
    lr: float,
    epochs: int,
    seed: int,
    augmented: bool = False,
    growth: GrowthBatch | None = None,
) -> LocalResult:
    """Train `model` in place on one client's samples; pruned weights stay exactly zero.

    Args:
        images: uint8 or float32 [N, C, H, W], N >= 2 (batch norm needs two samples).
        labels: int64 [N].
        seed: decides the order of samples and the augmentation.
        growth: asks for the largest gradients at pruned weights once training is over.
    """
    device = next(model.parameters()).device
    if mask is not None:
        mask.apply(model)
    local = local_model(model, mask, input_shape=tuple(images.shape[1:]), config=config, lr=lr)
    loss_sum, samples = 0.0, 0
    for epoch, batch, target in local_batches(
        images, labels, config=config, epochs=epochs, seed=seed, augmented=augmented
    ):
        loss = local.step(prepare(batch).to(device), target.to(device))
        samples += len(target)
        if epoch == epochs - 1:
            loss_sum += loss * len(target)
    state_bytes = local.state_bytes()
    entries: Entries = {}
    if growth is not None:
        batch = prepare(images[growth.samples]).to(device)
        entries = local.growth(growth.counts, batch, labels[growth.samples].to(device))
    local.finish()
    return LocalResult(loss_sum / max(1, len(labels)), samples, state_bytes, entries)


def local_batches(
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    config: TrainingConfig,
    epochs: int,
    seed: int,
    augmented: bool,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Epoch, images and labels of every mini-batch of a client's local training, in its order."""
    order = rng(seed)
    for epoch in range(epochs):
        for drawn in batches(len(labels), batch_size=config.batch_size, rng=order):
            index = torch.from_numpy(drawn)
            batch = images[index]
            yield epoch, varied(batch, rng=order) if augmented else batch, labels[index]


@torch.no_grad()
def evaluate(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Evaluation:
    """Loss and accuracy with the model's running statistics; the model is not changed."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loss_sum, correct = 0.0, 0
    for start in range(0, len(labels), EVALUATION_BATCH):
        part = slice(start, start + EVALUATION_BATCH)
        logits = model(prepare(images[part]).to(device)).float().cpu()
        target = labels[part]
        loss_sum += float(functional.cross_entropy(logits, target, reduction="sum").double())
        correct += int((logits.argmax(1) == target).sum())
    model.train(was_training)
    return Evaluation(loss_sum, correct, len(labels))
