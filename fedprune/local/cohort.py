"""Several clients trained at once in one process: stacked weights, one vmapped step for all.

The updates are those of `training.train_locally` with masked execution, client by client, up to
rounding: the same samples in the same order, the same augmentation, statistics of every
client's own batches. On a GPU one launch serves the whole cohort.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional

from fedprune.config import TrainingConfig
from fedprune.exchange.messages import Entries, State
from fedprune.local.training import GrowthBatch, LocalResult, local_batches
from prunelab.data.tensors import prepare
from prunelab.networks import float_state, load_float_state_
from sparsemodel.errors import SparseModelError
from sparsemodel.masks import adjust
from sparsemodel.masks.mask import Mask
from sparsemodel.storage.meter import storage_bytes

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Member:
    """One client's part in a cohort.

    Attributes:
        weights: the float state it starts from, zeros at pruned places.
        images, labels: its samples, uint8 or float32 [N, C, H, W] and int64 [N], N >= 2.
        seed: decides the order of samples and the augmentation.
        growth: asks for the largest gradients at pruned weights once training is over.
    """

    weights: State
    images: torch.Tensor
    labels: torch.Tensor
    seed: int
    growth: GrowthBatch | None = None


def train_cohort(
    model: nn.Module,
    members: Sequence[Member],
    *,
    mask: Mask | None,
    config: TrainingConfig,
    lr: float,
    augmented: bool = False,
) -> list[tuple[LocalResult, State]]:
    """Train all members at once; pruned weights stay exactly zero.

    Args:
        model: the network, on the device to train on; its own state is overwritten.
        members: at least one, all under the same mask.

    Returns:
        What local training did, and the float state that it led to, for each member.
    """
    model.train()
    stack = _Stack(model, members, mask, config, lr)
    sources = [
        local_batches(
            member.images, member.labels,
            config=config, epochs=config.local_epochs, seed=member.seed, augmented=augmented,
        )
        for member in members
    ]  # fmt: skip
    losses, seen = [0.0] * len(members), [0] * len(members)
    last: list[tuple[int, int]] = []
    last_losses: list[torch.Tensor] = []
    for turn in _turns(sources):
        for rows in _of_one_size(turn):
            batches = [turn[row] for row in rows]
            images = torch.stack([images for _, images, _ in batches])
            found = stack.step(rows, images, torch.stack([labels for _, _, labels in batches]))
            for row, (epoch, _, labels), loss in zip(rows, batches, found, strict=True):
                seen[row] += len(labels)
                if epoch == config.local_epochs - 1:
                    last.append((row, len(labels)))
                    last_losses.append(loss)
    # Read only now, so that the next batches are made while the GPU is at work.
    for (row, count), loss in zip(last, torch.stack(last_losses).tolist(), strict=True):
        losses[row] += count * loss
    share = stack.state_bytes() // len(members)
    results = []
    for row, member in enumerate(members):
        state = stack.unstack(row)
        entries = _growth(model, mask, member)
        loss = losses[row] / len(member.labels)
        results.append((LocalResult(loss, seen[row], share, entries), state))
    return results


def train_in_cohorts(
    train: Callable[[Sequence[Member]], list[tuple[LocalResult, State]]],
    members: Sequence[Member],
    *,
    size: int,
) -> tuple[list[tuple[LocalResult, State]], int]:
    """Train members `size` at a time, and half as many wherever the GPU's memory ends.

    A cohort that did not fit starts anew from its members' weights, so nothing is lost.

    Returns:
        The results in the members' order, and the size that fitted last.

    Raises:
        torch.OutOfMemoryError: a single member does not fit.
    """
    results: list[tuple[LocalResult, State]] = []
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
        mask: Mask | None,
        config: TrainingConfig,
        lr: float,
    ) -> None:
        self._model, self._config, self._lr = model, config, lr
        device = next(model.parameters()).device
        states: list[Tensors] = []
        for member in members:
            load_float_state_(model, member.weights)
            if mask is not None:
                mask.apply(model)
            states.append({name: x.detach().clone() for name, x in model.state_dict().items()})
        stacked = {name: torch.stack([s[name] for s in states]) for name in states[0]}
        trained = dict(model.named_parameters())
        self._weights = {name: stacked.pop(name) for name in trained}
        self._buffers = stacked
        self._active: Tensors = {
            name: mask.active(name).to(device)
            for name in (mask or ())
            if mask is not None and not bool(mask[name].all())
        }
        self._momentum: Tensors = {}
        if config.momentum:
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

    def unstack(self, row: int) -> State:
        """A member's float state, on the CPU; the model is left holding it."""
        state = {name: x[row] for name, x in {**self._weights, **self._buffers}.items()}
        self._model.load_state_dict(state)
        return {name: x.detach().cpu().clone() for name, x in float_state(self._model).items()}

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
        config, step = self._config, self._values(name, gradient)
        if config.weight_decay:
            step = step.add(self._values(name, weight), alpha=config.weight_decay)
        if momentum is not None:
            step = momentum.mul_(config.momentum).add_(step)
        flat = weight.view(len(weight), -1)
        if name in self._active:
            flat.index_add_(1, self._active[name], step, alpha=-self._lr)
        else:
            flat.add_(step, alpha=-self._lr)


Batch = tuple[int, torch.Tensor, torch.Tensor]


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


def _growth(model: nn.Module, mask: Mask | None, member: Member) -> Entries:
    if member.growth is None:
        return {}
    if mask is None:
        raise SparseModelError("growth was asked of a dense model; give it a mask")
    device = next(model.parameters()).device
    samples = member.growth.samples
    images = prepare(member.images[samples]).to(device)
    labels = member.labels[samples].to(device)
    return adjust.topk_pruned_gradients(
        model, mask, member.growth.counts, lambda m: functional.cross_entropy(m(images), labels)
    )
