"""A client's answers as they may leave it: clipped and noised, under masks, or not at all."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedprune.errors import ClientError
from fedprune.exchange.messages import Reply, Request
from fedprune.privacy import secure_sum
from fedprune.privacy.vector import Spec, vector_of

if TYPE_CHECKING:
    from fedprune.local.site import Local


def protected(reply: Reply, request: Request, local: Local) -> Reply:
    """An answer as the run's privacy settings have it.

    Raises:
        ClientError: the question is not one that they allow, or values that cannot be added up.
    """
    settings = local.config.privacy
    spec = Spec.read(request.fields)
    if settings.secure_aggregation != (spec is not None):
        raise ClientError(
            f"{request.action!r} is asked {'under masks' if spec else 'in the clear'}, and "
            f"privacy.secure_aggregation is {str(settings.secure_aggregation).lower()}"
        )
    return reply if spec is None else _masked(reply, request, spec, local)


def _masked(reply: Reply, request: Request, spec: Spec, local: Local) -> Reply:
    weight = secure_sum.weight_of(local.kept, spec.session)
    if not 1 <= weight <= reply.num_examples:
        raise ClientError(f"a weight of {weight} for {reply.num_examples} samples")
    words = vector_of(replace(reply, weight=weight), request, spec)
    masked = secure_sum.mask(
        local.kept, spec.session, words, clients=spec.clients, width=spec.width
    )
    return Reply(reply.num_examples, resources=reply.resources, masked=masked)
