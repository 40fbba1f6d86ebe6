"""Wanda, federated: one mask from the norms of inputs that clients measure before training.

Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024: the score
of a weight is |w_ij| · ‖x_j‖₂ (equation 1), the norm of what it multiplies over calibration
samples, and weights of one output are ranked against each other. Here the samples are the clients'
own: each measures Σ x² of what goes into every prunable layer of the dense start, over all its
training samples, and the server adds them up. It sees no sample, no text and no gradient, and the
mask is that of the union of all samples.

The sums travel as tensors, one number for each input of a layer, in three parts by size
(exchange/wide.py), which makes the server's sum as exact as a relative 2^-22 and lets it be a
secure one. A client's samples count as often as they are, padding tokens of texts not at all; who
does not answer is missing, and nothing else changes.

Linear layers of any network and convolutions are pruned: what a convolution's row multiplies is a
patch, so that it has a norm for each input channel and place of the kernel. No other layer is
prunable in this project. Clients need torch for the question.

Departs from the paper: all layers are measured in one pass of the dense network, and not one block
after the other with what is pruned before it. Sparse federated averaging at that fixed mask
follows; `training.rounds = 1` is nearest to pruning in one shot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedprune.errors import ClientError
from fedprune.exchange.messages import MODEL, Expected, Reply, Request
from fedprune.exchange.wide import PARTS, joined, parted
from fedprune.local.training import train
from fedprune.methods.base import Start, not_negative
from fedprune.methods.fixed_mask import BY_SHAPES, FixedMask
from prunelab.errors import RunError
from sparsemodel.masks.distribution import n_of_m
from sparsemodel.runtime.pattern import Patterns

if TYPE_CHECKING:
    from torch import nn

    from fedprune.local.site import Local

SQUARES = "input-squares"
BATCH = 64  # samples that go through the network together
Squares = Mapping[str, NDArray[np.float64]]


def measure(request: Request, local: Local) -> Reply:
    """The client half: Σ x² of the inputs of the layers asked for, a sample's mean.

    Raises:
        ClientError: no sample, no layer of that name, or numbers that have no end.
    """
    import torch  # noqa: PLC0415

    from prunelab.data.tensors import batch_of  # noqa: PLC0415
    from prunelab.runs.seeds import seeded  # noqa: PLC0415
    from prunelab.runs.threads import computing  # noqa: PLC0415
    from sparsemodel.calibration.squares import input_squares  # noqa: PLC0415
    from sparsemodel.layers.from_state import load_state_  # noqa: PLC0415

    state, own, wanted = request.state(MODEL), local.data.train, request.fields.get("layers")
    if not isinstance(wanted, list) or not all(name in state.values for name in wanted):
        raise ClientError("field 'layers': expected names of the model's tensors")
    if not len(own):
        raise ClientError("no training sample: there is nothing to measure")
    training, task = local.config.training, local.network.task()
    device = torch.device(training.device)
    batches = (
        batch_of(own.inputs[first : first + BATCH], own.targets[first : first + BATCH], device)
        for first in range(0, len(own), BATCH)
    )
    with computing(training.threads), seeded(0, device):  # a network's own code may draw
        model: nn.Module = local.network.build().to(device)
        load_state_(model, state)
        found = input_squares(model, wanted, batches, forward=task.measure)
    means = {name: total.numpy() / len(own) for name, total in found.items()}
    return Reply(len(own), tensors=parted(means))


@dataclass(frozen=True)
class Wanda(FixedMask):
    """A fixed mask by weights times the norms of their inputs, which clients measure.

    Attributes:
        density: share of the prunable weights that are kept.
        distribution: how many each layer keeps: "uniform", "erk" or "erk-conv"; norms of different
            layers have no common measure.
        within: where weights are ranked against each other: in each "row", that is output, which
            all keep as many; in the "layer"; or in groups along a row, such as "2:4", which keeps
            two of every four neighbours: density is 0.5 then.
    """

    name: ClassVar[str] = "wanda"
    actions = {"train": train, SQUARES: measure}  # noqa: RUF012
    distributions: ClassVar[tuple[str, ...]] = BY_SHAPES

    within: str = "row"

    def problems(self) -> Iterable[str]:
        yield from super().problems()
        if self.within in {"row", "layer"}:
            return
        groups = n_of_m(self.within)
        if groups is None or not 1 <= groups[0] <= groups[1]:
            yield f"within: expected 'row', 'layer' or such as '2:4', got {self.within!r}"
        elif self.density != groups[0] / groups[1]:
            share = groups[0] / groups[1]
            yield f"density: {self.within!r} keeps {share:g} of all weights, got {self.density}"
        elif self.distribution != "uniform":
            yield f"distribution: {self.within!r} keeps the same share of every layer"

    def mask(self, server: Start) -> Patterns:
        from sparsemodel.calibration.squares import rows_of  # noqa: PLC0415
        from sparsemodel.masks.prune import prune  # noqa: PLC0415

        state, names = server.state(), list(server.prunable)
        model: nn.Module = server.place().network.build()  # its layers matter, no value does
        rows = rows_of(model, names)
        self._check_groups(rows)
        found = union_squares(server, rows)
        scores = {name: _scores(state.values[name], found[name]) for name in names}
        mask = prune(
            model,
            self.density,
            criterion=lambda: scores,
            distribution=self.distribution,
            names=names,
            within=self.within,
        )
        return mask.csr()

    def _check_groups(self, rows: Mapping[str, tuple[int, int]]) -> None:
        """Before anybody is asked."""
        groups = n_of_m(self.within)
        odd = [name for name, (_, length) in rows.items() if groups and length % groups[1]]
        if odd:
            raise RunError(
                f"wanda: within = {self.within!r} divides rows into groups, and those of "
                f"{odd[0]!r} have {rows[odd[0]][1]} weights; take 'row' or 'layer', or freeze "
                f"{'these layers' if len(odd) > 1 else 'the layer'} (requires_grad=False): "
                f"{', '.join(odd[:5])}"
            )


def union_squares(server: Start, rows: Mapping[str, tuple[int, int]]) -> Squares:
    """Name -> Σ x² over the samples of all clients that answered, [groups, row].

    Raises:
        RunError: nobody could answer, or a layer was reached by nothing.
    """

    def check(reply: Reply) -> None:
        for part in PARTS:
            not_negative(reply, part)

    names = list(rows)
    request = Request(
        SQUARES,
        fields={"layers": names},
        states={MODEL: server.state()},
        expected=Expected(tensors=dict.fromkeys(PARTS, names), shapes=rows),
        check=check,
        forward_passes=[{}],
    )
    pooled = server.pooled(request)
    if not pooled.clients:
        raise RunError("wanda: no client could measure the inputs of its layers")
    found = {name: pooled.weight * value for name, value in joined(pooled.tensors).items()}
    unreached = [name for name in names if not found[name].any()]
    if unreached:
        raise RunError(
            f"wanda: no input but zeros has reached {', '.join(unreached[:5])} at any client, so "
            "nothing tells its weights apart; freeze it (requires_grad=False), or take a method "
            "that looks at weights alone"
        )
    return found


def _scores(weight: NDArray[np.float32], squares: NDArray[np.float64]) -> Any:
    """|w| · ‖x‖₂ as a tensor of the weight's shape, float32."""
    import torch  # noqa: PLC0415

    groups, length = squares.shape
    norms = np.sqrt(squares).astype(np.float32)[:, None]
    scores = np.abs(weight).reshape(groups, -1, length) * norms
    return torch.from_numpy(scores.reshape(weight.shape))
