"""A client's model computed by torch: dense, masked, or sparse modules where there is no program.

All of them make the same updates as the runtime, up to rounding. `SparseModules` stores and
multiplies active weights only, by a training plan where the network has one, else module by
module; `MaskedModel` multiplies dense weights but keeps gradients and momentum of active ones
only; `DenseModel` is what most code does: dense everything, pruned weights set to zero after each
step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from fedprune.local import captured
from fedprune.local.captured import CapturedTraining, Job, NotCapturableError
from fedprune.local.model import (
    Correction,
    LocalModel,
    Score,
    Sgd,
    execution_of,
    normalization,
)
from fedprune.local.training import Plan
from fedprune.settings import TrainingConfig
from prunelab.data.tensors import batch_of, tensor_of
from prunelab.runs.seeds import seeded
from prunelab.runs.threads import computing
from prunelab.training.precision import computing_in
from prunelab.training.steps import is_planned
from prunelab.training.task import ImageClassification, Task, forward
from sparsemodel.errors import PlanError
from sparsemodel.kernels.cpu import library as cpu
from sparsemodel.layers.from_state import fixed_tensors, load_state_, sparse_model
from sparsemodel.layers.growth import topk_pruned_gradients
from sparsemodel.masks import adjust
from sparsemodel.masks.mask import Mask, weights_under
from sparsemodel.optim import MaskedSGD, SparseSGD
from sparsemodel.plans.plan import TrainingPlan
from sparsemodel.runtime.bound import statistics_batches
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import Array, Entries, SparseState, Tensors
from sparsemodel.storage.meter import state_bytes

EVALUATION_BATCH = 256
BatchNorm = nn.modules.batchnorm._BatchNorm


def open_torch_model(
    build: Callable[[], nn.Module],
    state: SparseState,
    training: TrainingConfig,
    task: Task | None = None,
    *,
    key: Hashable = None,
) -> LocalModel:
    """A model that holds `state`, computed by torch as the configuration says.

    Args:
        key: as of `Network`.
    """
    execution = execution_of(training, pruned=state.patterns is not None)
    kind = {"sparse": SparseModules, "masked": MaskedModel, "dense": DenseModel}[execution]
    return kind(build, state, training, task, key=key)


def skeleton(build: Callable[[], nn.Module]) -> nn.Module:
    """A network to fill with a state: its weights on no memory where its code allows that.

    What a state does not carry (tables, positions, frozen weights) has the values of the code.
    """
    try:
        with torch.device("meta"):
            model = build()
        if not fixed_tensors(model):
            return model
        if all(p.requires_grad for p in model.parameters()):
            with _weights_on_meta():
                return build()
    except Exception:  # whatever a network's own code raises without values
        return build()
    return build()


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Inside, each parameter is on "meta" once a module has it; buffers have their values."""
    register = nn.Module.register_parameter
    seen = WeakIdKeyDictionary()  # what modules share they share here

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            empty = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            module._parameters[name] = seen.setdefault(parameter, empty)

    setattr(nn.Module, "register_parameter", registered)  # noqa: B010 - types forbid the other way
    try:
        yield
    finally:
        setattr(nn.Module, "register_parameter", register)  # noqa: B010


def module_state(model: nn.Module, order: Iterable[str], patterns: Patterns | None) -> SparseState:
    """The state of a plain module under patterns, its tensors in this order."""
    own, values = model.state_dict(), {}
    for name in order:
        tensor = own[name].detach()
        if patterns is not None and name in patterns:
            places = torch.from_numpy(patterns[name].positions()).to(tensor.device)
            values[name] = tensor.reshape(-1)[places].cpu().numpy()
        else:
            values[name] = tensor.to("cpu", copy=True).numpy()
    return SparseState(values, patterns)


F = TypeVar("F", bound=Callable[..., Any])


def _repeatable(method: F) -> F:
    """On the configured number of threads, and with `seed` for layers that draw (dropout, say)."""

    @wraps(method)
    def computed(self: TorchModel, *arguments: Any, seed: int = 0, **keywords: Any) -> Any:
        with computing(self._training.threads), seeded(seed, self._device):
            return method(self, *arguments, **keywords)

    return cast(F, computed)


class TorchModel:
    """What the three have in common: a module in training on a device, and how it is measured."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        state: SparseState,
        training: TrainingConfig,
        task: Task | None = None,
        *,
        key: Hashable = None,
    ) -> None:
        self._build, self._training, self._key = build, training, key
        self._task = task or ImageClassification()
        self._device = torch.device(training.device)
        self._model: nn.Module | None = None
        self._patterns: Patterns | None = None
        self._order: list[str] = []
        self._optimizer: Any = None
        self._sgd: Sgd | None = None
        self._captured: CapturedTraining | None = None
        self.load(state)

    def load(self, state: SparseState) -> None:
        """Take over a state; momentum starts at zero."""
        self._close()
        self._optimizer = self._captured = None
        self._patterns, self._order = state.patterns, list(state.values)
        self._take(state)
        self._module.train()

    def state(self) -> SparseState:
        """The state now, under its patterns."""
        return module_state(self._module, self._order, self._patterns)

    @_repeatable
    def step(
        self,
        inputs: Array,
        targets: Array,
        *,
        sgd: Sgd,
        correction: Correction | None = None,
        seed: int = 0,
    ) -> float:
        """One SGD step on a mini-batch; returns its mean loss before the step."""
        return self._step(inputs, targets, sgd, correction)

    def _step(
        self, inputs: Array, targets: Array, sgd: Sgd, correction: Correction | None
    ) -> float:
        optimizer = self._optimizer_of(sgd)
        optimizer.zero_grad()
        with computing_in(self._training.precision, self._module):
            loss = self._loss(inputs, targets)(self._module)
        loss.backward()
        if correction is not None:
            self._correct(correction)
        optimizer.step()
        return loss.item()

    @_repeatable
    def train_whole(
        self, inputs: Array, targets: Array, plan: Callable[[], Plan], *, sgd: Sgd
    ) -> float | None:
        """A whole training by captured steps, on a GPU where no step has been made before it.

        Momentum starts at zero and ends with it.
        """
        replays, precision = captured.replays_on(self._device), self._training.precision
        started = self._optimizer is not None or self._captured is not None
        if replays is None or started or not self._may_be_captured(inputs):
            return None
        training = captured.kept_training(
            (self._key, self._device, precision),
            lambda: CapturedTraining(
                self._build().to(self._device), self._task, precision=precision, replays=replays
            ),
        )
        try:
            loss = training.train(self._module, Job(inputs, targets, plan(), self._patterns, sgd))
        except NotCapturableError:
            return None
        self._captured = training
        return loss

    def _may_be_captured(self, inputs: Array) -> bool:
        """Whether a graph may repeat steps on such samples, by what is known without one."""
        weights = (p for p in self._module.parameters() if p.requires_grad)
        return (
            self._key is not None
            and inputs.dtype != np.int64  # texts: each batch has a length of its own
            and all(weight.dtype == torch.float32 for weight in weights)
        )

    @_repeatable
    def growth(self, counts: Mapping[str, int], inputs: Array, targets: Array) -> Entries:
        """The largest gradients at pruned weights on one mini-batch."""
        self._close()
        found = self._largest(counts, self._loss(inputs, targets))
        return {name: (at.numpy(), values.numpy()) for name, (at, values) in found.items()}

    @torch.no_grad()
    @_repeatable
    def evaluate(self, inputs: Array, targets: Array) -> Score:
        """Loss and metric by running statistics; the model is not changed."""
        self._module.eval()
        loss_sum = metric_sum = 0.0
        for start in range(0, len(targets), EVALUATION_BATCH):
            part = slice(start, start + EVALUATION_BATCH)
            batch = self._batch(inputs[part], targets[part])
            losses, metrics = self._task.measure(self._module, batch)
            loss_sum += float(losses.double().sum())
            metric_sum += 0.0 if metrics is None else float(metrics.double().sum())
        self._module.train()
        return Score(loss_sum, metric_sum)

    @torch.no_grad()
    @_repeatable
    def statistics(self, inputs: Array) -> Tensors:
        """Mean and variance of the input of every batch norm over all inputs, in train mode."""
        sums: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = {}
        momenta: dict[str, float | None] = {}
        handles: list[Any] = []
        norms = {n: m for n, m in self._module.named_modules() if isinstance(m, BatchNorm)}

        def record(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
            values = inputs[0].transpose(0, 1).flatten(1).double()
            total, squares, count = values.sum(1), (values**2).sum(1), values.shape[1]
            if name in sums:
                old = sums[name]
                total, squares, count = old[0] + total, old[1] + squares, old[2] + count
            sums[name] = (total, squares, count)

        if not norms:
            return {}
        for name, norm in norms.items():
            momenta[name], norm.momentum = norm.momentum, 0.0  # running statistics stand still
            handles.append(
                norm.register_forward_pre_hook(lambda _, inputs, name=name: record(name, inputs))
            )
        try:
            # The batches of the runtime: each is normalised by its own statistics.
            for part in statistics_batches(len(inputs), self._training.batch_size + 1):
                forward(self._module, self._batch(inputs[part], inputs[part]))  # no targets
        finally:
            for handle in handles:
                handle.remove()
            for name, norm in norms.items():
                norm.momentum = momenta[name]
        statistics: dict[str, Array] = {}
        for name, (total, squares, count) in sums.items():
            mean = total / count
            variance = (squares / count - mean**2).clamp_min(0)
            statistics[f"{name}.running_mean"] = mean.float().cpu().numpy()
            statistics[f"{name}.running_var"] = variance.float().cpu().numpy()
        return statistics

    def held_bytes(self) -> int:
        """Bytes held now for weights, gradients, momentum and patterns."""
        if self._captured is not None:
            return self._captured.state_bytes() + state_bytes(self._module)["weights"]
        if isinstance(self._optimizer, MaskedSGD):
            return sum(self._optimizer.state_bytes().values())
        held = state_bytes(self._module, self._optimizer)
        return sum(held[kind] for kind in ("weights", "gradients", "optimizer", "indices"))

    @property
    def _module(self) -> nn.Module:
        assert self._model is not None
        return self._model

    def _take(self, state: SparseState) -> None:
        """Bring a state into the module, which is built here the first time."""
        if self._model is None:
            self._model = self._build().to(self._device)
        load_state_(self._model, state)

    def _close(self) -> None:
        """Give the model's gradients back to torch."""

    def _optimizer_of(self, sgd: Sgd) -> Any:
        """The optimiser of these numbers; its momentum lasts until they or the state change."""
        if self._optimizer is None or self._sgd != sgd:
            self._close()
            self._optimizer, self._sgd = self._new_optimizer(sgd), sgd
        return self._optimizer

    def _new_optimizer(self, sgd: Sgd) -> Any:
        raise NotImplementedError

    def _largest(self, counts: Mapping[str, int], loss: Any) -> Mapping[str, Any]:
        raise NotImplementedError

    def _correct(self, correction: Correction) -> None:
        """Let `correction` change the gradients, those of pruned layers at active weights."""
        named = self._gradients()
        values = {name: value.cpu().numpy() for name, (value, _) in named.items()}
        gradients = {name: gradient.cpu().numpy() for name, (_, gradient) in named.items()}
        correction(values, gradients)
        for name, (_, gradient) in named.items():
            gradient.copy_(torch.from_numpy(gradients[name]))

    def _gradients(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Name -> (values, gradient); what is written into a gradient is what the step takes."""
        return {
            name: (parameter.detach(), parameter.grad)
            for name, parameter in self._module.named_parameters()
            if parameter.grad is not None
        }

    def _batch(self, inputs: Array, targets: Array) -> Any:
        return batch_of(inputs, targets, self._device)

    def _loss(self, inputs: Array, targets: Array) -> Callable[[nn.Module], torch.Tensor]:
        batch = self._batch(inputs, targets)
        return lambda model: self._task.loss(model, batch).mean()


class DenseModel(TorchModel):
    """Dense weights, gradients and momentum; a mask is laid over the weights after each step."""

    def _take(self, state: SparseState) -> None:
        super()._take(state)
        self._mask = None if state.patterns is None else Mask.from_csr(state.patterns)
        self._pruned: list[tuple[torch.Tensor, torch.Tensor]] = []
        if self._mask is not None:
            weights = weights_under(self._mask, self._module)
            self._pruned = [
                (weight.detach(), ~self._mask[name].to(self._device))
                for name, weight in weights.items()
            ]

    def _step(
        self, inputs: Array, targets: Array, sgd: Sgd, correction: Correction | None
    ) -> float:
        loss = super()._step(inputs, targets, sgd, correction)
        for weight, pruned in self._pruned:
            weight.masked_fill_(pruned, 0.0)
        return loss

    def _correct(self, correction: Correction) -> None:
        """As always; of pruned layers the active weights are taken out, and put back."""
        patterns: Mapping[str, Pattern] = self._patterns or {}
        places = {n: torch.from_numpy(p.positions()) for n, p in patterns.items()}
        named = self._gradients()
        active = {
            name: tuple(
                t.reshape(-1)[places[name].to(t.device)] if name in places else t for t in pair
            )
            for name, pair in named.items()
        }
        values = {name: pair[0].cpu().numpy() for name, pair in active.items()}
        gradients = {name: pair[1].cpu().numpy() for name, pair in active.items()}
        correction(values, gradients)
        for name, (_, gradient) in named.items():
            changed = torch.from_numpy(gradients[name]).to(gradient.device)
            if name in places:
                gradient.view(-1)[places[name].to(gradient.device)] = changed
            else:
                gradient.copy_(changed)

    def _new_optimizer(self, sgd: Sgd) -> MaskedSGD:
        # torch.optim.SGD computes the same, and imports a compiler for a second.
        return MaskedSGD(self._module, None, **sgd._asdict())

    def _largest(self, counts: Mapping[str, int], loss: Any) -> Mapping[str, Any]:
        assert self._mask is not None
        return adjust.topk_pruned_gradients(self._module, self._mask, counts, loss)


class MaskedModel(TorchModel):
    """Dense weights and kernels; gradients and momentum as long as the active weights."""

    def _take(self, state: SparseState) -> None:
        super()._take(state)
        assert state.patterns is not None
        self._mask = Mask.from_csr(state.patterns)

    def _new_optimizer(self, sgd: Sgd) -> MaskedSGD:
        return MaskedSGD(self._module, self._mask, **sgd._asdict())

    def _close(self) -> None:
        if self._optimizer is not None:
            self._optimizer.close()
            self._optimizer = None  # a step after this one has hooks of its own, and no momentum

    def _gradients(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {
            name: (value.reshape(-1), gradient.view(-1))
            if name in self._mask
            else (value, gradient)
            for name, (value, gradient) in self._optimizer.gradients().items()
        }

    def _largest(self, counts: Mapping[str, int], loss: Any) -> Mapping[str, Any]:
        return adjust.topk_pruned_gradients(self._module, self._mask, counts, loss)


class SparseModules(TorchModel):
    """Weights, gradients and momentum as long as the active weights; kernels skip the others.

    All is done by a training plan where the network has one, with the bits of the runtime, else
    module by module.
    """

    def _may_be_captured(self, inputs: Array) -> bool:
        return False

    def _step(
        self, inputs: Array, targets: Array, sgd: Sgd, correction: Correction | None
    ) -> float:
        plan, optimizer = self._plan_of(inputs), self._optimizer_of(sgd)
        if plan is None:
            return super()._step(inputs, targets, sgd, correction)
        batch = tensor_of(inputs), tensor_of(targets)
        if correction is None:
            return plan.step(*batch, optimizer=optimizer)[0]
        loss, _ = plan.step(*batch)
        self._correct(correction)
        optimizer.step()
        return loss

    @_repeatable
    def growth(self, counts: Mapping[str, int], inputs: Array, targets: Array) -> Entries:
        plan = self._plan_of(inputs)
        if plan is None or len(inputs) > plan.batch_size:
            return super().growth(counts, inputs, targets)
        batch = tensor_of(inputs), tensor_of(targets)
        found = plan.topk_pruned_gradients(counts, *batch)
        return {name: (at.numpy(), values.numpy()) for name, (at, values) in found.items()}

    def evaluate(self, inputs: Array, targets: Array) -> Score:
        plan = self._plan_of(inputs)
        if plan is None:
            return super().evaluate(inputs, targets)
        loss, correct = plan.evaluate(tensor_of(inputs), tensor_of(targets))
        return Score(loss * len(targets), correct)

    def statistics(self, inputs: Array) -> Tensors:
        plan = self._plan_of(inputs)
        if plan is None:
            return super().statistics(inputs)
        found = plan.batch_norm_statistics(tensor_of(inputs))
        return {name: values.numpy() for name, values in found.items()}

    def state(self) -> SparseState:
        own = dict(self._module.named_parameters()) | dict(self._module.named_buffers())
        tensors = {name: own[self._own_name(name)].detach() for name in self._order}
        arrays = {name: tensor.to("cpu", copy=True).numpy() for name, tensor in tensors.items()}
        return SparseState(arrays, self._patterns)

    def _take(self, state: SparseState) -> None:
        """Made anew for other patterns, on no memory but theirs."""
        self._model = sparse_model(skeleton(self._build), state).to(self._device)
        self._plan: TrainingPlan | None = None
        here = self._device.type == "cpu" and cpu.library() is not None
        self._without_plan = not here or not is_planned(self._module, self._task)

    def _plan_of(self, inputs: Array) -> TrainingPlan | None:
        """The native plan, made when it is first needed; None where the network has none."""
        if self._plan is None and not self._without_plan:
            try:
                # The last batch of an epoch may be larger by one (prunelab/data/batches.py).
                self._plan = TrainingPlan(
                    self._module,
                    inputs.shape[1:],
                    batch_size=self._training.batch_size + 1,
                    recompute=self._training.recompute,
                    normalization=normalization(inputs.shape[1]),
                )
            except PlanError:
                self._without_plan = True
        return self._plan

    def _own_name(self, name: str) -> str:
        pruned = self._patterns is not None and name in self._patterns
        return f"{name.removesuffix('weight')}values" if pruned else name

    def _gradients(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        own = dict(self._module.named_parameters())
        named = {name: own.get(self._own_name(name)) for name in self._order}
        return {
            n: (p.detach(), p.grad)
            for n, p in named.items()
            if p is not None and p.grad is not None
        }

    def _new_optimizer(self, sgd: Sgd) -> SparseSGD:
        return SparseSGD(self._module.parameters(), **sgd._asdict())

    def _largest(self, counts: Mapping[str, int], loss: Any) -> Mapping[str, Any]:
        return topk_pruned_gradients(self._module, counts, loss)
