"""The surrogate's influence: solvers against each other, and the trick that serves all samples."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr

from datapruning.errors import ScoreError
from datapruning.recommend.histories import HistorySamples
from datapruning.recommend.influence import surrogate_influence
from datapruning.recommend.sasrec import NextItem, SASRec
from datapruning.recommend.surrogate import SurrogateConfig, train_surrogate

from .made import made_histories


@pytest.fixture(scope="module")
def tiny() -> tuple[SASRec, HistorySamples]:
    histories = made_histories()
    config = SurrogateConfig(
        epochs=10, patience=10, batch_size=16, lr=1e-2, hidden=8, max_length=12, dropout=0.1
    )
    return train_surrogate(histories, config=config, seed=0)[0], HistorySamples(histories)


def test_solvers_agree(tiny: tuple[SASRec, HistorySamples]) -> None:
    model, samples = tiny
    exact = surrogate_influence(model, samples, solver="exact")
    assert exact.dtype == torch.float64
    assert exact.shape == (len(samples),)
    for solver in ("cg", "lissa"):
        found = surrogate_influence(model, samples, solver=solver, depth=600)  # type: ignore[arg-type]
        assert spearmanr(exact, found).statistic >= 0.95, solver
        scale = float(found.dot(exact) / exact.dot(exact))
        assert scale == pytest.approx(1.0, abs=0.1), solver


def test_one_solution_serves_all_samples(tiny: tuple[SASRec, HistorySamples]) -> None:
    """⟨∇ℓ_i, H⁻¹v⟩ sample by sample, with H written out by torch.func in float64."""
    model, samples = tiny
    found = surrogate_influence(model, samples, solver="cg")
    names, task = model.output_projection, NextItem()
    model = SASRec(model.num_items, hidden=8, max_length=12).double().eval()
    model.load_state_dict(tiny[0].state_dict())
    parameters = dict(model.named_parameters())
    sizes = [parameters[name].numel() for name in names]
    start = torch.cat([parameters[name].detach().flatten() for name in names])

    def losses(theta: torch.Tensor) -> torch.Tensor:
        parts = {
            name: part.view_as(parameters[name])
            for name, part in zip(names, theta.split(sizes), strict=True)
        }
        swapped = _Swapped(model, parts)
        return swapped.losses(samples.batch(torch.arange(len(samples))), task)

    hessian = torch.func.hessian(lambda theta: losses(theta).mean())(start)
    jacobian = torch.func.jacrev(losses)(start)
    solved = torch.linalg.solve(hessian + 0.25 * torch.eye(len(start)), jacobian.mean(0))
    torch.testing.assert_close(found, jacobian @ solved, rtol=2e-3, atol=1e-6)


class _Swapped:
    def __init__(self, model: SASRec, parts: dict[str, torch.Tensor]) -> None:
        self.model, self.parts = model, parts

    def losses(self, batch: tuple[torch.Tensor, torch.Tensor], task: NextItem) -> torch.Tensor:
        history, targets = batch
        ends = (history != 0).sum(1) - 1
        hidden = torch.func.functional_call(self.model, self.parts, (history,))
        scores = self.model.scores(hidden[torch.arange(len(history)), ends])
        return torch.nn.functional.cross_entropy(scores, targets - 1, reduction="none")


def test_the_item_table_is_refused_by_name(tiny: tuple[SASRec, HistorySamples]) -> None:
    model, samples = tiny
    with pytest.raises(ScoreError, match=r"items\.weight"):
        surrogate_influence(model, samples, solver="cg", damping=50, parameters=["items.weight"])


def test_other_parameters_and_progress(tiny: tuple[SASRec, HistorySamples]) -> None:
    model, samples = tiny
    seen: list[int] = []
    parameters = ["blocks.0.inner.weight", "blocks.1.norm.bias"]
    found = surrogate_influence(
        model, samples, solver="cg", damping=1.0, parameters=parameters, progress=seen.append
    )
    assert found.isfinite().all()
    assert seen[-1] == len(samples)
