"""SSFL: one static mask from saliency that clients measure on their own data before training.

Ohib et al., SSFL: Discovering Sparse Unified Subnetworks at Initialization for Efficient
Federated Learning, TMLR 2025. Each client computes s_k = |w ⊙ ∂L_k/∂w| of the dense start; the
server ranks all weights of the network by the mean Σ_k p_k s_k and keeps the largest; sparse
federated averaging at that fixed mask follows.

The question needs the dense start and its dense gradients on every client, once: it is the one
time that a client holds them.

Departs from the paper: the start is the one that all methods here share, briefly pre-trained on
the server's samples; a client's saliency is that of its mean gradient over `batches` mini-batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedprune.errors import ClientError
from fedprune.exchange.messages import MODEL, Expected, Reply, Request, count
from fedprune.local.model import Sgd
from fedprune.local.training import gradient_batches, require_samples, train
from fedprune.methods.base import Start, not_negative
from fedprune.methods.fixed_mask import FixedMask, largest
from prunelab.errors import RunError
from sparsemodel.runtime.pattern import Patterns
from sparsemodel.runtime.state import Tensors

if TYPE_CHECKING:
    from fedprune.local.site import Local

SALIENCY = "saliency"


def saliency(request: Request, local: Local) -> Reply:
    """The client half: |w ⊙ mean gradient| of the layers asked for, over a few mini-batches."""
    data, wanted = local.data, request.fields.get("layers")
    start = request.state(MODEL)
    if not isinstance(wanted, list) or not all(name in start.values for name in wanted):
        raise ClientError("field 'layers': expected names of the model's tensors")
    batches = count(request.fields, "batches")
    if batches < 1:
        raise ClientError("field 'batches': expected at least 1, got 0")
    require_samples(len(data.train), request)
    model = local.open(start)
    sums = {name: 0.0 * start.values[name] for name in wanted}
    samples = 0

    def collect(_: Tensors, gradients: Tensors) -> None:
        if not sums.keys() <= gradients.keys():
            raise ClientError("field 'layers': expected names of what is trained")
        for name in sums:
            sums[name] += len(labels) * gradients[name]

    for images, labels in gradient_batches(local, 0, most=batches):
        model.step(images, labels, sgd=Sgd(0.0, 0.0, 0.0), correction=collect)
        samples += len(labels)
    scores = {name: abs(total * start.values[name] / samples) for name, total in sums.items()}
    return Reply(len(data.train), tensors={SALIENCY: scores})


@dataclass(frozen=True)
class SSFL(FixedMask):
    """Sparse federated averaging at a mask of the clients' mean saliency.

    Attributes:
        density: share of the prunable weights that are kept.
        distribution: how many each layer keeps: "uniform", "erk", "erk-conv", "global" or
            "global-minimum".
        batches: mini-batches over which a client measures.
    """

    name: ClassVar[str] = "ssfl"
    actions = {"train": train, SALIENCY: saliency}  # noqa: RUF012

    distribution: str = "global"
    batches: int = 1

    def problems(self) -> Iterable[str]:
        yield from super().problems()
        if self.batches < 1:
            yield f"batches: expected at least 1, got {self.batches}"

    def mask(self, server: Start) -> Patterns:
        state, layers = server.state(), list(server.prunable)
        request = Request(
            SALIENCY,
            fields={"layers": layers, "batches": self.batches},
            states={MODEL: state},
            expected=Expected(tensors={SALIENCY: layers}),
            check=lambda reply: not_negative(reply, SALIENCY),
        )
        pooled = server.pooled(request)
        if not pooled.clients:
            raise RunError("ssfl: no client could measure saliency")
        found = pooled.tensors[SALIENCY]
        scores = {name: found[name] for name in layers}  # whoever answered first
        return largest(scores, self.density, self.distribution)
