"""A client's model: what local training needs of it, and which of the ways to compute it is taken.

The runtime computes sparse models without torch. Torch's side (`torch_models.py`) computes what
has no program, dense models, and the executions "masked" and "dense".
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from numpy.typing import NDArray

from fedprune.settings import FLOAT32, TrainingConfig
from prunelab.data.batches import Preprocessing
from sparsemodel.kernels.cpu import library as cpu
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.state import Entries, SparseState, Tensors
from sparsemodel.runtime.trainer import Trainer

if TYPE_CHECKING:
    from prunelab.training.task import Task

Array = NDArray[Any]
Correction = Callable[[Tensors, Tensors], None]
"""(values, gradients) by name: changes the gradients in place before a step."""


PREPROCESSING = Preprocessing()


def normalization(channels: int) -> tuple[list[float], list[float]]:
    """Mean and deviation of every channel, as native plans take them."""
    mean, std = PREPROCESSING.normalization(channels)
    return mean.tolist(), std.tolist()


class Sgd(NamedTuple):
    """The numbers of one SGD step."""

    lr: float
    momentum: float
    weight_decay: float


class Score(NamedTuple):
    """Sums over samples, so that results of several clients can be added.

    Attributes:
        metric_sum: of the task's metric; of classes the number told right; 0 where there is none.
    """

    loss_sum: float
    metric_sum: float


class LocalModel(Protocol):
    """A model on one client, under patterns or dense.

    Inputs and targets are arrays as a store has them: uint8 or float32 [N, C, H, W] and classes,
    int64 [N], for instance.
    """

    def load(self, state: SparseState) -> None:
        """Take over a state, under the same patterns or others; momentum starts at zero."""
        ...

    def state(self) -> SparseState:
        """The state now, under the patterns that were loaded last."""
        ...

    def step(
        self,
        inputs: Array,
        targets: Array,
        *,
        sgd: Sgd,
        correction: Correction | None = None,
        seed: int = 0,
    ) -> float:
        """One SGD step on a mini-batch; returns its mean loss before the step.

        Args:
            seed: of layers that draw, such as dropout.
        """
        ...

    def growth(self, counts: Mapping[str, int], inputs: Array, targets: Array) -> Entries:
        """The largest gradients at pruned weights on one mini-batch."""
        ...

    def statistics(self, inputs: Array) -> Tensors:
        """Mean and variance of the input of every batch norm over all inputs, in train mode."""
        ...

    def evaluate(self, inputs: Array, targets: Array) -> Score:
        """Loss and metric by running statistics."""
        ...

    def held_bytes(self) -> int:
        """Bytes held now for weights, gradients, momentum and patterns."""
        ...


def _classification() -> Task:
    from prunelab.training.task import ImageClassification  # noqa: PLC0415

    return ImageClassification()


@dataclass(frozen=True)
class Network:
    """How a client comes by its network.

    Attributes:
        program: for the runtime; None where the network has none, or the task is another than
            the runtime's, which is classification.
        build: makes the torch module, dense, with whatever weights.
        shapes: of the float state, in its order.
        task: makes the task, with torch.
        other: whether it is another network than the run's (`Request.program`).
        key: equal for networks that are the same module; None: nobody knows.
    """

    program: Program | None
    build: Callable[[], Any]
    shapes: Mapping[str, tuple[int, ...]]
    task: Callable[[], Task] = _classification
    other: bool = False
    key: Hashable = None


def open_model(network: Network, state: SparseState, training: TrainingConfig) -> LocalModel:
    """A model that holds `state`, computed as the configuration and the network allow."""
    if uses_runtime(network, state, training):
        assert network.program is not None
        return RuntimeModel(network.program, state, training)
    from fedprune.local.torch_models import open_torch_model  # noqa: PLC0415

    return open_torch_model(network.build, state, training, network.task(), key=network.key)


def execution_of(training: TrainingConfig, *, pruned: bool) -> str:
    """How a model is computed here: "sparse", "masked" or "dense", "auto" resolved."""
    if not pruned:
        return "dense"
    if training.execution != "auto":
        return training.execution
    native = training.device == "cpu" and cpu.library() is not None
    return "sparse" if native and training.precision == FLOAT32 else "masked"


def uses_runtime(network: Network, state: SparseState, training: TrainingConfig) -> bool:
    """Whether the runtime computes this model, without torch.

    Of the run's own network pruned states, and dense ones where the execution is "sparse" by
    name: at those torch is faster from about 32 channels in the first stage on, and slower below
    (benchmarks/dense_steps.py). A network that a question brings is the runtime's in any case.
    """
    if network.program is None or training.device != "cpu" or cpu.library() is None:
        return False
    if training.precision != FLOAT32:
        return False
    if network.other or state.patterns is None:
        return network.other or training.execution == "sparse"
    return execution_of(training, pruned=True) == "sparse"


class RuntimeModel:
    """A sparse model on the runtime."""

    def __init__(self, program: Program, state: SparseState, training: TrainingConfig) -> None:
        # The last batch of an epoch may be larger by one (prunelab/data/batches.py).
        self._trainer = Trainer(
            program,
            state,
            batch_size=training.batch_size + 1,
            recompute=training.recompute,
            threads=training.threads,
            normalization=normalization(program.input_shape[0]),
        )

    def load(self, state: SparseState) -> None:
        self._trainer.load(state)
        self._trainer.reset_momentum()

    def state(self) -> SparseState:
        return self._trainer.state()

    def step(
        self,
        inputs: Array,
        targets: Array,
        *,
        sgd: Sgd,
        correction: Correction | None = None,
        seed: int = 0,  # programs draw nothing
    ) -> float:
        numbers = sgd._asdict()
        return self._trainer.step(inputs, targets, **numbers, correct_gradients=correction)[0]

    def growth(self, counts: Mapping[str, int], inputs: Array, targets: Array) -> Entries:
        self._trainer.release()  # training's gradients and arena: growth has an arena of its own
        return self._trainer.growth(counts, inputs, targets)

    def statistics(self, inputs: Array) -> Tensors:
        return self._trainer.batch_norm_statistics(inputs)

    def evaluate(self, inputs: Array, targets: Array) -> Score:
        return Score(*self._trainer.evaluate(inputs, targets))

    def held_bytes(self) -> int:
        held = self._trainer.held_bytes()
        return sum(size for kind, size in held.items() if kind != "arena")
