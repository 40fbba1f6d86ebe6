"""`python notebooks/execute.py [NAME.py ...]`: run scripts as notebooks, stored with outputs.

Needs fedprune[notebooks]. A notebook is written as a script in Jupytext's percent format, which
Jupyter opens, too; this makes NAME.ipynb of it. Pictures are stored with few colours, as small
files; what differs from run to run without a reason (times of cells, versions) is left out. A
digest of the sources goes into the notebook: a test tells by it that the script was run as it is.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import platform
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COLOURS = 64
DIGEST, MACHINE = "executed_sources", "executed_on"  # keys of a notebook's metadata
MEASURED = "# Measured"  # begins a cell whose numbers differ from run to run
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def scripts() -> list[Path]:
    """The scripts of all notebooks."""
    return sorted(HERE.glob("[0-9]*.py"))


def notebook_of(script: Path) -> Any:
    """The notebook of a percent script, without outputs."""
    import jupytext  # noqa: PLC0415

    notebook = jupytext.read(script, fmt="py:percent")
    for number, cell in enumerate(notebook.cells, 1):
        # Jupytext draws ids, and notes how many lines lie between cells.
        cell.id, cell.metadata = f"cell-{number}", {}
    notebook.metadata = dict(METADATA)
    return notebook


def sources_digest(notebook: dict[str, Any]) -> str:
    """16 hexadecimal digits of the sources of all cells."""
    sha = hashlib.sha256()
    for cell in notebook["cells"]:
        source = cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
        sha.update(f"{cell['cell_type']}\0{source}\0".encode())
    return sha.hexdigest()[:16]


def machine() -> str:
    """What has to be the same for the same bits: torch, instructions and maker of the processor."""
    import torch  # noqa: PLC0415

    cpus = Path("/proc/cpuinfo")
    text = cpus.read_text(encoding="utf-8") if cpus.exists() else ""
    maker = re.search(r"^vendor_id\s*: (.*)$", text, re.MULTILINE)
    name = maker[1] if maker else platform.processor()
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {name}"


def execute(notebook: Any, folder: Path) -> None:
    """Run all cells in place, with this very interpreter and `folder` as the working folder."""
    from ipykernel.kernelspec import write_kernel_spec  # noqa: PLC0415
    from nbclient import NotebookClient  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as kernels:
        # A user's own kernel "python3" may start another Python: this one is found first.
        write_kernel_spec(Path(kernels) / "kernels" / "python3")
        os.environ["JUPYTER_PATH"] = kernels
        os.environ["OMP_NUM_THREADS"] = "1"  # the order of sums depends on it
        # Progress bars would like ipywidgets; nothing here shows one.
        os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
        client = NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(folder)}},
        )
        client.execute()


def tidy(notebook: Any) -> None:
    """Leave what is the same every time: small pictures, the notebook's own metadata."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = fewer_colours(data["image/png"])
    notebook.metadata = {
        **METADATA,
        DIGEST: sources_digest(notebook),
        MACHINE: machine(),
    }


def fewer_colours(png: str) -> str:
    """A picture (base64 of a PNG) with a palette: about a third of the bytes."""
    from PIL import Image  # noqa: PLC0415

    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        opaque = Image.new("RGB", picture.size, "white")
        opaque.paste(picture, mask=picture.getchannel("A") if "A" in picture.mode else None)
    file = io.BytesIO()
    opaque.quantize(COLOURS, dither=Image.Dither.NONE).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main(names: list[str]) -> None:
    """Run the scripts of these names, by default all."""
    import nbformat  # noqa: PLC0415

    os.environ.pop("MPLBACKEND", None)  # it would draw elsewhere than in the notebook
    for script in [HERE / Path(name).name for name in names] or scripts():
        notebook, target = notebook_of(script), script.with_suffix(".ipynb")
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder))
        tidy(notebook)
        nbformat.write(notebook, target)
        print(f"{target.name}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
