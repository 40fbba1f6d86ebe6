"""What server and clients say to each other, as plain dataclasses.

`wire.py` turns them into Flower records and back; everything else only sees these.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from sparsemodel.masks.mask import Mask

State = dict[str, torch.Tensor]
Entries = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class ClientInfo:
    """A client's answer to "describe": who it is and what it holds."""

    client: int
    num_train: int
    num_dev: int
    label_histogram: list[int]


@dataclass(frozen=True)
class TrainRequest:
    """One round's work: the global model, and how many growth candidates to send back.

    `weights` is the whole float state with zeros at pruned places; `growth` names a count for
    each layer of the block whose mask is adjusted after this round (empty: none).
    """

    round_index: int
    weights: State
    mask: Mask | None
    growth: dict[str, int] = field(default_factory=dict)
    report_resources: bool = False


@dataclass(frozen=True)
class TrainReply:
    """A client's trained model in sparse space.

    `values` holds, for masked layers, only the active values [nnz]; other tensors whole.
    `growth` holds the largest gradients at pruned coordinates of the layers asked for.
    """

    num_examples: int
    loss: float
    values: State
    growth: Entries
    state_bytes: int = 0
    peak_rss_bytes: int = 0


@dataclass(frozen=True)
class Pool:
    """Dense weights and the candidate masks that may be laid over them."""

    weights: State
    masks: list[Mask]


@dataclass(frozen=True)
class MeasureRequest:
    """Candidate selection, first step: measure batch-norm statistics of every candidate."""

    pool: Pool


@dataclass(frozen=True)
class MeasureReply:
    """Batch-norm statistics of every candidate on the client's development split."""

    num_examples: int
    statistics: list[State]


@dataclass(frozen=True)
class ScoreRequest:
    """Candidate selection, second step: the statistics each candidate is evaluated with."""

    pool: Pool
    statistics: list[State]


@dataclass(frozen=True)
class ScoreReply:
    """Sums over the client's development split, one entry a candidate."""

    num_examples: int
    loss_sums: list[float]
    num_correct: list[int]


Request = TrainRequest | MeasureRequest | ScoreRequest
Reply = ClientInfo | TrainReply | MeasureReply | ScoreReply
