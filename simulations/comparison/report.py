"""The page of a comparison: what was run and where, its sections, what went wrong."""

from __future__ import annotations

from collections.abc import Mapping

from simulations.comparison.cells import Pair, point_name
from simulations.comparison.presets import TUNING_ALPHA
from simulations.comparison.results import groups
from simulations.comparison.steps import Call, Found
from simulations.comparison.tables import (
    best_rival_section,
    frontier_sections,
    gap_section,
    method_sections,
)
from simulations.comparison.tuning import chosen, tuning_rows
from simulations.jobs import DID_DIVERGE, FINISHED, Outcome
from simulations.page import commits_of, page, table


def write_page(call: Call, found: Found) -> str:
    """The Markdown page: the gap to dense, then tables, frontiers, tuning and what went wrong."""
    preset, outcomes = call.preset, found.outcomes
    by_group = groups(found.cells, outcomes)
    body = [*gap_section(by_group), *best_rival_section(by_group), *method_sections(by_group)]
    body += frontier_sections(by_group, found.memory, clients=preset.clients)
    if call.point is None:
        header = ["method", "density", "accuracy, % on clients' own samples, by setting", "at"]
        body += ["", "## Tuning", ""]
        body += ["Where the winner lies at an end of what was tried, a better one may lie beyond."]
        body += ["", table(header, tuning_rows(found.log), words=(0, 2, 3))]
    body += _troubles(outcomes)
    settings = preset.settings
    return page(
        preset.title,
        command=call.command,
        at=commits_of(outcomes.values()),
        notes=_notes(call, found),
        body=body,
        # Where somebody's folder of data lies is nothing for a page.
        settings={k: v for k, v in settings.items() if k != "data.dataset" or "/" not in v},
    )


def _notes(call: Call, found: Found) -> list[str]:
    """What a reader should know before the tables."""
    preset = call.preset
    seeds = ", ".join(map(str, preset.seeds))
    notes = [
        f"mean ± sample standard deviation over seeds {seeds}; the seed decides data split, "
        "initial weights, order and masks alike, and differences are paired by it",
        "every method: the same network class (small-dense: narrower), split, rounds and start; "
        "the server's brief training before the first round takes the method's learning rate too",
        "intervals are Student's, each for itself: they are not widened for the number of rivals",
        "a run that diverged is counted, and is in no mean and no pair: a method that has one is "
        "less stable than its mean says",
        "test data are used once a round for the record and decide nothing",
    ]
    if call.point is None:
        tuned_on = ", ".join(map(str, preset.tuning_seeds))
        notes += [
            f"tuning: as many runs for every method, each density for itself, at Dirichlet "
            f"{TUNING_ALPHA:g} on seeds {tuned_on}; the score is the accuracy on a tenth of each "
            "client's own samples, which nobody trains on, and the test set is left aside; of "
            "equal scores the smaller setting wins; what diverged on a seed cannot win",
        ]
        lost = [pair for pair, tried in found.log.items() if chosen(tried) is None]
        left_out = {
            "its tuning has not ended": [pair for pair in call.pairs if pair not in found.log],
            "it diverged wherever it was tuned": lost,
        }
        for reason, pairs in left_out.items():
            if pairs:
                notes += [f"left out, for {reason}: {', '.join(map(_pair_name, pairs))}"]
    else:
        notes += [f"nothing was tuned: every method runs with {point_name(call.point)}"]
    ended = sum(cell.name in found.outcomes for cell in found.cells)
    if ended < len(found.cells):
        notes += [f"{ended} of {len(found.cells)} runs have ended"]
    return [*notes, preset.note] if preset.note else notes


def _troubles(outcomes: Mapping[str, Outcome]) -> list[str]:
    """Runs that did not finish: which diverged, and why others failed."""
    lost = [f"`{name}`" for name, one in outcomes.items() if one.status == DID_DIVERGE]
    rows = [
        [name, one.status, (one.reason.strip().splitlines() or ["?"])[-1][-300:]]
        for name, one in outcomes.items()
        if one.status not in {FINISHED, DID_DIVERGE}
    ]
    lines = ["", "## Runs that did not finish"] if lost or rows else []
    if lost:
        lines += ["", f"Diverged, {len(lost)} of {len(outcomes)} runs: {', '.join(lost)}."]
    if rows:
        lines += ["", table(["run", "outcome", "reason"], rows, words=(0, 1, 2))]
    return lines


def _pair_name(pair: Pair) -> str:
    method, density = pair
    return method if density is None else f"{method} at {density:g}"
