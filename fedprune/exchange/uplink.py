"""A trained model in fewer bytes: what training changed, rounded, or the largest of it alone.

What a client has to say of its weights is the change, trained minus received, at the mask: it is
smaller than the weights by far, so a number format of few bits costs less of it, and most of it
is in few coordinates. What does not travel, by rounding or for being small, is the residual; error
feedback adds it to the next change (Seide et al., 1-bit stochastic gradient descent, Interspeech
2014; Karimireddy et al., Error feedback fixes SignSGD, ICML 2019; with local training and clients
that are not always drawn: Li and Li, Analysis of error feedback in federated non-convex
optimization, ICML 2023).

The largest are the largest of all weights: no other choice of as many leaves less behind. Where
they are costs about log2 C(n, k) bits, by the codec's own code for sets. Values are rounded to
nearest: with error feedback a bias does not last, and stochastic rounding would double the mean
square of what is left over.

Batch-norm statistics travel whole and as they are, not as changes, in bf16, whose rounding makes
no variance negative. To tell a share of them alone loses much accuracy for few bytes. They leave no
residual, for training measures them anew.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedprune.errors import DIVERGED, ClientError
from sparsemodel.codec import decode_mask_delta, decode_state, encode_mask_delta, encode_state
from sparsemodel.runtime.adjust import largest
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import Array, SparseState, Tensors

VALUES, CHOSEN, STATISTICS = UPDATE = ("u", "k", "b")
"""Kinds of frames: changes of weights, of which weights they are, and statistics."""

STATISTICS_DTYPE = "bf16"


@dataclass(frozen=True)
class Uplink:
    """How the model of a reply travels.

    Attributes:
        dtype: fp32, fp16, bf16 or int8.
        topk: share of the weights whose changes travel, the largest, in (0, 1].
        error_feedback: whether what does not travel is added to the next change.
    """

    dtype: str = "fp32"
    topk: float = 1.0
    error_feedback: bool = True

    @property
    def exact(self) -> bool:
        """Whether nothing is lost: then the trained values travel as they are."""
        return self.dtype == "fp32" and self.topk == 1


EXACT = Uplink()


def compress(
    trained: SparseState,
    received: SparseState,
    uplink: Uplink,
    *,
    residual: SparseState | None = None,
) -> tuple[dict[str, bytes], SparseState]:
    """What is to be sent of a trained model, as frames, and what is left over.

    Args:
        received: what training started from, under the same patterns.
        residual: what earlier calls left over, under these patterns; None: nothing.

    Returns:
        Frames by kind, and the new residual: the change of the weights and the old residual, less
        what `decompress` makes of the frames; float32.

    Raises:
        ClientError: a change is not finite.
        CodecError: a change that `uplink.dtype` cannot carry.

    >>> received = SparseState({"w": np.float32([1, 2, 3, 4])})
    >>> trained = SparseState({"w": np.float32([1.5, 2, 3, 2])})
    >>> frames, left = compress(trained, received, Uplink(topk=0.25))
    >>> decompress(frames, received, Uplink(topk=0.25)).values["w"], left.values["w"]
    (array([1., 2., 3., 2.], dtype=float32), array([0.5, 0. , 0. , 0. ], dtype=float32))
    """
    changes: dict[str, Array] = {}
    with np.errstate(over="ignore", invalid="ignore"):
        for name, start in weights(received).values.items():
            changes[name] = trained.values[name] - start
            if residual is not None:
                changes[name] += residual.values[name]
            if not np.isfinite(changes[name]).all():
                raise ClientError(f"{name!r} changed by NaN or infinite values: {DIVERGED}")
    total = SparseState(changes, received.patterns)
    frames = _encode(total, uplink)
    sent = _decode(frames, total, uplink)
    left = {name: change - sent[name] for name, change in changes.items()}
    if statistics := _statistics(trained):
        frames[STATISTICS] = encode_state(SparseState(statistics), dtype=STATISTICS_DTYPE)
    return frames, SparseState(left, received.patterns)


def decompress(frames: Mapping[str, bytes], sent: SparseState, uplink: Uplink) -> SparseState:
    """The trained model, as far as it was told.

    Args:
        frames: of `compress`.
        sent: what the client was sent, as it decoded it.

    Raises:
        ClientError: other frames than these, or more or fewer changes than `uplink` says.
        CodecError: a frame is damaged, or made for another mask or network.
    """
    statistics = _statistics(sent)
    expected = {VALUES}
    expected |= {CHOSEN} if uplink.topk < 1 else set()
    expected |= {STATISTICS} if statistics else set()
    if set(frames) != expected:
        raise ClientError(f"parts of an update: expected {sorted(expected)}, got {sorted(frames)}")
    old = weights(sent)
    changes = _decode(frames, old, uplink)
    with np.errstate(over="ignore", invalid="ignore"):  # the gate refuses what is not finite
        told = {name: start + changes[name] for name, start in old.values.items()}
    if statistics:
        shapes = {name: value.shape for name, value in statistics.items()}
        told |= decode_state(frames[STATISTICS], shapes=shapes, patterns=None).values
    return SparseState(told, sent.patterns).ordered(sent.values)


def weights(state: SparseState) -> SparseState:
    """A state without its batch-norm statistics."""
    statistics = _statistics(state)
    kept = {name: value for name, value in state.values.items() if name not in statistics}
    return SparseState(kept, state.patterns)


def _statistics(state: SparseState) -> Tensors:
    names = ("running_mean", "running_var")
    return {name: value for name, value in state.values.items() if name.endswith(names)}


def _encode(changes: SparseState, uplink: Uplink) -> dict[str, bytes]:
    if uplink.topk == 1:
        return {VALUES: encode_state(changes, dtype=uplink.dtype)}
    flat = np.concatenate([value.reshape(-1) for value in changes.values.values()])
    name, kept = _line(changes), largest(np.abs(flat), _count(len(flat), uplink))
    whole = Patterns({name: Pattern.full(flat.shape)})
    chosen = Patterns({name: whole[name].subset(kept)})
    return {
        CHOSEN: encode_mask_delta(whole, chosen),
        VALUES: encode_state(SparseState({name: flat[kept]}, chosen), dtype=uplink.dtype),
    }


def _decode(frames: Mapping[str, bytes], like: SparseState, uplink: Uplink) -> Tensors:
    """The changes of tensors like these, zero where none was sent."""
    if uplink.topk == 1:
        frame = frames[VALUES]
        return decode_state(frame, shapes=like.shapes(), patterns=like.patterns).values
    name, sizes = _line(like), [value.size for value in like.values.values()]
    shape = (sum(sizes),)
    chosen = decode_mask_delta(frames[CHOSEN], base=Patterns({name: Pattern.full(shape)}))
    if chosen.num_active != (count := _count(shape[0], uplink)):
        raise ClientError(f"changes of {chosen.num_active} weights: expected {count}")
    values = decode_state(frames[VALUES], shapes={name: shape}, patterns=chosen)
    parts = np.split(values.dense_layer(name), np.cumsum(sizes)[:-1])
    items = zip(like.values.items(), parts, strict=True)
    return {key: part.reshape(value.shape) for (key, value), part in items}


def _count(size: int, uplink: Uplink) -> int:
    """How many of so many changes travel."""
    return math.ceil(uplink.topk * size)


def _line(state: SparseState) -> str:
    """The name under which all values lie in a line, one for each mask and network.

    It does not travel; the digests in frames cover it, so one of another mask is refused.
    """
    mask = "" if state.patterns is None else state.patterns.digest()
    return hashlib.sha256(f"{mask}{list(state.shapes().items())}".encode()).hexdigest()
