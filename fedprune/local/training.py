"""A client's local training: SGD on its own samples at the mask, and growth candidates after it.

Pure functions of a request and the client's data and model; the default answer to "train", and
what methods make their own answers of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedprune.errors import ClientError
from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.local.model import Correction, LocalModel, Sgd
from fedprune.settings import TrainingConfig
from prunelab.data.batches import augment, batches
from prunelab.runs.seeds import rng
from sparsemodel.masks.schedule import cosine

if TYPE_CHECKING:
    from fedprune.local.site import Local

# The first part of a derived seed says what it is for, so that no two uses share a stream.
SEED_ROUND, SEED_GROWTH = 3, 4

Array = NDArray[Any]


def train(request: Request, local: Local, *, correction: Correction | None = None) -> Reply:
    """Train the request's model for the configured epochs; the default answer to "train".

    Args:
        correction: changes gradients before each step (a proximal term, say).

    Raises:
        ClientError: too few samples.
    """
    require_samples(len(local.data.train_labels))
    training = local.config.training
    model = local.open(request.state(MODEL))
    loss = train_epochs(
        model,
        local.data.train_images,
        local.data.train_labels,
        sgd=round_sgd(training, request.round_index),
        epochs=training.local_epochs,
        batch_size=training.batch_size,
        seed=local.seed(SEED_ROUND, request.round_index),
        augmented=local.config.data.augment,
        correction=correction,
    )
    state, held = model.state(), model.held_bytes()  # before growth, which frees gradients
    entries = {}
    if counts := growth_counts(request):
        rows = growth_rows(local, request.round_index)
        images, labels = local.data.train_images[rows], local.data.train_labels[rows]
        entries = {MODEL: model.growth(counts, images, labels)}
    return Reply(
        num_examples=len(local.data.train_labels),
        fields={"loss": loss},
        states={MODEL: state},
        entries=entries,
        resources=local.resources(held, request) if request.report_resources else None,
    )


def require_samples(count: int) -> None:
    """Raise ClientError unless a client with so many training samples can train."""
    if count < 2:
        raise ClientError(f"{count} training sample(s); batch norm needs at least 2")


def round_sgd(training: TrainingConfig, round_index: int) -> Sgd:
    """The optimiser's numbers in a round: the learning rate decays by a cosine towards 0."""
    rate = cosine(round_index, value=training.lr, end=training.rounds)
    return Sgd(rate, training.momentum, training.weight_decay)


def train_epochs(
    model: LocalModel,
    images: Array,
    labels: Array,
    *,
    sgd: Sgd,
    epochs: int,
    batch_size: int,
    seed: int,
    augmented: bool = False,
    correction: Correction | None = None,
) -> float:
    """Train a model on samples; the mean loss of the last epoch.

    Args:
        images: uint8 or float32 [N, C, H, W], N >= 2 (batch norm needs two samples).
        labels: int64 [N].
        seed: decides the order of samples and the augmentation.
    """
    loss_sum = 0.0
    for epoch, batch, target in epoch_batches(
        images, labels, epochs=epochs, batch_size=batch_size, seed=seed, augmented=augmented
    ):
        loss = model.step(batch, target, sgd=sgd, correction=correction)
        if epoch == epochs - 1:
            loss_sum += loss * len(target)
    return loss_sum / max(1, len(labels))


def epoch_batches(
    images: Array, labels: Array, *, epochs: int, batch_size: int, seed: int, augmented: bool
) -> Iterator[tuple[int, Array, Array]]:
    """Epoch, images and labels of every mini-batch of a client's local training, in its order."""
    order = rng(seed)
    for epoch in range(epochs):
        for index in batches(len(labels), batch_size=batch_size, rng=order):
            batch = images[index]
            yield epoch, augment(batch, rng=order) if augmented else batch, labels[index]


def growth_counts(request: Request) -> Mapping[str, int]:
    """Layer -> how many growth candidates the request asks for.

    Raises:
        ClientError: it does not say so in the form of `methods.base.train_request`.
    """
    patterns = request.state(MODEL).patterns
    order = [] if patterns is None else list(patterns)
    wanted: dict[str, int] = {}
    for entry in request.fields.get("grow", ()):
        match entry:
            case [int(place), int(count)] if 0 <= place < len(order) and count >= 0:
                wanted[order[place]] = count
            case _:
                raise ClientError(f"field 'grow': expected a layer and a count, got {entry!r:.60}")
    return wanted


def growth_rows(local: Local, round_index: int) -> NDArray[np.int64]:
    """One mini-batch, drawn anew, for the gradients at pruned weights after local training."""
    order = rng(local.seed(SEED_GROWTH, round_index)).permutation(len(local.data.train_labels))
    return order[: local.config.training.batch_size]
