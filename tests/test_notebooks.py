"""Every notebook runs from beginning to end, and is stored with the outputs of its sources."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from notebooks.execute import (
    DIGEST,
    MACHINE,
    MEASURED,
    METADATA,
    fewer_colours,
    machine,
    notebook_of,
    scripts,
    sources_digest,
)

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
# Notebook -> number of pictures that it must show, at least.
PICTURES = {
    "01_tiny_federated_model": 5,
    "02_choose_and_move_a_mask": 6,
    "03_prune_your_data": 4,
    "04_recommenders": 4,
    "05_from_simulation_to_a_fleet": 3,
    "06_your_own": 4,
    "07_sparse_kernels": 3,
    "08_prune_a_language_model": 5,
}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

MOST_BYTES = 250_000

# Runs in an interpreter of its own: there the warnings of Jupyter's packages are no errors. What
# runs is what stores the notebooks, and a cell more.
RUNNER = """
import sys
from pathlib import Path
import nbformat

script, target, folder = map(Path, sys.argv[1:])
sys.path.insert(0, str(script.parent))
from execute import execute, notebook_of

notebook = notebook_of(script)
notebook.cells.append(nbformat.v4.new_code_cell("import sys; print(sys.executable)"))
nbformat.validate(notebook)
execute(notebook, folder)
nbformat.write(notebook, target)
"""

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def code_cells(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def texts(cell: dict[str, Any]) -> list[str]:
    """What a code cell printed and showed, pictures as their size."""
    shown = [out.get("text") or out.get("data", {}).get("text/plain") for out in cell["outputs"]]
    return ["".join(text) for text in shown]


def words(cell: dict[str, Any]) -> list[list[str]]:
    """The same without its numbers, nor the spaces that fill lines up to their width."""
    return [NUMBER.sub("#", text).split() for text in texts(cell)]


def test_every_notebook_is_known_here() -> None:
    assert [path.stem for path in scripts()] == sorted(PICTURES)
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_stored_with_the_outputs_of_its_script(name: str) -> None:
    """GitHub shows what is stored, and runs nothing."""
    path = NOTEBOOKS / f"{name}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = code_cells(path)
    hint = f"run: python notebooks/execute.py {name}.py"
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), hint
    script = sources_digest(notebook_of(NOTEBOOKS / f"{name}.py"))
    assert notebook["metadata"][DIGEST] == sources_digest(notebook) == script, hint
    assert notebook["metadata"].keys() == {*METADATA, DIGEST, MACHINE}
    assert notebook["metadata"]["language_info"] == {"name": "python"}  # and no version of it
    assert all(cell["metadata"] == {} for cell in notebook["cells"])  # and no times
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(output.get("name") != "stderr" for output in outputs)
    assert len(pictures_of(outputs)) >= PICTURES[name]
    text = json.dumps(outputs)
    assert not re.search(r"/(home|root|tmp|work|Users)/", text), "a path of this machine"
    assert path.stat().st_size <= MOST_BYTES


def test_the_digest_tells_sources_from_outputs() -> None:
    cell = {"cell_type": "code", "source": ["a\n", "b"], "outputs": [], "execution_count": None}
    digest = sources_digest({"cells": [cell]})
    ran = {**cell, "outputs": [{"text": "x"}], "execution_count": 3, "source": "a\nb"}
    assert sources_digest({"cells": [ran]}) == digest
    for changed in ({"source": "a\nc"}, {"cell_type": "markdown"}):
        assert sources_digest({"cells": [{**cell, **changed}]}) != digest


def test_pictures_lose_colours_and_no_more() -> None:
    """A palette of 64 colours; where a picture was transparent it is white."""
    picture = Image.new("RGBA", (200, 100), (0, 0, 0, 0))
    for column in range(100):
        for row in range(100):
            picture.putpixel((column, row), (2 * column, 0, 2 * row, 255))
    file = io.BytesIO()
    picture.save(file, format="PNG")
    small = base64.b64decode(fewer_colours(base64.b64encode(file.getvalue()).decode()))
    assert small.startswith(PNG_SIGNATURE)
    with Image.open(io.BytesIO(small)) as read:
        plain = read.convert("RGB")
    assert plain.size == (200, 100)
    assert len(plain.getcolors() or []) <= 64
    assert plain.getpixel((150, 50)) == (255, 255, 255)
    red, green, blue = plain.getpixel((50, 50))  # type: ignore[misc]
    assert max(abs(red - 100), green, abs(blue - 100)) < 30


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_runs_to_what_is_stored_and_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    """The same pictures by number and the same words; on the same machine the same numbers."""
    executed, temporary, work = tmp_path / name, tmp_path / "temporary", tmp_path / "work"
    for folder in (temporary, work):
        folder.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    # An inherited backend would draw elsewhere than in the notebook.
    environment.pop("MPLBACKEND", None)
    arguments = [NOTEBOOKS / f"{name}.py", executed, work]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, *map(str, arguments)],
        env=environment,
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]

    *cells, python = code_cells(executed)
    assert python["outputs"][0]["text"] == [f"{sys.executable}\n"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    pictures = pictures_of(outputs)
    assert len(pictures) >= PICTURES[name]
    for picture in pictures:
        assert base64.b64decode(picture).startswith(PNG_SIGNATURE)
    stored = NOTEBOOKS / f"{name}.ipynb"
    computed_on = json.loads(stored.read_text(encoding="utf-8"))["metadata"][MACHINE]
    for old, new in zip(code_cells(stored), cells, strict=True):
        assert words(new) == words(old), old["source"]
        if computed_on == machine() and not old["source"][0].startswith(MEASURED):
            assert texts(new) == texts(old)
    assert not list(work.iterdir())
    assert not list(temporary.glob("fedprune-*"))


def pictures_of(outputs: list[dict[str, Any]]) -> list[str]:
    """The pictures among outputs, base64 of PNG."""
    data: list[dict[str, str]] = [output.get("data", {}) for output in outputs]
    return [found["image/png"] for found in data if "image/png" in found]
