"""A client's answers as they may leave it: clipped and noised, under masks, or not at all."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedprune.errors import ClientError
from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.privacy import secure_sum
from fedprune.privacy.noise import norm_bound, update_of
from fedprune.privacy.randomness import new_key, seeded_key
from fedprune.privacy.vector import Spec, vector_of

if TYPE_CHECKING:
    from fedprune.local.site import Local

TRAIN = "train"


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
    norm = 0.0
    if settings.dp != "none":
        if request.action != TRAIN:
            raise ClientError(f"{request.action!r} is asked, which privacy.dp does not cover")
        reply = update_of(reply, request, settings, key=_noise_key(request, local))
        norm = norm_bound(request.state(MODEL), settings)
    return reply if spec is None else _masked(reply, request, spec, local, norm=norm)


def _noise_key(request: Request, local: Local) -> bytes:
    privacy = local.config.privacy
    if privacy.seeds_noise(local.simulated):
        return seeded_key("noise", local.config.seed, request.round_index, local.client)
    return new_key()


def _masked(reply: Reply, request: Request, spec: Spec, local: Local, *, norm: float) -> Reply:
    weight = secure_sum.weight_of(local.kept, spec.session)
    most = 1 if norm else reply.num_examples
    if not 1 <= weight <= most:
        raise ClientError(f"a weight of {weight}: expected 1 to {most}")
    words = vector_of(replace(reply, weight=weight), request, spec, norm=norm)
    masked = secure_sum.mask(
        local.kept, spec.session, words, clients=spec.clients, width=spec.width
    )
    return Reply(reply.num_examples, resources=reply.resources, masked=masked)
