"""What a score needs to know of a model: the loss of each sample, and its embedding.

Every score uses these methods alone; subclass `Task` for a model or a loss of your own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunelab import networks
from prunelab.data.samples import NO_LOSS, ImageSamples, Samples
from prunelab.errors import ModelError
from sparsemodel.layers.linear_and_conv import SparseLinear


class Task(ABC):
    """The loss and the embedding of each sample of a batch.

    A batch is what `Samples.batch` returns, moved to the model's device. Models are called in
    the mode (train or eval) that the caller has set.
    """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of each sample, [B], differentiable; never averaged over the batch."""

    @abstractmethod
    def embedding(self, model: nn.Module, batch: Any) -> Tensor:
        """A vector for each sample, [B, D]."""


class Classification(Task):
    """A task with classes. Scores of errors, margins and dynamics need one."""

    @abstractmethod
    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        """[B, classes], before softmax."""

    @abstractmethod
    def labels(self, batch: Any) -> Tensor:
        """int64 [B]."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy of each sample, [B]."""
        return functional.cross_entropy(
            self.logits(model, batch), self.labels(batch), reduction="none"
        )


class ImageClassification(Classification):
    """A model that maps images to logits; batches are (images, labels).

    Args:
        layer: name of the module whose output is the embedding (flattened; averaged over
            positions where it is a feature map); None: the input of the last linear layer.
    """

    def __init__(self, *, layer: str | None = None) -> None:
        self.layer = layer

    def logits(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits: Tensor = model(networks.fitted(model, batch[0]))
        return logits

    def labels(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return batch[1]

    def embedding(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """[B, D].

        Raises:
            ModelError: the model has no layer of that name, or no linear layer.
        """
        name, of_input = self.layer, False
        if name is None:
            name, of_input = _last_linear(model), True
        seen = _seen(model, name, networks.fitted(model, batch[0]), of_input=of_input)
        return seen.flatten(2).mean(2) if seen.dim() > 2 else seen


class TextClassification(Classification):
    """A transformers model with a classification head; batches are dicts of TokenSamples.

    The embedding is the last hidden state, averaged over tokens.
    """

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = model(**_inputs(batch)).logits
        return logits

    def labels(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["labels"]

    def embedding(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return _mean_hidden_state(model, batch)


class CausalLM(Task):
    """A causal language model of transformers; batches are dicts of TokenSamples.

    The loss of a sample is the mean cross-entropy of its target tokens (those whose target is
    not −100), each predicted from the tokens before it; NaN where it has none.
    """

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        logits = model(**_inputs(batch)).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        losses = functional.cross_entropy(
            logits.transpose(1, 2).float(), targets, ignore_index=NO_LOSS, reduction="none"
        )
        counts = (targets != NO_LOSS).sum(1)
        return (losses.sum(1) / counts.clamp(min=1)).where(counts > 0, torch.nan)

    def embedding(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return _mean_hidden_state(model, batch)


def check_fits(task: Task, model: nn.Module, samples: Samples, *, num_classes: int | None) -> None:
    """Raise ModelError unless an image network fits its samples; of other tasks nothing is known.

    Args:
        num_classes: of the whole data set; None: as many as the samples' labels reach.
    """
    is_image = getattr(type(task), "logits", None) is ImageClassification.logits
    if is_image and isinstance(samples, ImageSamples):
        networks.check_fits(
            model,
            input_shape=tuple(samples.images.shape[1:]),
            num_classes=num_classes or int(samples.labels.max()) + 1,
        )


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch of tensors, tuples and dicts on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: to_device(part, device) for name, part in batch.items()}
    return tuple(to_device(part, device) for part in batch)


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _mean_hidden_state(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    hidden = model(**_inputs(batch), output_hidden_states=True).hidden_states[-1]
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    pooled: Tensor = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
    return pooled


def _last_linear(model: nn.Module) -> str:
    names: list[str] = [name for name, module in model.named_modules() if _is_linear(module)]
    if not names:
        raise ModelError(
            f"{type(model).__name__} has no linear layer whose input could be the embedding; "
            "name a layer: ImageClassification(layer=...)"
        )
    return names[-1]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | SparseLinear)


def _seen(model: nn.Module, name: str, images: Tensor, *, of_input: bool) -> Tensor:
    """Input or output of a module in one forward pass."""
    modules = dict(model.named_modules())
    if name not in modules:
        raise ModelError(
            f"{type(model).__name__} has no layer {name!r}; some of its layers: "
            f"{', '.join(list(modules)[-8:])}"
        )
    seen: list[Tensor] = []

    def look(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(inputs[0] if of_input else output)

    handle = modules[name].register_forward_hook(look)
    try:
        model(images)
    finally:
        handle.remove()
    if not seen:
        raise ModelError(f"the forward pass of {type(model).__name__} does not call {name!r}")
    return seen[-1]
