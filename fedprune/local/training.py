"""A client's local training on its own samples at the mask, and growth candidates after it.

Pure functions of a request and the client's data and model; the default answers to "train" and
"evaluate", and what methods make their own answers of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedprune.errors import ClientError
from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.local.model import Correction, LocalModel, Sgd
from fedprune.local.optimizer import Optimizer
from prunelab.data.batches import Integers, batches, cropped, draw_crops
from prunelab.runs.seeds import rng, stream_seed

if TYPE_CHECKING:
    from fedprune.local.site import Local

# The first part of a derived seed says what it is for, so that no two uses share a stream.
SEED_ROUND, SEED_GROWTH = 3, 4

GROWTH_BATCHES = "growth_batches"
"""The field that asks for growth over so many mini-batches, 0: all; without it, over one."""

Array = NDArray[Any]


class Plan(NamedTuple):
    """All that is drawn for a local training.

    Attributes:
        rows: int64 [1, samples of all epochs], which sample is taken; with augmentation [4, ...],
            below it what `draw_crops` gives.
        sizes: of the mini-batches, in their order.
        last: how many of these are the last epoch's.
    """

    rows: Integers
    sizes: list[int]
    last: int


@runtime_checkable
class TrainsWhole(Protocol):
    """A model that may do a whole local training by itself, without a word between steps."""

    def train_whole(
        self, inputs: Array, targets: Array, plan: Callable[[], Plan], *, sgd: Sgd
    ) -> float | None:
        """Sum of the losses of the last epoch's samples; None: it does not, and is unchanged.

        Args:
            plan: draws.
        """
        ...


def train(
    request: Request,
    local: Local,
    *,
    correction: Correction | None = None,
    optimizer: Optimizer | None = None,
    model: LocalModel | None = None,
) -> Reply:
    """Train the request's model for the configured epochs; the default answer to "train".

    Args:
        correction: changes gradients before each step (a proximal term, say).
        optimizer: in place of the run's, with a correction of its own.
        model: that holds the request's, in place of the run's network.

    Raises:
        ClientError: too few samples.
    """
    require_samples(len(local.data.train), request)
    training, own = local.config.training, local.data.train
    if optimizer is None:
        optimizer = Optimizer(training, request.round_index, correction=correction)
    if model is None:
        model = local.open(request.state(MODEL))
    loss = train_epochs(
        model,
        own.inputs,
        own.targets,
        sgd=optimizer.sgd,
        epochs=training.local_epochs,
        batch_size=training.batch_size,
        seed=local.seed(SEED_ROUND, request.round_index),
        augmented=local.config.data.augment,
        correction=optimizer.correction,
    )
    # Before growth, which frees gradients.
    state, held = model.state(), model.held_bytes() + optimizer.held_bytes()
    entries = {}
    if counts := growth_counts(request):
        rows = growth_rows(local, request.round_index)
        entries = {MODEL: model.growth(counts, own.inputs[rows], own.targets[rows])}
    return Reply(
        num_examples=len(local.data.train),
        fields={"loss": loss},
        states={MODEL: state},
        entries=entries,
        resources=local.resources(held, request) if request.report_resources else None,
    )


def evaluate(request: Request, local: Local) -> Reply:
    """Loss and metric of the request's model on the client's own test samples, as sums.

    Raises:
        ClientError: it has none.
    """
    test = local.data.test
    if not len(test):
        raise ClientError("no test sample: the client has fewer than four samples")
    score = local.open(request.state(MODEL)).evaluate(test.inputs, test.targets)
    return Reply(len(test), {"loss": score.loss_sum, "metric": score.metric_sum})


def require_samples(count: int, request: Request, name: str = MODEL) -> None:
    """Raise ClientError unless a client with so many training samples can train a state."""
    names = request.state(name).values
    has_norms = any(name.endswith("running_mean") for name in names)
    if count < 1 + has_norms:
        why = "batch norm needs at least 2" if has_norms else "there is nothing to train on"
        raise ClientError(f"{count} training sample(s); {why}")


def train_epochs(
    model: LocalModel,
    inputs: Array,
    targets: Array,
    *,
    sgd: Sgd,
    epochs: int,
    batch_size: int,
    seed: int,
    augmented: bool = False,
    correction: Correction | None = None,
    before_step: Callable[[int], None] | None = None,
) -> float:
    """Train a model on samples; the mean loss of the last epoch.

    Args:
        inputs, targets: [N, ...] as a store has them, N >= 2 (batch norm needs two samples).
        seed: decides the order of samples, the augmentation and what layers draw.
        before_step: is told the number of each step, from 0 on.
    """
    count = max(1, len(targets))
    if correction is None and before_step is None and isinstance(model, TrainsWhole):
        plan = partial(
            training_plan,
            inputs,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            augmented=augmented,
        )
        if (whole := model.train_whole(inputs, targets, plan, sgd=sgd)) is not None:
            return whole / count
    loss_sum = 0.0
    source = epoch_batches(
        inputs, targets, epochs=epochs, batch_size=batch_size, seed=seed, augmented=augmented
    )
    for number, (epoch, batch, target) in enumerate(source):
        if before_step is not None:
            before_step(number)
        drawn = stream_seed(seed, number)
        loss = model.step(batch, target, sgd=sgd, correction=correction, seed=drawn)
        if epoch == epochs - 1:
            loss_sum += loss * len(target)
    return loss_sum / count


def training_plan(
    inputs: Array, *, epochs: int, batch_size: int, seed: int, augmented: bool
) -> Plan:
    """What `epoch_batches` would draw, before anything is computed."""
    drawn = list(_draws(inputs, epochs, batch_size, seed, augmented))
    sizes = [rows.shape[1] for _, rows in drawn]
    rows = np.concatenate([rows for _, rows in drawn], axis=1) if drawn else np.empty((1, 0), int)
    return Plan(rows, sizes, sum(epoch == epochs - 1 for epoch, _ in drawn))


def epoch_batches(
    inputs: Array, targets: Array, *, epochs: int, batch_size: int, seed: int, augmented: bool
) -> Iterator[tuple[int, Array, Array]]:
    """Epoch, inputs and targets of every mini-batch of a client's local training, in its order."""
    for epoch, (index, *crops) in _draws(inputs, epochs, batch_size, seed, augmented):
        batch = inputs[index]
        yield epoch, cropped(batch, np.stack(crops)) if augmented else batch, targets[index]


def _draws(
    inputs: Array, epochs: int, batch_size: int, seed: int, augmented: bool
) -> Iterator[tuple[int, Integers]]:
    """Epoch and rows of a `Plan` of every mini-batch."""
    order = rng(seed)
    for epoch in range(epochs):
        for index in batches(len(inputs), batch_size=batch_size, rng=order):
            if augmented:
                crops = draw_crops(len(index), height=inputs.shape[2], rng=order)
                yield epoch, np.concatenate([index[None], crops])
            else:
                yield epoch, index[None]


def gradient_batches(
    local: Local, round_index: int, *, most: int = 0
) -> Iterator[tuple[Array, Array]]:
    """Inputs and targets of mini-batches for gradients at one state: the same ones each time.

    Args:
        most: how many; 0: as many as the training samples make.
    """
    own = local.data.train
    source = epoch_batches(
        own.inputs,
        own.targets,
        epochs=1,
        batch_size=local.config.training.batch_size,
        seed=local.seed(SEED_GROWTH, round_index),
        augmented=False,
    )
    for _, inputs, targets in islice(source, most or None):
        yield inputs, targets


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
    order = rng(local.seed(SEED_GROWTH, round_index)).permutation(len(local.data.train))
    return order[: local.config.training.batch_size]
