"""Differential privacy of whole clients in sparse space: clipped updates and Gaussian noise.

McMahan et al., Learning Differentially Private Recurrent Language Models, ICLR 2018: every client
counts for one, its update is clipped, and noise is added to the sum. Updates are differences of
the active values alone: under one mask all clients have the same coordinates.

Statistics of batch norms are part of the update, clipped and noised with it, and their means are
plain ones: a pooled variance would hold squares that the clip does not bound. (Opacus has networks
with batch norm refused, since gradients of single samples mix there; updates of whole clients do
not.) Losses, and growth entries, whose places tell of the data, are not sent.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from fedprune.errors import ClientError
from fedprune.exchange.messages import MODEL, Expected, Reply, Request
from fedprune.privacy.randomness import Stream, gaussian
from fedprune.settings import PrivacyConfig
from sparsemodel.runtime.state import Array, SparseState

_MARGIN = 1 - 2.0**-20  # rounding to float32 must not lead beyond the clip
_VARIANCE = "running_var"


def question(request: Request, privacy: PrivacyConfig) -> Request:
    """A question for training whose answers are updates, and nothing else."""
    expected = Expected(states=[MODEL], norm=norm_bound(request.states[MODEL], privacy))
    return replace(request, expected=expected, check=lambda reply: None)


def norm_bound(state: SparseState, privacy: PrivacyConfig) -> float:
    """The largest norm that an honest client's update has."""
    if privacy.dp == "central":
        return privacy.clip
    size = sum(value.size for value in state.values.values())
    return privacy.clip * (1 + privacy.noise_multiplier * (math.sqrt(size) + 10))  # 10 deviations


def update_of(reply: Reply, request: Request, privacy: PrivacyConfig, *, key: bytes) -> Reply:
    """A client's answer to a question for training: its clipped update, with noise if "local".

    Args:
        key: of the noise.

    Raises:
        ClientError: the question asks for growth entries.
    """
    if request.fields.get("grow"):
        raise ClientError("growth entries are asked for, which privacy.dp does not cover")
    update = clipped(difference(reply.states[MODEL], request.state(MODEL)), privacy.clip)
    if privacy.dp == "local":
        update = noisy(update, privacy.noise_multiplier * privacy.clip, key=key)
    return Reply(reply.num_examples, states={MODEL: update}, resources=reply.resources)


def released(
    before: SparseState,
    update: SparseState,
    privacy: PrivacyConfig,
    *,
    num_clients: int,
    key: bytes,
) -> SparseState:
    """The model after a round, from the mean of the clients' updates.

    "central" adds noise to it here. A variance that noise brought below its own deviation is set
    to that: less cannot be told from it.

    Args:
        num_clients: how many updates the mean is of.
        key: of the noise.
    """
    deviation = privacy.noise_multiplier * privacy.clip / num_clients
    if privacy.dp == "central":
        update = noisy(update, deviation, key=key)
    else:
        deviation *= num_clients**0.5
    values = {}
    for name, value in before.values.items():
        total = value.astype(np.float64) + update.values[name]
        if name.endswith(_VARIANCE):
            total = np.maximum(total, deviation)
        values[name] = total.astype(np.float32)
    return SparseState(values, before.patterns)


def difference(after: SparseState, before: SparseState) -> SparseState:
    """What training changed, of every tensor."""
    changed = {
        name: value.astype(np.float64) - before.values[name] for name, value in after.values.items()
    }
    return SparseState(changed, after.patterns)


def clipped(update: SparseState, clip: float) -> SparseState:
    """The update, scaled down to a norm of at most `clip`, in float32.

    >>> clipped(SparseState({"w": np.array([3.0, 4.0])}), 1.0).values["w"].round(4)
    array([0.6, 0.8], dtype=float32)
    """
    norm = float(np.sqrt(sum(np.vdot(value, value) for value in update.values.values())))
    scale = min(1.0, clip * _MARGIN / norm) if norm else 1.0
    if not np.isfinite(norm):
        raise ClientError("the update is not finite; is training.lr too high?")
    scaled = {name: (scale * value).astype(np.float32) for name, value in update.values.items()}
    return SparseState(scaled, update.patterns)


def noisy(update: SparseState, deviation: float, *, key: bytes) -> SparseState:
    """The update plus Gaussian noise of that deviation, in the order of the state."""
    stream = Stream(key)

    def drawn(value: Array) -> Array:
        noise = gaussian(stream, value.size).reshape(value.shape)
        return (value + deviation * noise).astype(np.float32)

    return SparseState(
        {name: drawn(value) for name, value in update.values.items()}, update.patterns
    )
