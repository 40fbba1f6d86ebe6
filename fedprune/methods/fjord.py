"""FjORD: ordered dropout, which trains every width up to the client's own.

Horváth et al., FjORD: Fair and Accurate Federated Learning under heterogeneous targets with Ordered
Dropout, NeurIPS 2021; details that the paper leaves open from the authors' baseline in Flower. A
client of rate p_max holds the network of that width. For each mini-batch it draws a rate p, uniform
over the run's rates up to its own, and makes the step with the first ⌈p c⌉ of each layer's c
channels. The server averages each coordinate over the clients that have it (widths.py).

A width is drawn for each step and not for each round: so the paper defines it, and a client's
answer then holds all of its widths, where one width a round would leave wide coordinates to few
clients. A step costs what its width costs. Weights outside it have a zero gradient, as in the
authors' code: momentum and weight decay move them.

Each width is normalised by its own batch's statistics; scale and shift are shared. Running
statistics of the global model are those of steps at the full width; those of narrower networks are
measured on clients after the last round, for the account.

Departs from the paper: no self-distillation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedprune.errors import ClientError
from fedprune.exchange.gate import is_statistic
from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.local.model import Correction, LocalModel, Sgd, open_model
from fedprune.local.site import other_network
from fedprune.local.training import SEED_ROUND, require_samples, train
from fedprune.methods.base import RunState
from fedprune.methods.widths import MEASURE, SEED_WIDTHS, Plan, Tier, WidthTiers, measure
from prunelab.runs.seeds import rng
from sparsemodel.errors import ProgramError
from sparsemodel.runtime.narrow import channels_of, leading, narrowed_to
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.state import Array, SparseState, Tensors

if TYPE_CHECKING:
    from fedprune.local.site import Local
    from fedprune.settings import TrainingConfig

WIDTHS = "widths"


def train_ordered(request: Request, local: Local) -> Reply:
    """The client half: local training whose steps are each of one of the widths asked for."""
    widths = request.fields.get(WIDTHS, [])
    if not widths:  # its own alone
        return train(request, local)
    require_samples(len(local.data.train), request)
    model = OrderedDropout(
        request.state(MODEL),
        _programs(local.network.program, widths),
        local.config.training,
        order=rng(SEED_WIDTHS, local.seed(SEED_ROUND, request.round_index)),
    )
    return train(request, local, model=model)  # type: ignore[arg-type]  # what training needs of one


def _programs(program: Program | None, widths: object) -> list[Program]:
    """The client's own network and the narrower ones, each given by the channels of its layers."""
    if program is None:
        raise ClientError("ordered dropout needs the network's program")
    if not isinstance(widths, list) or not all(
        isinstance(each, list) and all(type(count) is int for count in each) for each in widths
    ):
        raise ClientError(f"field 'widths': expected lists of channels, got {widths!r:.60}")
    try:
        return [program, *(narrowed_to(program, channels) for channels in widths)]
    except ProgramError as error:
        raise ClientError(f"field 'widths': {error}") from None


class OrderedDropout:
    """A dense model whose steps are each made with one of several nested widths.

    Args:
        state: of the widest.
        programs: the widest first.
        order: draws the width of each step, uniform.
    """

    def __init__(
        self,
        state: SparseState,
        programs: list[Program],
        training: TrainingConfig,
        *,
        order: np.random.Generator,
    ) -> None:
        self._values = {name: value.copy() for name, value in state.values.items()}
        self._programs, self._training, self._order = programs, training, order
        self._models: dict[int, LocalModel] = {}
        self._momentum: dict[str, Array] = {}

    def state(self) -> SparseState:
        """The widest network's state now."""
        return SparseState({name: value.copy() for name, value in self._values.items()})

    def step(
        self,
        inputs: Array,
        targets: Array,
        *,
        sgd: Sgd,
        correction: Correction | None = None,
        seed: int = 0,
    ) -> float:
        """One SGD step with a width that is drawn; returns its mean loss before the step."""
        number = int(self._order.integers(len(self._programs)))
        model = self._model(number)
        gradients: dict[str, Array] = {}

        def take(_: Tensors, found: Tensors) -> None:
            for name, gradient in found.items():
                gradients[name] = whole = np.zeros_like(self._values[name])
                whole[_part(gradient)] = gradient

        loss = model.step(inputs, targets, sgd=Sgd(0.0, 0.0, 0.0), correction=take, seed=seed)
        if number == 0:
            after = model.state().values
            self._values |= {name: value for name, value in after.items() if is_statistic(name)}
        values = {name: self._values[name] for name in gradients}
        if correction is not None:
            correction(values, gradients)
        self._update(values, gradients, sgd)
        return loss

    def held_bytes(self) -> int:
        """Bytes held for the widest weights and their momentum, and by every width's model."""
        own = [*self._values.values(), *self._momentum.values()]
        models = sum(model.held_bytes() for model in self._models.values())
        return models + sum(value.nbytes for value in own)

    def _model(self, number: int) -> LocalModel:
        """The model of a width, with the weights of now."""
        program = self._programs[number]
        state = leading(SparseState(self._values), program.shapes())
        if number in self._models:
            self._models[number].load(state)
        else:
            self._models[number] = open_model(other_network(program), state, self._training)
        return self._models[number]

    def _update(self, values: Tensors, gradients: Tensors, sgd: Sgd) -> None:
        for name, value in values.items():
            step = gradients[name]
            if sgd.weight_decay:
                step += np.float32(sgd.weight_decay) * value
            if sgd.momentum:
                if name in self._momentum:
                    step += np.float32(sgd.momentum) * self._momentum[name]
                self._momentum[name] = step
            np.subtract(value, np.float32(sgd.lr) * step, out=value)


def _part(array: Array) -> tuple[slice, ...]:
    return tuple(slice(size) for size in array.shape)


@dataclass(frozen=True)
class FjORD(WidthTiers):
    """Ordered dropout: clients train every width up to their own, a width drawn for each step.

    Attributes:
        tiers: "rate:share, ...": the rates, and the share of clients of which each is the largest.
        static_norm: of WidthTiers.
    """

    name: ClassVar[str] = "fjord"
    actions = {"train": train_ordered, MEASURE: measure}  # noqa: RUF012

    static_norm: bool = False

    def networks(self, request: Request, program: Program) -> list[Program]:
        return _programs(program, request.fields.get(WIDTHS, []))

    def question(self, state: RunState, tier: Tier, plan: Plan) -> Request:
        request = super().question(state, tier, plan)
        inner = [each for each in plan.tiers if each.rate < tier.rate]
        if not inner:
            return request
        wide = plan.tiers[0].program
        widths = [channels_of(wide, each.rate) for each in inner]
        macs = round(np.mean([each.macs for each in [tier, *inner]]))
        return replace(request, fields={**request.fields, WIDTHS: widths}, macs=macs)
