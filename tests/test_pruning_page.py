"""docs/pruning.md: its lines run, and its tables are those of the registries."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sparsemodel.masks.distribution import DISTRIBUTIONS
from sparsemodel.masks.registry import CRITERIA
from sparsemodel.taxonomy import AFTER, ANY, BEFORE, DURING
from sparsemodel.units.registry import UNIT_CRITERIA

PAGE = (Path(__file__).parents[1] / "docs" / "pruning.md").read_text(encoding="utf-8")


def test_its_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block after the other, as a reader would."""
    monkeypatch.chdir(tmp_path)
    for name in ("uncommon", "lively"):  # the page adds them, and they go again
        monkeypatch.setitem(CRITERIA, name, CRITERIA["random"])
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/pruning.md", "exec"), names)
    assert CRITERIA["lively"].data == ("inputs",)
    assert names["mask"].num_active == round(0.1 * (32 * 32 + 4 * 32))
    pruned = {
        name: weight[~names["pruner"].mask[name]]
        for name, weight in names["net"].named_parameters()
        if name in names["pruner"].mask
    }
    assert all((weight == 0).all() for weight in pruned.values())
    assert names["pruner"].mask.density == pytest.approx(0.2, abs=0.001)


def rows(registry: Mapping[str, Any]) -> list[str]:
    return [
        f"| `{name}` | {entry.when} | {', '.join(entry.units)} | {', '.join(entry.data) or '–'} | "
        f"{entry.criterion} | {entry.source} |"
        for name, entry in registry.items()
    ]


@pytest.mark.parametrize("registry", [CRITERIA, UNIT_CRITERIA], ids=["weights", "units"])
def test_its_tables_are_the_registries(registry: Mapping[str, Any]) -> None:
    assert "\n".join(rows(registry)) + "\n\n" in PAGE
    for entry in registry.values():
        assert entry.when in {BEFORE, DURING, AFTER, ANY}
        assert entry.units
        assert entry.criterion
        assert entry.source


def test_every_distribution_has_its_row() -> None:
    listed = re.findall(r"^\| (`.*?`) \|", PAGE.split("## Distribution")[1], re.MULTILINE)
    names = [name for cell in listed for name in re.findall(r"`([^`]+)`", cell)]
    assert set(DISTRIBUTIONS) <= set(names)
