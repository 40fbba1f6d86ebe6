"""Scores of training dynamics: pure functions of what a `Recorder` saw of one run.

Each returns float64 [num_samples], NaN for samples that the run never trained on. A last epoch
that was cut short (training to a number of steps) is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from datapruning.errors import ScoreError
from datapruning.scores.recorder import Recorder

__all__ = ["Recorder", "aum", "confidence", "dual", "dyn_unc", "forgetting", "tdds"]

MARGINS = ("logit", "probability")


def forgetting(recorder: Recorder) -> Tensor:
    """How often a sample went from right to wrong between epochs that follow each other.

    High is hard. A sample that was never right counts as the most forgotten: the number of
    epochs, which no count of events reaches.
    Source: Toneva et al., An Empirical Study of Example Forgetting (ICLR 2019), section 2.
    Departs from: the paper, whose never learned samples have infinite counts; a finite one can
    be scaled and averaged over runs.

    Example: right in epochs 0, 2, 3 of 0 ... 4 (1 0 1 1 0) gives 2; never right (0 0 0 0 0)
    gives 5; wrong at first, then right (0 1 1 1 1) gives 0.
    """
    correct, rows = _trace(recorder, "correct")
    events = (correct[:-1] & ~correct[1:]).sum(0)
    events[~correct.any(0)] = len(correct)
    return _placed(recorder, rows, events)


def aum(recorder: Recorder, *, margin: str = "logit") -> Tensor:
    """Minus the area under the margin: −mean over epochs of z_y − max_{j≠y} z_j.

    The paper's AUM is low for hard and mislabelled samples; the sign is turned, so that high
    is hard, as in `scores.error.margin`.
    Source: Pleiss et al., Identifying Mislabeled Data using the Area Under the Margin Ranking
    (NeurIPS 2020), section 3.

    Args:
        margin: "logit", as in the paper, or "probability": p_y − max_{j≠y} p_j, which many
            data-pruning papers take.

    Raises:
        ScoreError: another margin.
    """
    if margin not in MARGINS:
        raise ScoreError(f"margin: expected {' or '.join(MARGINS)}, got {margin!r}")
    margins, rows = _trace(recorder, f"margin_{margin}")
    return _placed(recorder, rows, -margins.double().mean(0))


def dyn_unc(recorder: Recorder, *, window: int = 10, epochs: int | None = None) -> Tensor:
    """Mean over all windows of J epochs of the standard deviation of p_y.

    High is uncertain. The deviation is the sample's, with J − 1 in the denominator; T epochs
    have T − J + 1 windows, each an epoch after the one before.
    Source: He et al., Large-scale Dataset Pruning with Dynamic Uncertainty (CVPR workshops
    2024), section 3.

    Args:
        window: J, at least 2.
        epochs: take the first so many; None: all.

    Raises:
        ScoreError: fewer epochs than asked for or than a window has.

    Example: J = 2 and p_y = .1, .3, .3 gives (.2/√2 + 0) / 2 = .0707.
    """
    return _mean_over_windows(recorder, window=window, epochs=epochs, weighted=False)


def dual(recorder: Recorder, *, window: int = 10, epochs: int | None = 30) -> Tensor:
    """Mean over windows of J epochs of (1 − mean p_y) · std p_y, over the first T epochs.

    High is hard and uncertain. Mean and standard deviation (J − 1 in the denominator) are both
    of the window.
    Source: Cho et al., Lightweight Dataset Pruning without Full Training via Example Difficulty
    and Prediction Uncertainty (ICML 2025), section 3; J = 10 and T = 30 on CIFAR.

    Args:
        window: J, at least 2.
        epochs: T; None: all that were recorded.

    Raises:
        ScoreError: fewer epochs than asked for or than a window has.

    Example: J = 2 and p_y = .1, .3, .3 gives (.8 · .2/√2 + .7 · 0) / 2 = .0566.
    """
    return _mean_over_windows(recorder, window=window, epochs=epochs, weighted=True)


def confidence(recorder: Recorder, *, epochs: int | None = None) -> Tensor:
    """Mean probability of the label over the first epochs, in [0, 1]: no score, but what goes
    with that of DUAL when samples are drawn (`selection.policies.dual_beta`).

    Source: Cho et al., as `dual`, Beta sampling.

    Args:
        epochs: take the first so many; None: all.

    Raises:
        ScoreError: fewer epochs than asked for.

    Example: p_y = .1, .3, .3, .9 and 3 epochs give .2333.
    """
    table, rows = _trace(recorder, "probability", num_epochs=epochs)
    return _placed(recorder, rows, table.double().mean(0).clamp(0, 1))


def tdds(
    recorder: Recorder, *, window: int = 10, decay: float = 0.9, epochs: int | None = None
) -> Tensor:
    """How unsteadily a sample's prediction changes, later windows counting more.

    With d_t = Σ_c |p_{t+1,c} (log p_{t+1,c} − log p_{t,c})|, a window of J epochs holds J − 1
    changes, and R_k is the norm of their deviations from the window's mean. The score is
    Σ_k β (1 − β)^(T−J−k) R_k over the windows k = 0 ... T − J.
    Source: Zhang et al., Spanning Training Progress: Temporal Dual-Depth Scoring (CVPR 2024),
    section 3, with the windows and the weights of the authors' program.

    Args:
        window: J, at least 3: of a single change nothing deviates.
        decay: β in (0, 1].
        epochs: T, take the first so many; None: all.

    Raises:
        ScoreError: fewer epochs than asked for or than a window has, β out of range, or a
            recorder without changes.

    Example: J = 3, β = .9 and changes 1, 3, 3 (T = 4) give R = (√2, 0), and so
    .9 · .1 · √2 = .1273.
    """
    if not 0 < decay <= 1:
        raise ScoreError(f"decay must be in (0, 1], got {decay}")
    changes, rows = _trace(recorder, "change", num_epochs=epochs)
    num_windows = _num_windows(len(changes), window, smallest=3)
    total = torch.zeros(len(rows), dtype=torch.float64)
    for k in range(num_windows):
        # Row t of the table is the change from epoch t − 1 to t: row k belongs to no pair here.
        inside = changes[k + 1 : k + window].double()
        deviation = (inside - inside.mean(0)).norm(dim=0)
        total += decay * (1 - decay) ** (num_windows - 1 - k) * deviation
    return _placed(recorder, rows, total)


def _mean_over_windows(
    recorder: Recorder, *, window: int, epochs: int | None, weighted: bool
) -> Tensor:
    table, rows = _trace(recorder, "probability", num_epochs=epochs)
    num_windows = _num_windows(len(table), window, smallest=2)
    total = torch.zeros(len(rows), dtype=torch.float64)
    # One window at a time: all at once would take J times the table.
    for k in range(num_windows):
        inside = table[k : k + window].double()
        spread = inside.std(0, correction=1)
        total += spread * (1 - inside.mean(0)) if weighted else spread
    return _placed(recorder, rows, total / num_windows)


def _num_windows(num_epochs: int, window: int, *, smallest: int) -> int:
    if window < smallest:
        raise ScoreError(f"window must be at least {smallest} epochs, got {window}")
    if num_epochs < window:
        raise ScoreError(
            f"a window of {window} epochs needs as many, and {num_epochs} were recorded in full; "
            "train for longer, or take a smaller window"
        )
    return num_epochs - window + 1


def _trace(
    recorder: Recorder, name: str, *, first: int = 0, num_epochs: int | None = None
) -> tuple[Tensor, Tensor]:
    """A quantity of the samples that were trained on, [epochs, K], and their rows, int64 [K]."""
    seen = recorder.seen()
    trained = seen[0]
    whole = (seen == trained).all(1)
    if bool((seen[-1] & ~trained).any()) or not bool(whole[:-1].all()):
        raise ScoreError(
            "the epochs have different samples; dynamics need a run that trains on the same ones "
            "in each (no subset drawn anew by epoch, no drop_last)"
        )
    num_whole = int(whole.sum())
    end = num_whole if num_epochs is None else first + num_epochs
    if not 0 <= first < end <= num_whole:
        raise ScoreError(
            f"epochs {first} to {end - 1} are wanted, and {num_whole} were recorded in full; train "
            "for longer, or ask for fewer epochs"
        )
    return recorder.table(name)[first:end][:, trained], trained.nonzero()[:, 0]


def _placed(recorder: Recorder, rows: Tensor, values: Tensor) -> Tensor:
    scores = torch.full((recorder.num_samples,), torch.nan, dtype=torch.float64)
    scores[rows] = values.double()
    return scores
