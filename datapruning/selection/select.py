"""From a table of scores to the samples that are kept."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from datapruning.errors import SelectionError
from datapruning.selection.policies import (
    POLICIES,
    Policy,
    Scored,
    drawn_among_equals,
    easiest,
    hardest,
    random,
)
from datapruning.selection.table import ScoreTable, Subset
from prunelab.errors import close_names
from prunelab.runs.seeds import generator

AUTO = "auto"
PLENTIFUL = 1000
"""Samples of a class, once pruned, from which "auto" holds data to be plentiful.

A rule of thumb: what is plenty depends on data and network. That the number *kept* decides, and
hardly the fraction, is so for the perceptron with a perfect probe (`perceptron`): hard beats
random from 1 to 2 kept inputs a dimension on, for every fraction from 0.1 to 0.7.
"""

__all__ = ["AUTO", "PLENTIFUL", "POLICIES", "fresh_random", "select"]


def select(
    table: ScoreTable,
    *,
    keep: float | int,
    policy: str | Policy = "hardest",
    seed: int = 0,
    class_balanced: bool = False,
    class_floor: float = 0.5,
    groups: Tensor | None = None,
    confidence: Tensor | None = None,
    **options: Any,
) -> Subset:
    """Choose exactly so many samples of a table by a policy.

    The result depends on ids, scores, labels and the seed, not on the order of the rows.

    Args:
        keep: a share in (0, 1] as a float (rounded to the nearest count, halves up), or a
            number of samples as an int.
        policy: a name in POLICIES; "auto", which takes the hardest samples where at least
            `plentiful` (an option, default PLENTIFUL) a class are kept, else the easiest; or a
            function like those in POLICIES.
        seed: decides equal scores and every random choice.
        class_balanced: every class keeps at least ⌊class_floor · its fair share⌋ samples, the
            fair share being the same fraction of every class. Classes that would fall short
            choose their floor among themselves; the others share the rest.
        class_floor: in [0, 1]; half the fair share is the rule of Sorscher et al.
        groups: int64 [N], such as clients: every group keeps the same fraction (to within one
            sample) and chooses among its own.
        confidence: float [N] in the order of the table, for dual-beta; None: the table's own.
        options: of the policy, such as cut=0.2.

    Returns:
        A subset whose provenance has `options`; `drawn`, how many of the kept samples were drawn
        among equal scores at the edge of what is kept (policies that rank); and `notes`:
        sentences on what "auto" took, on what was drawn, and on classes or groups without a kept
        sample.

    Raises:
        SelectionError: a count that cannot be met, scores that are not finite or all equal (for
            a policy that uses them), labels that are missing, or unknown policies and options.
    """
    policy_name = policy if isinstance(policy, str) else _name(policy)
    count = _count(keep, len(table))
    order = torch.argsort(table.ids)
    labels = None if table.labels is None else table.labels[order]
    if class_balanced and labels is None:
        raise SelectionError("class_balanced needs labels; this table has none")
    if not 0 <= class_floor <= 1:
        raise SelectionError(f"class_floor must be in [0, 1], got {class_floor}")
    function, notes = _resolved(policy, options, count=count, labels=labels)
    if function is not random:
        _check_scores(table, count)
    confidence = table.confidence if confidence is None else confidence
    confidence = _column("confidence", confidence, order)
    scored = Scored(
        table.scores[order].double().cpu(), None if confidence is None else confidence.double()
    )
    plan = _Plan(
        _with_options(policy_name, function, options), class_floor if class_balanced else None
    )
    groups = _column("groups", groups, order)
    kept, drawn = _in_groups(plan, scored, labels, count, groups=groups, seed=seed)
    if drawn:
        notes.append(
            f"{drawn} of the {count} kept samples were drawn by chance: others that are not kept "
            "have the same scores"
        )
    if groups is not None:
        notes += _absent("group", groups, kept)
    if labels is not None:
        notes += _absent("class", labels, kept)
    settings = {"class_floor": class_floor} if class_balanced else {}
    settings |= {name: value for name, value in options.items() if not isinstance(value, Tensor)}
    kept = kept.sort().values  # ids ascend with the place
    return Subset(
        ids=table.ids[order][kept],
        num_samples=len(table),
        dataset=table.dataset,
        fingerprint=table.fingerprint,
        policy=policy_name,
        seed=seed,
        method="" if function is random else table.method,
        provenance={
            "keep": keep if isinstance(keep, float) else count,
            "options": settings,
            "drawn": drawn,
            "notes": notes,
        },
        labels=None if labels is None else labels[kept],
        num_classes=None if labels is None else int(labels.max()) + 1,
    )


def parsed_keep(text: str) -> float | int:
    """What `select` is to keep, as people write it: a share has a dot or a %, a number has none.

    Raises:
        SelectionError: neither.

    >>> parsed_keep("0.5"), parsed_keep("50%"), parsed_keep("1"), parsed_keep("1.0")
    (0.5, 0.5, 1, 1.0)
    """
    text = text.strip()
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return float(text) if "." in text else int(text)
    except ValueError:
        raise SelectionError(
            f"keep = {text!r}: expected a share with a dot or a % (0.5 or 50%), or a whole number "
            "of samples (700)"
        ) from None


def fresh_random(num_samples: int, *, keep: float | int, seed: int) -> Callable[[int], Tensor]:
    """Rows of a new random subset for each epoch: a control that scores have to beat.

    No sample comes back before as many whole subsets as there are have passed (⌊N / K⌋ epochs);
    then a new shuffle begins. Rows of an epoch follow from (seed, epoch) alone.

    Source: Okanovic et al., Repeated Random Sampling for Minimizing the Time-to-Accuracy of
    Learning (ICLR 2024), RS2 without replacement.

    Returns:
        epoch (from 0) -> int64 [K], ascending; what `train(rows=...)` takes.

    Raises:
        SelectionError: a count that cannot be met.

    >>> rows = fresh_random(4, keep=0.5, seed=0)
    >>> sorted(rows(0).tolist() + rows(1).tolist())
    [0, 1, 2, 3]
    """
    count = _count(keep, num_samples)
    return _FreshRandom(num_samples, count, seed)


class _FreshRandom:
    """A class, not a closure, so that runs on other processes can be sent one."""

    def __init__(self, num_samples: int, count: int, seed: int) -> None:
        self.num_samples, self.count, self.seed = num_samples, count, seed

    def __call__(self, epoch: int) -> Tensor:
        shuffle, place = divmod(epoch, self.num_samples // self.count)
        order = torch.randperm(self.num_samples, generator=generator(self.seed, shuffle))
        return order[place * self.count : (place + 1) * self.count].sort().values


def _count(keep: float | int, num_samples: int) -> int:
    """The number of samples to keep."""
    if isinstance(keep, bool) or not isinstance(keep, Integral | float):
        raise SelectionError(f"keep must be a share or a number of samples, got {keep!r}")
    if isinstance(keep, float):
        if not 0 < keep <= 1:
            raise SelectionError(
                f"keep = {keep} is no share in (0, 1]; a number of samples is whole, without a dot "
                "(in Python an int)"
            )
        count = math.floor(keep * num_samples + 0.5)
        if count == 0:
            raise SelectionError(f"keep = {keep} of {num_samples} samples is less than one sample")
        return count
    if not 1 <= keep <= num_samples:
        raise SelectionError(f"keep = {keep}: expected 1 to {num_samples}, the samples there are")
    return int(keep)


def _check_scores(table: ScoreTable, count: int) -> None:
    wrong = ~torch.isfinite(table.scores)
    if wrong.any():
        names = ", ".join(map(str, table.ids[wrong].sort().values[:5].tolist()))
        raise SelectionError(
            f"{int(wrong.sum())} of {len(table)} scores are NaN or infinite, the first of ids "
            f"{names}; score these samples again or leave them out of the table"
        )
    low, high = float(table.scores.min()), float(table.scores.max())
    if not math.isfinite(high - low):
        raise SelectionError(
            f"scores run from {low:g} to {high:g}, and float64 has no such difference; divide "
            "them by a number first"
        )
    if count < len(table) and bool((table.scores == table.scores[0]).all()):
        raise SelectionError(
            f"all {len(table)} scores equal {float(table.scores[0]):g}: they rank nothing; "
            'choose with policy="random", or score with another method'
        )


def _resolved(
    policy: str | Policy, options: dict[str, Any], *, count: int, labels: Tensor | None
) -> tuple[Policy, list[str]]:
    """The policy's function, and what there is to say about it; "auto" takes its option out."""
    if not isinstance(policy, str):
        return policy, []
    if policy != AUTO:
        if policy not in POLICIES:
            raise SelectionError(
                f"unknown policy {policy!r}; known: {AUTO}, {', '.join(POLICIES)}"
                f"{close_names(policy, POLICIES)}"
            )
        return POLICIES[policy], []
    if labels is None:
        raise SelectionError("policy auto counts samples by class; this table has no labels")
    plentiful = options.pop("plentiful", PLENTIFUL)
    _check_number("option plentiful of policy auto", plentiful, like=1.0)
    by_class = count / len(labels.unique())
    is_plentiful = by_class >= plentiful
    note = (
        f"auto took the {'hardest' if is_plentiful else 'easiest'} samples: {by_class:g} a class "
        f"are kept, {'at least' if is_plentiful else 'fewer than'} {plentiful}"
    )
    return (hardest if is_plentiful else easiest), [note]


def _with_options(name: str, function: Policy, options: dict[str, Any]) -> partial[Tensor]:
    known = dict(list(inspect.signature(function).parameters.items())[3:])
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise SelectionError(
            f"policy {name} has no option {', '.join(unknown)}; its options: "
            f"{', '.join(known) or 'none'}"
        )
    if function in POLICIES.values():
        for key, value in options.items():
            _check_number(f"option {key} of policy {name}", value, like=known[key].default)
    return partial(function, **options)


def _check_number(what: str, value: Any, *, like: float | None) -> None:
    """Refuse what is no finite number, or not a whole one where the default is."""
    is_whole = isinstance(like, int)
    is_number = isinstance(value, int if is_whole else int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        expected = "a whole number" if is_whole else "a number"
        raise SelectionError(f"{what}: expected {expected}, got {value!r}")


@dataclass(frozen=True)
class _Plan:
    """A policy with its options, and the floor of classes where there is one."""

    policy: partial[Tensor]
    floor: float | None


def _in_groups(
    plan: _Plan,
    scored: Scored,
    labels: Tensor | None,
    count: int,
    *,
    groups: Tensor | None,
    seed: int,
) -> tuple[Tensor, int]:
    """Positions among the samples, chosen group by group where there are groups.

    With them comes the number that was drawn among equal scores.
    """
    if groups is None:
        return _with_floors(plan, scored, labels, count, seed=(seed,))
    names, member_of = groups.unique(return_inverse=True)
    kept, drawn = [], 0
    for group, share in enumerate(_shares(torch.bincount(member_of), count).tolist()):
        if share:
            members = torch.nonzero(member_of == group).flatten()
            own = None if labels is None else labels[members]
            chosen, by_chance = _with_floors(
                plan, scored.take(members), own, share, seed=(seed, int(names[group]))
            )
            kept.append(members[chosen])
            drawn += by_chance
    return torch.cat(kept), drawn


def _with_floors(
    plan: _Plan, scored: Scored, labels: Tensor | None, count: int, *, seed: tuple[int, ...]
) -> tuple[Tensor, int]:
    """Choose so that no class falls short of its floor.

    Classes that do are given their floor and taken out, until the others do without.
    """
    if plan.floor is None or labels is None:
        return _choice(plan.policy, scored, count, (*seed, 0))
    classes, sizes = labels.unique(return_counts=True)
    floors = {
        int(c): math.floor(plan.floor * count * int(size) / len(scored) + 1e-9)
        for c, size in zip(classes, sizes, strict=True)
    }
    free, kept, drawn = torch.arange(len(scored)), [], 0
    for stage in range(len(floors) + 1):
        places, by_chance = _choice(plan.policy, scored.take(free), count, (*seed, stage))
        chosen = free[places]
        short = [c for c, least in floors.items() if int((labels[chosen] == c).sum()) < least]
        if not short:
            break
        for c in short:
            own = torch.nonzero(labels == c).flatten()
            least = floors.pop(c)
            places, own_chance = _choice(plan.policy, scored.take(own), least, (*seed, stage, c))
            kept.append(own[places])
            drawn += own_chance
            count -= least
            free = free[labels[free] != c]
    return torch.cat([*kept, chosen]), drawn + by_chance


def _choice(
    policy: partial[Tensor], scored: Scored, count: int, seed: tuple[int, ...]
) -> tuple[Tensor, int]:
    """What a policy chooses, checked: a policy of the user's own may be wrong.

    With it comes the number that was drawn among equal scores.
    """
    chosen: Tensor = policy(scored, count, generator(*seed))
    if len(chosen) != count or len(chosen.unique()) != count:
        raise SelectionError(
            f"the policy returned {len(chosen)} samples, {len(chosen.unique())} of them "
            f"different; asked for {count}"
        )
    return chosen, drawn_among_equals(policy.func, scored, chosen)


def _shares(sizes: Tensor, count: int) -> Tensor:
    """`count` divided in proportion to sizes, by largest remainders; int64, sums to count."""
    exact = sizes.double() * count / int(sizes.sum())
    shares = exact.floor().long()
    left = count - int(shares.sum())
    shares[torch.argsort(shares - exact, stable=True)[:left]] += 1
    return shares


def _absent(what: str, of: Tensor, kept: Tensor) -> list[str]:
    """A sentence for each class or group of which nothing was kept."""
    names, sizes = of.unique(return_counts=True)
    left = set(of[kept].unique().tolist())
    return [
        f"no sample of {what} {name} is kept; the data have {size}"
        for name, size in zip(names.tolist(), sizes.tolist(), strict=True)
        if name not in left
    ]


def _column(what: str, values: Tensor | None, order: Tensor) -> Tensor | None:
    if values is None:
        return None
    if values.shape != order.shape:
        raise SelectionError(f"{len(order)} samples but {what} of shape {tuple(values.shape)}")
    values = values.cpu()[order]
    return values.double() if values.is_floating_point() else values


def _name(policy: Policy) -> str:
    return str(getattr(policy, "__name__", type(policy).__name__))
