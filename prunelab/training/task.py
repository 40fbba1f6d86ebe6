"""What training and scores need to know of a model: each sample's loss, metric and embedding.

Both products use these methods alone. `Supervised` takes a loss and a metric of your own; subclass
`Task` for a model that is called in another way.
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunelab import networks
from prunelab.data.samples import (
    NO_LOSS,
    ImageSamples,
    Ordered,
    Pairs,
    Samples,
    TargetSamples,
    TokenSamples,
)
from prunelab.data.tensors import prepare, sent
from prunelab.errors import ModelError
from prunelab.runs.imported import imported
from sparsemodel.layers.linear_and_conv import SparseLinear
from sparsemodel.masks.probe import probing


class Task(ABC):
    """The loss and the embedding of each sample of a batch.

    A batch is what `Samples.batch` returns, moved to the model's device. Models are called in
    the mode (train or eval) that the caller has set.

    Attributes:
        metric_name: what `measure` gives beside the loss; "" where it gives nothing.
    """

    metric_name: str = ""

    def measure(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Loss [B] and metric [B] of each sample, of one forward pass; None: no metric."""
        return self.loss(model, batch), None

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

    metric_name = "accuracy"

    def measure(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Loss and whether the largest logit is at the label."""
        losses, logits = self.loss_and_logits(model, batch)
        if logits is None:
            logits = self.logits(model, batch)
        return losses, (logits.argmax(1) == self.labels(batch)).to(losses.dtype)

    def loss_and_logits(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Loss [B], and the logits [B, C] that it was computed from, of one forward pass.

        None: the loss, which may be a subclass's, does not call self.logits on the batch.
        """
        seen: list[Tensor] = []

        def listen(model: nn.Module, batch: Any) -> Tensor:
            seen.append(self.logits(model, batch))
            return seen[-1]

        # A second forward pass would cost time and move batch norm's statistics twice.
        task = copy.copy(self)
        task.logits = listen  # type: ignore[method-assign]
        losses = task.loss(model, batch)
        return losses, seen[-1] if seen and len(seen[-1]) == len(losses) else None


class ImageClassification(Classification):
    """A model that maps images to logits; batches are (images, labels).

    Args:
        layer: name of the module whose output is the embedding (flattened; averaged over
            positions where it is a feature map); None: the input of the last linear layer.
    """

    def __init__(self, *, layer: str | None = None) -> None:
        self.layer = layer

    def logits(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return outputs_of(model, batch[0])

    def labels(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return batch[1]

    def embedding(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """[B, D].

        Raises:
            ModelError: the model has no layer of that name, or no linear layer.
        """
        return _embedded(model, networks.fitted(model, batch[0]), self.layer)


Comparison = Callable[[Tensor, Tensor], Tensor]
"""(outputs [B, ...], targets [B, ...]) -> a number for each sample [B], or [B, ...]: their mean."""


class Supervised(Task):
    """A model that maps inputs to outputs, with any loss and metric; batches are (inputs, targets).

    Args:
        loss: differentiable, low is good; such as torch's with reduction="none".
        metric: what is reported beside the loss; None: nothing.
        metric_name: what the metric is called; "accuracy" is for hits, 0 or 1 a sample.
        layer: as of `ImageClassification`.

    >>> task = Supervised(nn.HuberLoss(reduction="none"))
    >>> batch = torch.ones(4, 3), torch.zeros(4)
    >>> task.loss(nn.Linear(3, 1), batch).shape
    torch.Size([4])
    """

    def __init__(
        self,
        loss: Comparison,
        metric: Comparison | None = None,
        *,
        metric_name: str = "metric",
        layer: str | None = None,
    ) -> None:
        self._loss, self._metric, self.layer = loss, metric, layer
        self.metric_name = metric_name if metric is not None else ""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.measure(model, batch)[0]

    def measure(
        self, model: nn.Module, batch: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        outputs, targets = outputs_of(model, batch[0]), batch[1]
        if targets.dim() == 1 and outputs.shape == (len(targets), 1):
            outputs = outputs[:, 0]  # one number for each sample, whichever way it is written
        if targets.is_floating_point():
            targets = targets.to(outputs.dtype)
            if outputs.shape != targets.shape:
                raise ModelError(
                    f"the network gives {list(outputs.shape)} for targets {list(targets.shape)}; "
                    "expected one output for each target"
                )
        losses = _one_each(self._loss(outputs, targets), len(targets), "loss")
        if self._metric is None:
            return losses, None
        return losses, _one_each(self._metric(outputs.detach(), targets), len(targets), "metric")

    def embedding(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return _embedded(model, networks.fitted(model, batch[0]), self.layer)


class Regression(Supervised):
    """Numbers to predict: half the squared error, its metric the mean absolute error."""

    def __init__(self, *, layer: str | None = None) -> None:
        super().__init__(_half_square, _absolute_error, metric_name="mae", layer=layer)


class MultiLabel(Supervised):
    """Several classes a sample, targets 0 or 1 [B, K], one logit each: binary cross-entropy.

    Its metric is the share of classes that are told right.
    """

    def __init__(self, *, layer: str | None = None) -> None:
        super().__init__(_binary, _label_hits, metric_name="label accuracy", layer=layer)


# Named, not written in place: a task travels to the processes of workers.
def _half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets) ** 2 / 2


def _absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs()


def _binary(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none")


def _label_hits(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs > 0) == (targets > 0.5)).to(outputs.dtype)


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


TASKS: dict[str, Callable[[], Task]] = {
    "classification": ImageClassification,
    "regression": Regression,
    "multi-label": MultiLabel,
    "text-classification": TextClassification,
    "causal-lm": CausalLM,
}


TEXT_TASKS = ("text-classification", "causal-lm")


def task_of(samples: Samples) -> str:
    """The name in TASKS of what such samples are for, where nothing else is said."""
    if isinstance(samples, TokenSamples):
        return "causal-lm" if samples.labels is None else "text-classification"
    if isinstance(samples, TargetSamples):
        return "multi-label" if samples.is_multi_label else "regression"
    return "classification"


def make_task(task: str | Task | Callable[[], Task]) -> Task:
    """A task of a name in TASKS, of "module:function", or of a function or class that makes one.

    Raises:
        ModelError: there is none of that name, or what was made is none.
    """
    made: Any = task
    if isinstance(task, str):
        if ":" in task:
            try:
                made = imported(task)
            except ImportError as error:
                raise ModelError(f"task {task!r}: {error}") from error
        elif task in TASKS:
            made = TASKS[task]
        else:
            raise ModelError(
                f"unknown task {task!r}; known: {', '.join(TASKS)}; or give module:function"
            )
    if not isinstance(made, Task) and callable(made):
        made = made()
    if not isinstance(made, Task):
        raise ModelError(f"task: expected a Task, got a {type(made).__name__}")
    return made


@torch.no_grad()
def check_fits(task: Task, model: nn.Module, samples: Samples, *, num_classes: int | None) -> None:
    """Raise ModelError unless a network takes such samples and tells so many classes apart.

    Two samples go through it in evaluation mode: of texts the longest, and one with the largest
    token. The network and torch's random numbers are left as they were.

    Args:
        num_classes: of the whole data set; None: as many as the samples' labels reach.
    """
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    batch = to_device(samples.batch(_telling_rows(samples)), device)
    what = f"the network does not fit {_described(samples, batch)}"
    if num_classes is None and samples.labels is not None:
        num_classes = int(samples.labels.max()) + 1
    with probing(model), torch.random.fork_rng(devices=[]):
        model.eval()
        try:
            if isinstance(task, Classification):
                _check_logits(task.logits(model, batch), num_classes, what)
            task.measure(model, batch)
        except ModelError:
            raise
        except Exception as error:  # whatever the network's own code raises
            hint = "; the images are too small for it" if _TOO_SMALL.search(str(error)) else ""
            raise ModelError(f"{what}: {type(error).__name__}: {error}{hint}") from error


# What torch says of a window that is larger than its input.
_TOO_SMALL = re.compile("output size is too small|greater than actual input size", re.IGNORECASE)


def _telling_rows(samples: Samples) -> Tensor:
    if isinstance(samples, TokenSamples):
        longest = int(samples.attention_mask.sum(1).argmax())
        return torch.tensor([longest, int(samples.input_ids.amax(1).argmax())])
    last = len(samples) - 1
    return torch.tensor([0, min(1, last) if isinstance(samples, Ordered) else last])


def _described(samples: Samples, batch: Any) -> str:
    if isinstance(samples, TokenSamples):
        ids = batch["input_ids"]
        return f"texts {list(ids.shape)} of tokens up to {int(ids.max())}"
    if isinstance(batch, tuple) and isinstance(batch[0], Tensor):
        kind = "images" if isinstance(samples, ImageSamples) else "inputs"
        return f"{kind} {list(batch[0].shape)}"
    return f"batches of {type(samples).__name__}"


def _check_logits(logits: Any, num_classes: int | None, what: str) -> None:
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 2:
        raise ModelError(f"{what}: it gives {shape}, expected logits [2, classes]")
    if num_classes is not None and logits.shape[1] < num_classes:
        raise ModelError(
            f"the network gives {logits.shape[1]} logits, and the data have {num_classes} classes; "
            "a function that builds it may ask for num_classes"
        )


def outputs_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """What a network gives for inputs; of transformers' networks the logits."""
    outputs = model(networks.fitted(model, inputs))
    found: Tensor = getattr(outputs, "logits", outputs)
    return found


def forward(model: nn.Module, batch: Any) -> Any:
    """What a model gives for the inputs of a batch, whatever they are, without its targets."""
    if isinstance(batch, Mapping):
        return model(**_inputs(batch))
    return model(networks.fitted(model, batch[0]))


def batch_on(samples: Samples, rows: Tensor, device: torch.device) -> Any:
    """`Samples.batch` on a device, where floats are made of what the samples store.

    Pictures go to a GPU as bytes, a quarter of their floats; the host neither makes those nor
    waits.
    """
    if device.type != "cpu" and _are_pairs(samples):
        inputs, targets = to_device(samples.raw(rows), device)
        return prepare(inputs), targets
    return to_device(samples.batch(rows), device)


def _are_pairs(samples: object) -> TypeGuard[Pairs]:
    """Whether their batches are made as `Pairs` makes them, and not in a way of their own."""
    return isinstance(samples, Pairs) and type(samples).batch is Pairs.batch


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch of tensors, tuples and dicts on a device."""
    if isinstance(batch, Tensor):
        return sent(batch, device)
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


def _one_each(values: Tensor, count: int, what: str) -> Tensor:
    """A number for each sample, the mean where there are several."""
    if values.dim() == 0 or len(values) != count:
        raise ModelError(
            f"the {what} gives {list(values.shape)} for {count} samples; expected one number for "
            "each: reduction='none'"
        )
    values = values if values.is_floating_point() else values.float()
    return values.flatten(1).mean(1) if values.dim() > 1 else values


def _embedded(model: nn.Module, inputs: Tensor, layer: str | None) -> Tensor:
    """Output of a layer by name, or the input of the last linear one, [B, D]."""
    name, of_input = (_last_linear(model), True) if layer is None else (layer, False)
    seen = _seen(model, name, inputs, of_input=of_input)
    return seen.flatten(2).mean(2) if seen.dim() > 2 else seen


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
