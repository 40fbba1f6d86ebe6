"""HeteroFL: clients of several widths, each averaged into what it has of the global network.

Diao et al., HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous
Clients, ICLR 2021; settings from the authors' code. Three parts beside the nested widths and their
means (widths.py):

- Static batch norm: training uses the statistics of each batch and keeps none; those of the global
  model are measured afterwards, by a question to clients. Only clients of the full width can run
  it, so they are asked, which costs them the model once more a round, and a forward pass.
- Scaler: while a network of rate r trains, the input of each batch norm is divided by r, so that
  narrower networks see activations of the same size. In front of a batch norm that is exactly the
  same as r² ε in place of its ε, which is how it is done here; a network with a layer that no
  batch norm follows is refused.
- Masked cross-entropy: logits of classes that a client lacks are set to 0 in its training, and the
  rows of the last layer of those classes are averaged over the clients that have them. Here those
  rows are 0 and stand still, which gives the same logits and gradients.

Departs from the paper: means are weighted by samples; running statistics travel with the model
although they are not used in training; a client keeps its rate for the whole run (the paper's
"fix", by the run's seed).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedprune.errors import ClientError
from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.local.training import train
from fedprune.methods.base import RunState
from fedprune.methods.widths import MEASURE, Plan, Tier, TierMean, WidthTiers, measure
from sparsemodel.errors import ProgramError
from sparsemodel.runtime.narrow import narrowed, output_layer, scaled_norms
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.state import SparseState, Tensors

if TYPE_CHECKING:
    from fedprune.local.site import Local

CLASSES = "classes"


def train_masked(request: Request, local: Local) -> Reply:
    """The client half: local training, where asked for without the classes that it lacks."""
    if not request.fields.get("masked"):
        return train(request, local)
    program, received = local.network.program, request.state(MODEL)
    if program is None:
        raise ClientError("masked training needs the network's program")
    own = np.unique(local.data.train.targets).tolist()
    lacking = np.setdiff1d(np.arange(program.classes), own)
    rows = {name: received.values[name][lacking] for name in last_tensors(program)}
    masked = SparseState({name: value.copy() for name, value in received.values.items()})
    _fill(masked.values, dict.fromkeys(rows, 0.0), lacking)

    def stand_still(_: Tensors, gradients: Tensors) -> None:
        _fill(gradients, dict.fromkeys(rows, 0.0), lacking)

    asked = replace(request, states={MODEL: masked})
    reply = train(asked, local, correction=stand_still)
    _fill(reply.states[MODEL].values, rows, lacking)
    return replace(reply, fields={**reply.fields, CLASSES: own})


def _fill(
    tensors: Tensors, rows: dict[str, object], places: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> None:
    for name, values in rows.items():
        tensors[name][places] = values


def last_tensors(program: Program) -> list[str]:
    """Names of the parameters of the layer that gives the logits."""
    return program.nodes[output_layer(program)].parameters()


@dataclass(frozen=True)
class HeteroFL(WidthTiers):
    """Clients of several widths, averaged coordinate by coordinate, with static batch norm.

    Attributes:
        tiers, static_norm: of WidthTiers.
        scaler: whether narrower networks are scaled while they train.
        masked_loss: whether clients train without the classes that they lack.
    """

    name: ClassVar[str] = "heterofl"
    actions = {"train": train_masked, MEASURE: measure}  # noqa: RUF012

    scaler: bool = True
    masked_loss: bool = True

    def network(self, program: Program, rate: float) -> Program:
        narrow = narrowed(program, rate)
        if not self.scaler:
            return narrow
        try:
            return scaled_norms(narrow, rate)
        except ProgramError as error:
            raise ProgramError(
                f"{error}, and the scaler needs one behind every hidden layer; set method.scaler "
                "to false"
            ) from None

    def question(self, state: RunState, tier: Tier, plan: Plan) -> Request:
        request = super().question(state, tier, plan)
        if not self.masked_loss:
            return request
        num_classes, before = plan.tiers[0].program.classes, request.check

        def check(reply: Reply) -> None:
            before(reply)
            _check_classes(reply.fields[CLASSES], num_classes)

        return replace(
            request,
            fields={**request.fields, "masked": True},
            expected=replace(request.expected, fields=["loss", CLASSES]),
            check=check,
        )

    def collector(self, state: RunState) -> TierMean:
        plan = self.plan(state)
        rows = last_tensors(plan.tiers[0].program) if self.masked_loss else ()
        return TierMean(plan, state.model, rows=rows)


def _check_classes(classes: object, num_classes: int) -> None:
    if not (
        isinstance(classes, list)
        and classes
        and all(type(each) is int and 0 <= each < num_classes for each in classes)
        and len(set(classes)) == len(classes)
    ):
        raise ClientError(f"field 'classes': expected classes, each once, got {classes!r:.60}")
