"""One call from a model to a mask: a criterion scores the weights, a distribution counts them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from sparsemodel.calibration.collect import calibrate
from sparsemodel.calibration.statistics import Calibration
from sparsemodel.errors import DensityError, MaskError
from sparsemodel.masks.criteria import Criterion
from sparsemodel.masks.distribution import DISTRIBUTIONS, Distribution, n_of_m
from sparsemodel.masks.mask import Mask, mask_from_scores, prunable_parameters
from sparsemodel.masks.probe import named_weights
from sparsemodel.masks.registry import OF_DATA, WeightCriterion, criterion_of, needs_of
from sparsemodel.masks.structure import n_of_m_mask, row_mask

BatchLoss = Callable[[nn.Module, Any], torch.Tensor]
"""(model, batch) -> scalar loss."""


def cross_entropy(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The mean cross-entropy of a batch (inputs, labels)."""
    inputs, labels = batch
    return functional.cross_entropy(model(inputs), labels)


def prune(
    model: nn.Module,
    density: float,
    *,
    criterion: str | Criterion | WeightCriterion = "magnitude",
    distribution: str | Distribution = "uniform",
    data: Any = None,
    loss: BatchLoss = cross_entropy,
    names: Iterable[str] | None = None,
    within: str = "layer",
    calibration: Calibration | None = None,
    seed: int = 0,
) -> Mask:
    """The mask that keeps the most important weights of a model, which stays as it is.

    A criterion may be meant for many small steps, as synflow is: density^(k/n) is reached in step
    k of n, and the remaining weights are scored again for the next.

    `mask.apply(model)` sets the pruned weights to zero; `sparsify(model, mask)` makes a model that
    stores no others.

    A criterion or a distribution is called with what its parameters are named after. Those of a
    criterion: `model`, `names`, `loss` (model -> scalar), `input_shape` (of one sample),
    `calibration` and `generator`; it returns name -> score, high for keep. Those of a
    distribution: `shapes` (name -> shape), `scores`, `density` and `generator`; it returns name ->
    how many weights stay.

    Args:
        density: active weights over all prunable ones, in (0, 1].
        criterion: a name in `registry.CRITERIA`, of which those with statistics are of linear
            layers alone; a function, or an entry such as are there.
        distribution: a name in DISTRIBUTIONS, or a function. Criteria with a loss are meant for
            "global": one threshold for all layers.
        data: for criteria that look at data: one batch (inputs, labels), or an iterable of
            batches, whose scores are averaged. Tensors are moved to the model's device; the model
            runs in the mode, train or eval, that it is in.
        loss: of the model on a batch, where it is not the cross-entropy of (inputs, labels).
            Gradients among statistics are of the usual losses of `calibrate`.
        names: parameters to prune; None: `prunable_parameters`, all but the first layer's.
        within: where weights are ranked against each other: in the "layer"; in each "row", that is
            output, which all keep as many; or in groups, such as "2:4", which keep two of every
            four neighbours along a row and give the density by themselves.
        calibration: the criterion's statistics; None: they are collected from `data`, as
            `calibrate` does it.
        seed: of random criteria and distributions.

    Raises:
        MaskError: unknown names, or no data for a criterion that needs some.
        CalibrationError: statistics that are missing, or that the data do not allow.
        DensityError: a density outside (0, 1], or too low for one weight in every layer.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> prune(model, density=0.25).counts()
    {'2.weight': 4}
    >>> batch = torch.randn(16, 4), torch.randint(0, 2, (16,))
    >>> prune(model, 0.25, criterion="snip", distribution="global", data=batch).num_active
    4
    """
    chosen = list(prunable_parameters(model) if names is None else names)
    generator = torch.Generator().manual_seed(seed)
    entry = criterion_of(criterion)
    score, steps = entry.score, entry.steps
    count = _distribution(distribution)
    # Later steps score the model under the mask of the one before.
    probed, mask = model if steps == 1 else copy.deepcopy(model), None
    if calibration is None and (wanted := needs_of(entry, chosen)):
        if data is None:
            raise MaskError(_no_data(score))
        calibration = calibrate(model, _batches(data), wanted)
    for step in range(1, steps + 1):
        scores = _scores(
            score, probed, chosen,
            data=data, loss=loss, calibration=calibration, generator=generator,
        )  # fmt: skip
        if mask is not None:  # what is pruned stays so
            scores = {
                n: s.masked_fill(~mask[n].to(s.device), -torch.inf) for n, s in scores.items()
            }
        share = density ** (step / steps)
        mask = _selected(scores, count, density=share, within=within, seed=seed)
        if step < steps:
            mask.apply(probed)
    assert mask is not None, "there is a step at least"
    return mask


def _selected(
    scores: dict[str, torch.Tensor],
    count: Distribution,
    *,
    density: float,
    within: str,
    seed: int,
) -> Mask:
    """The best weights, as many in each layer as the distribution, or a pattern, says."""
    if groups := n_of_m(within):
        n, m = groups
        if density not in {1.0, n / m}:
            raise DensityError(f"{within!r} keeps {n / m:g} of all weights, not {density:g}")
        return n_of_m_mask(scores, n=n, m=m)
    if within not in {"layer", "row"}:
        raise MaskError(f"within: expected 'layer', 'row' or such as '2:4', got {within!r}")
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    noise = np.random.default_rng(seed)
    offered = {"shapes": shapes, "scores": scores, "density": density, "generator": noise}
    select = row_mask if within == "row" else mask_from_scores
    return select(scores, count(**_asked(count, offered)))


def _scores(
    criterion: Criterion,
    model: nn.Module,
    names: list[str],
    *,
    data: Any,
    loss: BatchLoss,
    calibration: Calibration | None,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """Scores by the criterion, checked; of several batches their mean."""
    weights = named_weights(model, names)
    device = next(iter(weights.values())).device
    offered: dict[str, Any] = {"model": model, "names": names, "generator": generator}
    offered |= {} if calibration is None else {"calibration": calibration}
    of_data = set(OF_DATA) & inspect.signature(criterion).parameters.keys()
    if not of_data:
        found = criterion(**_asked(criterion, offered))
        return _checked(criterion, found, weights)
    if data is None:
        raise MaskError(_no_data(criterion))
    total: dict[str, torch.Tensor] = {}
    num_batches = 0
    for batch in _batches(data):
        moved = _moved(batch, device)
        offered |= {"loss": lambda probed, moved=moved: loss(probed, moved)}
        if "input_shape" in of_data:
            offered["input_shape"] = _input_shape(moved)
        found = _checked(criterion, criterion(**_asked(criterion, offered)), weights)
        total = {name: total[name] + found[name] if total else found[name] for name in names}
        num_batches += 1
        if of_data == {"input_shape"}:
            break  # all batches have samples of one shape
    if not num_batches:
        raise MaskError("data holds no batch: is it an iterator that was read before?")
    return {name: score / num_batches for name, score in total.items()}


def _distribution(given: str | Distribution) -> Distribution:
    if callable(given):
        return given
    if given not in DISTRIBUTIONS:
        known = ", ".join(DISTRIBUTIONS)
        raise MaskError(f"unknown distribution {given!r}; known: {known}; or give a function")
    return DISTRIBUTIONS[given]


def _asked(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Of what is offered, what the function has a parameter for."""
    parameters = inspect.signature(function).parameters.values()
    missing = [
        p.name
        for p in parameters
        if p.name not in offered
        and p.default is p.empty
        and p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}
    ]
    if missing:
        raise MaskError(
            f"{_name(function)!r} has parameters {missing}; a value is there for {list(offered)}"
        )
    return {p.name: offered[p.name] for p in parameters if p.name in offered}


def _checked(
    criterion: Criterion, scores: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    for name, weight in weights.items():
        if name not in scores or scores[name].shape != weight.shape:
            found = tuple(scores[name].shape) if name in scores else "nothing"
            raise MaskError(
                f"the criterion {_name(criterion)!r} gave {found} for {name!r}; expected scores "
                f"of shape {tuple(weight.shape)}"
            )
    return {name: scores[name] for name in weights}


def _no_data(criterion: Criterion) -> str:
    return (
        f"the criterion {_name(criterion)!r} looks at data; give data=(inputs, labels), or an "
        "iterable of such batches"
    )


def _batches(data: Any) -> Iterable[Any]:
    """The batches of (inputs, labels), of a dict of tensors, or of an iterable of those."""
    if isinstance(data, Mapping) or (
        isinstance(data, tuple | list)
        and len(data) == 2
        and all(hasattr(part, "shape") for part in data)
    ):
        return [data]
    if not isinstance(data, Iterable):
        raise MaskError(
            f"data: expected (inputs, labels) or an iterable of batches, got {type(data).__name__}"
        )
    return data


def _moved(batch: Any, device: torch.device) -> Any:
    """A batch's tensors on a device; arrays become tensors."""
    if isinstance(batch, Mapping):
        return {name: _moved(part, device) for name, part in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_moved(part, device) for part in batch)
    if not hasattr(batch, "shape"):
        raise MaskError(
            f"a batch holds a {type(batch).__name__}, expected tensors (inputs [B, ...], labels "
            "[B]); give the samples of a data set through torch.utils.data.DataLoader"
        )
    return torch.as_tensor(batch).to(device)


def _input_shape(batch: Any) -> tuple[int, ...]:
    inputs = batch[0] if isinstance(batch, tuple) else next(iter(batch.values()))
    return tuple(inputs.shape[1:])


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
