"""Several clients trained at once in one process: stacked weights, one vmapped step for all.

The updates are those of `training.train` with masked execution, client by client, up to
rounding: the same samples in the same order, the same augmentation, statistics of every
client's own batches. On a GPU one launch serves the whole cohort.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional

from fedprune.exchange.messages import MODEL, Reply, Resources
from fedprune.local.model import Sgd
from fedprune.local.torch_models import module_state
from fedprune.local.training import epoch_batches
from fedprune.settings import TrainingConfig
from prunelab.data.tensors import prepare
from sparsemodel.layers.from_state import load_state_
from sparsemodel.masks import adjust
from sparsemodel.masks.mask import Mask
from sparsemodel.runtime.pattern import Patterns
from sparsemodel.runtime.state import Array, Entries, SparseState
from sparsemodel.storage.meter import peak_rss_bytes, storage_bytes

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Member:
    """One client's part in a cohort.

    Attributes:
        state: what it starts from.
        images, labels: its samples, uint8 or float32 [N, C, H, W] and int64 [N], N >= 2.
        seed: decides the order of samples and the augmentation.
        growth: (layer -> how many of the largest gradients at pruned weights to send back, and
            on which samples), or nothing of that kind.
        report_resources: whether it says what it held.
    """

    state: SparseState
    images: Array
    labels: Array
    seed: int
    growth: tuple[Mapping[str, int], NDArray[np.int64]] | None = None
    report_resources: bool = False


def train_cohort(
    model: nn.Module,
    members: Sequence[Member],
    *,
    config: TrainingConfig,
    sgd: Sgd,
    augmented: bool = False,
) -> list[Reply]:
    """Train all members at once; pruned weights stay exactly zero.

    Args:
        model: the network, on the device to train on; its own state is overwritten.
        members: at least one, all under the same patterns.

    Returns:
        The answer of each member to "train".
    """
    model.train()
    stack = _Stack(model, members, config, sgd)
    sources = [
        epoch_batches(
            member.images, member.labels, epochs=config.local_epochs,
            batch_size=config.batch_size, seed=member.seed, augmented=augmented,
        )
        for member in members
    ]  # fmt: skip
    losses = [0.0] * len(members)
    last: list[tuple[int, int]] = []
    last_losses: list[torch.Tensor] = []
    for turn in _turns(sources):
        for rows in _of_one_size(turn):
            batches = [turn[row] for row in rows]
            images = torch.from_numpy(np.stack([images for _, images, _ in batches]))
            labels = torch.from_numpy(np.stack([labels for _, _, labels in batches]))
            found = stack.step(rows, images, labels)
            for row, (epoch, _, target), loss in zip(rows, batches, found, strict=True):
                if epoch == config.local_epochs - 1:
                    last.append((row, len(target)))
                    last_losses.append(loss)
    # Read only now, so that the next batches are made while the GPU is at work.
    for (row, count), loss in zip(last, torch.stack(last_losses).tolist(), strict=True):
        losses[row] += count * loss
    share = stack.state_bytes() // len(members)
    replies = []
    for row, member in enumerate(members):
        state = stack.unstack(row)
        growth = _growth(model, state.patterns, member)
        replies.append(
            Reply(
                num_examples=len(member.labels),
                fields={"loss": losses[row] / len(member.labels)},
                states={MODEL: state},
                entries={MODEL: growth} if growth else {},
                resources=Resources(share, peak_rss_bytes()) if member.report_resources else None,
            )
        )
    return replies


def train_in_cohorts(
    train: Callable[[Sequence[Member]], list[Reply]],
    members: Sequence[Member],
    *,
    size: int,
) -> tuple[list[Reply], int]:
    """Train members `size` at a time, and half as many wherever the GPU's memory ends.

    A cohort that did not fit starts anew from its members' weights, so nothing is lost.

    Returns:
        The results in the members' order, and the size that fitted last.

    Raises:
        torch.OutOfMemoryError: a single member does not fit.
    """
    results: list[Reply] = []
    while len(results) < len(members):
        cohort = members[len(results) : len(results) + size]
        fits = False
        try:
            results += train(cohort)
            fits = True
        except torch.OutOfMemoryError:
            if len(cohort) == 1:
                raise
        if not fits:  # outside the handler, whose traceback holds the tensors
            size = (len(cohort) + 1) // 2
            torch.cuda.empty_cache()
    return results, size


class _Stack:
    """Weights, statistics and momentum of all members, each tensor [K, ...]."""

    def __init__(
        self,
        model: nn.Module,
        members: Sequence[Member],
        config: TrainingConfig,
        sgd: Sgd,
    ) -> None:
        self._model, self._config, self._sgd = model, config, sgd
        self._order, self._patterns = list(members[0].state.values), members[0].state.patterns
        device = next(model.parameters()).device
        states: list[Tensors] = []
        for member in members:
            load_state_(model, member.state)
            states.append({name: x.detach().clone() for name, x in _tensors(model).items()})
        stacked = {name: torch.stack([s[name] for s in states]) for name in states[0]}
        # What is frozen goes with the buffers.
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        self._weights = {name: stacked.pop(name) for name in trained}
        self._buffers = stacked
        self._active: Tensors = {
            name: torch.from_numpy(pattern.positions()).to(device)
            for name, pattern in (self._patterns or {}).items()
            if pattern.num_active < pattern.num_weights
        }
        self._momentum: Tensors = {}
        if sgd.momentum:
            self._momentum = {
                name: torch.zeros_like(self._values(name, x)) for name, x in self._weights.items()
            }
        self._alone = grad_and_value(self._loss)
        self._together = vmap(self._alone)

    def step(self, rows: list[int], images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One SGD step of some members, images [R, B, C, H, W]; their losses [R] before it."""
        device = next(iter(self._weights.values())).device
        everyone = len(rows) == len(next(iter(self._weights.values())))
        index = torch.tensor(rows, device=device)

        def taken(tensors: Tensors) -> Tensors:
            if everyone:
                return tensors
            return {name: x.index_select(0, index) for name, x in tensors.items()}

        weights, buffers, momentum = map(taken, (self._weights, self._buffers, self._momentum))
        inputs = prepare(images.to(device))  # bytes are a quarter of what floats would send
        gradients, losses = self._gradients(weights, buffers, inputs, labels.to(device))
        with torch.no_grad():
            for name, gradient in gradients.items():
                self._update(name, weights[name], gradient, momentum.get(name))
            if not everyone:
                for kept, changed in (
                    (self._weights, weights),
                    (self._buffers, buffers),
                    (self._momentum, momentum),
                ):
                    for name, x in changed.items():
                        kept[name].index_copy_(0, index, x)
        return losses.detach()

    def unstack(self, row: int) -> SparseState:
        """A member's state; the model is left holding it."""
        own = _tensors(self._model)
        with torch.no_grad():
            for name, x in {**self._weights, **self._buffers}.items():
                own[name].copy_(x[row])
        return module_state(self._model, self._order, self._patterns)

    def state_bytes(self) -> int:
        """Bytes held for all members: weights, dense gradients of a step, momentum, indices."""
        weights = storage_bytes(self._weights.values())
        rest = storage_bytes([*self._momentum.values(), *self._active.values()])
        return 2 * weights + rest

    def _gradients(
        self, weights: Tensors, buffers: Tensors, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[Tensors, torch.Tensor]:
        """Gradients and losses [R, ...] of some members; their buffers change in place."""
        if len(labels) > 1:
            gradients, losses = self._together(weights, buffers, images, labels)
            return gradients, losses
        # Nothing to stack: the plain operators are faster.
        own, kept = ({name: x[0] for name, x in t.items()} for t in (weights, buffers))
        gradients, loss = self._alone(own, kept, images[0], labels[0])
        return {name: x[None] for name, x in gradients.items()}, loss[None]

    def _loss(
        self, weights: Tensors, buffers: Tensors, images: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        logits = functional_call(self._model, (weights, buffers), (images,))
        return functional.cross_entropy(logits, labels)

    def _values(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """[K, ...] -> [K, nnz]: the active values of a masked tensor, a copy; others flat."""
        flat = x.reshape(len(x), -1)
        return flat.index_select(1, self._active[name]) if name in self._active else flat

    def _update(
        self,
        name: str,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        momentum: torch.Tensor | None,
    ) -> None:
        """One step in place, in the order of operations of torch.optim.SGD."""
        sgd, step = self._sgd, self._values(name, gradient)
        if sgd.weight_decay:
            step = step.add(self._values(name, weight), alpha=sgd.weight_decay)
        if momentum is not None:
            step = momentum.mul_(sgd.momentum).add_(step)
        flat = weight.view(len(weight), -1)
        if name in self._active:
            flat.index_add_(1, self._active[name], step, alpha=-self._sgd.lr)
        else:
            flat.add_(step, alpha=-self._sgd.lr)


def _tensors(model: nn.Module) -> Tensors:
    """Parameters and buffers by name, what is shared once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


Batch = tuple[int, Array, Array]


def _turns(sources: Sequence[Iterator[Batch]]) -> Iterator[dict[int, Batch]]:
    """The next batch of every member that still has one, by its row."""
    left = dict(enumerate(sources))
    while left:
        turn = {row: batch for row, source in left.items() if (batch := next(source, None))}
        left = {row: left[row] for row in turn}
        if turn:
            yield turn


def _of_one_size(turn: Mapping[int, Batch]) -> list[list[int]]:
    """Rows whose batches can be stacked."""
    groups: dict[int, list[int]] = {}
    for row, (_, _, labels) in turn.items():
        groups.setdefault(len(labels), []).append(row)
    return list(groups.values())


def _growth(model: nn.Module, patterns: Patterns | None, member: Member) -> Entries:
    if member.growth is None:
        return {}
    assert patterns is not None, "growth is at pruned places"
    counts, rows = member.growth
    device = next(model.parameters()).device
    images = prepare(torch.from_numpy(member.images[rows])).to(device)
    labels = torch.from_numpy(member.labels[rows]).to(device)
    found = adjust.topk_pruned_gradients(
        model, Mask.from_csr(patterns), counts,
        lambda m: functional.cross_entropy(m(images), labels),
    )  # fmt: skip
    return {name: (at.numpy(), values.numpy()) for name, (at, values) in found.items()}
