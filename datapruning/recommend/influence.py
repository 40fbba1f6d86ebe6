"""DEALRec's first score: how much a sample helps the training loss, seen through the surrogate.

Source: Lin et al., Data-efficient Fine-tuning for LLM-based Recommendation (SIGIR 2024),
section 3.1: influence on the mean training loss of taking a sample out, for the parameters of
one small layer, with the inverse Hessian applied once for all samples.
Departs from it: 1,000 steps of LiSSA in place of 5,000, see DEPTH.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from datapruning.recommend.histories import HistorySamples
from datapruning.recommend.sasrec import NextItem, SASRec, batches_by_length
from datapruning.scores.influence import Solver, influence_of, inverse_hvp, mean_gradient

DAMPING = 0.25
"""λ of H + λI. The paper's LiSSA has damp .01 and scale 25, which is λ = .01 · 25."""

SCALE = 25.0

DEPTH = 1000
"""Each step shrinks the distance to the fixed point by 1 − λ / scale = .99 or more: what is left
after 1,000 steps is below 10⁻⁴, and more of them do not make the chain less noisy. More samples
a step, or more chains, do."""

CHUNK = 128


def surrogate_influence(
    model: SASRec,
    samples: HistorySamples,
    *,
    solver: Solver = "lissa",
    parameters: Sequence[str] | None = None,
    damping: float = DAMPING,
    depth: int = DEPTH,
    drawn: int = 4,
    repeats: int = 1,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """⟨(H + λI)⁻¹ v, ∇ℓ_i⟩ of every sample, v and H of the mean loss over the samples.

    High means that taking the sample out would raise the training loss: keep. The loss of a
    sample is that of its target alone, over all items, since it is what the language model will
    be given; the surrogate was trained at every position of a history.

    Args:
        model: trained, in eval mode.
        solver: "lissa" as in the paper (scale 25), "cg" or "exact" to check it.
        parameters: names; None: the last block's attention output projection. The item table
            serves as input and output at once and cannot be among them.
        damping: λ, whatever the solver.
        depth, drawn, repeats: of LiSSA: steps, samples of a step, and chains that are averaged.
        seed: of the samples that LiSSA draws.
        progress: called with the number of samples scored so far.

    Returns:
        float64 [N] on the CPU.

    Raises:
        ScoreError: as `scores.influence.inverse_hvp`.
    """
    task, names = NextItem(), model.output_projection if parameters is None else parameters
    ordered = _InOrder(samples)
    v = mean_gradient(task, model, ordered, parameters=names, chunk=CHUNK)
    q = inverse_hvp(
        task,
        model,
        samples if solver == "lissa" else ordered,
        v,
        solver=solver,
        damping=damping,
        seed=seed,
        chunk=min(drawn, len(samples)) if solver == "lissa" else CHUNK,
        depth=depth,
        scale=SCALE,
        repeats=repeats,
    )
    scores = torch.empty(len(samples), dtype=torch.float64)
    done = 0
    for rows in batches_by_length(samples.history.lengths, batch_size=CHUNK):
        scores[rows] = influence_of(task, model, samples.batch(rows), q)
        done += len(rows)
        if progress is not None:
            progress(done)
    return scores


class _InOrder:
    """Samples by the length of their history: consecutive ones make batches without padding."""

    def __init__(self, samples: HistorySamples) -> None:
        self._samples = samples
        self._order = torch.argsort(samples.history.lengths, stable=True)
        self.ids, self.labels, self.fingerprint = samples.ids[self._order], None, ""

    def __len__(self) -> int:
        return len(self._samples)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._samples.batch(self._order[rows])
