"""Local training whose step is one CUDA graph: between its start and its end the GPU is alone.

Samples, draws, weights, momentum, the learning rate and the sum of the losses lie in tensors that
stay where they are. A step takes its mini-batch from them, augments and normalises it, goes
forward and backward, and updates the weights under the mask: it has no argument, so that it can be
captured once for each size of mini-batch and replayed for every client and round. The host reads
one number, at the end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fedprune.local.model import Sgd
from fedprune.local.training import Plan
from prunelab.data.tensors import cropped, prepare, tensor_of
from prunelab.training.precision import computing_in
from prunelab.training.task import Task
from sparsemodel.runtime.pattern import Patterns
from sparsemodel.runtime.state import Array
from sparsemodel.storage.meter import storage_bytes

WARM_UP = 3
"""Plain runs of a step before it is captured, in which libraries allocate what they keep."""

MAX_KEPT = 4
"""Networks whose graphs a process keeps: those that were used last."""

Body = Callable[[], None]


class NotCapturableError(Exception):
    """A step does what no CUDA graph can repeat; the message says what."""


class Replays(Protocol):
    """How bodies that read and write the same tensors each time are run again and again."""

    def running(self) -> AbstractContextManager[None]:
        """Inside, what `repeated` gives is called."""
        ...

    def repeated(self, body: Body) -> Body:
        """What does the work of `body` at every call.

        A call raises NotCapturableError where it cannot.
        """
        ...


class Plainly:
    """Calls the body itself."""

    def running(self) -> AbstractContextManager[None]:
        return nullcontext()

    def repeated(self, body: Body) -> Body:
        return body


class CudaGraphs:
    """Captures a body after WARM_UP plain runs; all graphs share their memory.

    The plain runs are work like any other, and a capture computes nothing: there is nothing to
    restore.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def running(self) -> Iterator[None]:
        """On a stream of their own, as captures need it."""
        caller = torch.cuda.current_stream()
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            caller.wait_stream(self._stream)

    def repeated(self, body: Body) -> Body:
        graph, runs = torch.cuda.CUDAGraph(), 0

        def run() -> None:
            nonlocal runs
            runs += 1
            if runs == 1:
                check_capturable(body, self._stream.device)
            elif runs <= WARM_UP:
                body()
            else:
                if runs == WARM_UP + 1:
                    self._capture(body, graph)
                graph.replay()

        return run

    def _capture(self, body: Body, graph: torch.cuda.CUDAGraph) -> None:
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                body()
        except RuntimeError as error:
            raise NotCapturableError(f"{type(error).__name__}: {error}") from error


def replays_on(device: torch.device) -> Callable[[], Replays] | None:
    """What repeats the steps of local training there; None: nothing, they are made one by one."""
    return CudaGraphs if device.type == "cuda" else None


class Watch(TorchDispatchMode):
    """Records the operators that run inside, and what of them no graph can repeat.

    Attributes:
        operators: in their order.
        obstacles: operators with the reason.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device.type
        self.operators: list[str] = []
        self.obstacles: list[str] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's compiler takes seconds to import

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.operators.append(str(func))
        before = len(self.obstacles)
        if why := _obstacle(func, args, kwargs):
            self.obstacles.append(f"{func}: {why}")
        elif self._leaves([args, kwargs]):
            self.obstacles.append(f"{func}: the host is read or written")
        found = func(*args, **kwargs)
        if len(self.obstacles) == before and self._leaves(found):
            self.obstacles.append(f"{func}: it allocates on the host")
        return found

    def _leaves(self, values: Any) -> bool:
        """Whether something is, or is to be, on another device."""
        devices = (
            value.device if isinstance(value, torch.Tensor) else value
            for value in pytree.tree_leaves(values)
            if isinstance(value, torch.Tensor | torch.device)
        )
        return any(device.type != self._device for device in devices)


def check_capturable(body: Body, device: torch.device) -> None:
    """Run a body; raise NotCapturableError where a graph could not repeat it, or it fails.

    A network may fail here alone: it calls view() on maps that are laid out channels last, say.
    """
    try:
        with Watch(device) as watch:
            body()
    except RuntimeError as error:
        raise NotCapturableError(f"{type(error).__name__}: {error}") from error
    if watch.obstacles:
        raise NotCapturableError("; ".join(sorted(set(watch.obstacles))))


def _obstacle(func: Any, args: Any, kwargs: dict[str, Any]) -> str:
    """Why no graph can repeat an operator, whatever the device; "" where nothing is known."""
    name, why = func.overloadpacket.__name__, ""
    if torch.Tag.nondeterministic_seeded in func.tags:
        why = "it draws random numbers"
    elif name == "lift_fresh":
        why = "new data come from the host"
    elif kwargs.get("pin_memory"):
        why = "it allocates pinned memory"
    elif torch.Tag.data_dependent_output in func.tags:
        why = "the host waits for a value"
    elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        if any(index is not None and not _is_integer(index) for index in args[1]):
            why = "the host waits for the number of true entries"
    elif torch.Tag.dynamic_output_shape in func.tags:
        why = "the host waits for a shape"
    return why


def _is_integer(index: torch.Tensor) -> bool:
    return index.dtype in (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class Job:
    """One client's local training.

    Attributes:
        inputs, targets: its samples, as a store has them.
        plan: what was drawn for it.
        patterns: of the model; None: it is dense.
    """

    inputs: Array
    targets: Array
    plan: Plan
    patterns: Patterns | None
    sgd: Sgd

    def form(self) -> tuple[object, ...]:
        """What its steps have fixed: of two jobs with equal ones the same graphs serve both."""
        shapes = [(part.dtype, part.shape[1:]) for part in (self.inputs, self.targets)]
        return self.sgd[1:], len(self.plan.rows), list(self.patterns or ()), shapes

    def room(self) -> tuple[int, int]:
        """Samples and draws to have room for; powers of two, so that larger clients seldom need
        other tensors."""
        counts = len(self.inputs), self.plan.rows.shape[1]
        samples, draws = (1 << max(0, count - 1).bit_length() for count in counts)
        return samples, draws


class CapturedTraining:
    """Trains one network for any client, in tensors that stay where they are.

    The learning rate is one of these tensors. Momentum and weight decay are part of the captured
    step; where they, the layers under a mask or the samples' shape change, graphs are made anew.

    Args:
        model: float32, on the device; what it holds is overwritten.
        precision: in what numbers it computes, one of prunelab.training.precision.PRECISIONS.
        replays: how steps are repeated.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        precision: str,
        replays: Callable[[], Replays],
    ) -> None:
        self._device = next(model.parameters()).device
        self._lies_last = self._device.type != "cpu"  # channels, as tensor cores take them
        if self._lies_last:
            for parameter in model.parameters():
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self._model, self._task, self._precision = model.train(), task, precision
        self._weights = [p for p in model.parameters() if p.requires_grad]
        self._momenta = [torch.zeros_like(w, requires_grad=False) for w in self._weights]
        self._lr = torch.zeros((), device=self._device)
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        self._cursor = torch.zeros((), dtype=torch.int64, device=self._device)
        self._make_replays = replays
        self._refused = ""
        self._ground: _Ground | None = None

    @torch.no_grad()
    def train(self, model: nn.Module, job: Job) -> float:
        """Train a model of this network from its state on; momentum starts at zero.

        Args:
            model: built as this one; it holds the result.

        Returns:
            The sum of the losses of the last epoch's samples.

        Raises:
            NotCapturableError: the step cannot be repeated by a graph; the model is as it was.
        """
        if self._refused:
            raise NotCapturableError(self._refused)
        ground, sizes = self.ground(job), job.plan.sizes
        try:
            with ground.replays.running():
                self._load(model, job, ground)
                for number, size in enumerate(sizes):
                    if number == len(sizes) - job.plan.last:
                        self._loss_sum.zero_()
                    if size not in ground.steps:
                        body = partial(self.step, size)
                        ground.steps[size] = ground.replays.repeated(body)
                    ground.steps[size]()
                for given, own in zip(_tensors(model), _tensors(self._model), strict=True):
                    given.copy_(own)
        except NotCapturableError as error:
            self._refused, self._ground = str(error), None
            raise
        return self._loss_sum.item()

    def state_bytes(self) -> int:
        """Bytes held for weights, gradients, momentum and masks."""
        masks = () if self._ground is None else [mask for _, mask in self._ground.pruned.values()]
        weights, momenta = storage_bytes(self._weights), storage_bytes(self._momenta)
        return 2 * weights + momenta + storage_bytes(masks)

    def ground(self, job: Job) -> _Ground:
        """The tensors that a job needs: those that are there, or others."""
        form, room, old = job.form(), job.room(), self._ground
        if old is not None and old.form == form:
            if all(need <= has for need, has in zip(room, old.room, strict=True)):
                return old
            room = max(room[0], old.room[0]), max(room[1], old.room[1])
        self._ground = None  # not both at once
        self._ground = _Ground(job, room, self._model, self._make_replays())
        return self._ground

    def _load(self, model: nn.Module, job: Job, ground: _Ground) -> None:
        for own, given in zip(_tensors(self._model), _tensors(model), strict=True):
            own.copy_(given)
        for tensor in (*self._momenta, self._cursor, self._loss_sum):
            tensor.zero_()
        self._lr.fill_(job.sgd.lr)
        ground.load(job)

    @torch.enable_grad()
    def step(self, size: int) -> None:
        """The body: one step on the next `size` draws."""
        ground = self._ground
        assert ground is not None
        drawn = ground.rows.index_select(1, self._cursor + ground.counting[:size])
        inputs = ground.inputs.index_select(0, drawn[0])
        inputs = prepare(cropped(inputs, drawn[1:]) if len(drawn) > 1 else inputs)
        if inputs.dim() == 4 and self._lies_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        batch = inputs, ground.targets.index_select(0, drawn[0])
        for weight in self._weights:
            weight.grad = None
        with computing_in(self._precision, self._model):
            loss = self._task.loss(self._model, batch).mean()
        loss.backward()
        self._update(ground)
        self._loss_sum.add_(loss.detach().double() * size)
        self._cursor.add_(size)

    @torch.no_grad()
    def _update(self, ground: _Ground) -> None:
        """torch.optim.SGD's step, then zeros at pruned places.

        Momentum at a pruned place moves nothing else, and what a gradient there may be, infinite
        too, is gone with the weight.
        """
        pairs = zip(self._weights, self._momenta, strict=True)
        moved = [(w, _laid_out_as(w, w.grad), m) for w, m in pairs if w.grad is not None]
        weights, gradients, momenta = map(list, zip(*moved, strict=True))
        torch._fused_sgd_(
            weights, gradients, momenta if ground.momentum else [],
            weight_decay=ground.weight_decay, momentum=ground.momentum, lr=self._lr,
            dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
        )  # fmt: skip
        for weight, pruned in ground.pruned.values():
            weight.masked_fill_(pruned, 0.0)


class _Ground:
    """What jobs of one form train on: samples, draws and masks, and the steps that read them."""

    def __init__(self, job: Job, room: tuple[int, int], model: nn.Module, replays: Replays) -> None:
        parameters = dict(model.named_parameters())
        device = next(iter(parameters.values())).device
        self.form, self.room = job.form(), room
        _, self.momentum, self.weight_decay = job.sgd
        self.inputs, self.targets = (
            tensor_of(part[:1]).to(device).repeat(room[0], *[1] * (part.ndim - 1))
            for part in (job.inputs, job.targets)
        )
        self.rows = torch.zeros(len(job.plan.rows), room[1], dtype=torch.int64, device=device)
        self.counting = torch.arange(room[1], device=device)
        self.pruned = {
            name: (parameters[name], torch.zeros_like(parameters[name], dtype=torch.bool))
            for name in job.patterns or ()
        }
        self.replays, self.steps = replays, dict[int, Body]()
        self._patterns: Patterns | None = None

    def load(self, job: Job) -> None:
        """Bring in a job's samples, draws and masks."""
        count, (_, draws) = len(job.inputs), job.plan.rows.shape
        self.inputs[:count].copy_(tensor_of(job.inputs))
        self.targets[:count].copy_(tensor_of(job.targets))
        self.rows[:, :draws].copy_(tensor_of(job.plan.rows))
        if job.patterns is None or job.patterns == self._patterns:
            return
        for name, (_, pruned) in self.pruned.items():
            flat = torch.ones(pruned.numel(), dtype=torch.bool, device=pruned.device)
            flat[tensor_of(job.patterns[name].positions()).to(pruned.device)] = False
            pruned.copy_(flat.view(pruned.shape))
        self._patterns = job.patterns


def _laid_out_as(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A gradient with the weight's strides, as the fused update wants them.

    Autograd gives it those but where a dimension is 1, so that little is copied.
    """
    if gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight).copy_(gradient)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*(parameter.detach() for parameter in model.parameters()), *model.buffers()]


_kept: OrderedDict[Hashable, CapturedTraining] = OrderedDict()


def kept_training(key: Hashable, make: Callable[[], CapturedTraining]) -> CapturedTraining:
    """What was made for an equal key, of the MAX_KEPT used last; made where there is none."""
    if key not in _kept:
        while len(_kept) >= MAX_KEPT:
            _kept.popitem(last=False)
        _kept[key] = make()
    _kept.move_to_end(key)
    return _kept[key]


def forget_trainings() -> None:
    """Let go of all graphs and their memory."""
    _kept.clear()
