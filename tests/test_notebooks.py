"""Every notebook runs from beginning to end, and is stored without its outputs."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
# Notebook -> number of pictures that it must show, at least.
PICTURES = {"01_tiny_federated_model.ipynb": 5, "02_prune_your_data.ipynb": 4}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Runs in an interpreter of its own: there the warnings of Jupyter's packages are no errors. The
# kernel "python3" is written anew, since a user's own of that name may start another Python.
RUNNER = """
import sys
import nbformat
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

source, target, kernel, folder = sys.argv[1:]
write_kernel_spec(kernel)
notebook = nbformat.read(source, as_version=4)
nbformat.validate(notebook)
notebook.cells.append(nbformat.v4.new_code_cell("import sys; print(sys.executable)"))
resources = {"metadata": {"path": folder}}
NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
nbformat.write(notebook, target)
"""


def code_cells(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_every_notebook_is_known_here() -> None:
    assert sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")) == sorted(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_stored_without_outputs(name: str) -> None:
    for cell in code_cells(NOTEBOOKS / name):
        assert cell["outputs"] == [], f"clear the outputs of {name}, cell {cell['id']}"
        assert cell["execution_count"] is None, f"clear the outputs of {name}, cell {cell['id']}"
    metadata = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))["metadata"]
    assert metadata["kernelspec"]["name"] == "python3"


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_runs_and_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    executed, temporary, work = tmp_path / name, tmp_path / "temporary", tmp_path / "work"
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    for folder in (temporary, work):
        folder.mkdir()
    environment = {
        **os.environ,
        "JUPYTER_PATH": str(tmp_path / "jupyter"),  # is searched first
        "TMPDIR": str(temporary),
    }
    # An inherited backend would draw elsewhere than in the notebook.
    environment.pop("MPLBACKEND", None)
    arguments = [NOTEBOOKS / name, executed, kernel, work]
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
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in _data(output)]
    assert len(pictures) >= PICTURES[name]
    for picture in pictures:
        assert base64.b64decode(picture).startswith(PNG_SIGNATURE)
    assert not list(work.iterdir())
    assert not list(temporary.glob("fedprune-*"))


def _data(output: dict[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = output.get("data", {})
    return data
