"""`python notebooks/execute.py [NAME ...]`: run notebooks and store them with their outputs.

Needs fedprune[notebooks]. Pictures are stored with few colours, as small files; what differs from
run to run without a reason (times of cells, versions) is left out. A digest of the sources goes
into the notebook: a test tells by it that they were run as they are.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COLOURS = 64
DIGEST = "executed_sources"  # key of a notebook's metadata


def sources_digest(notebook: dict[str, Any]) -> str:
    """16 hexadecimal digits of the sources of all cells."""
    sha = hashlib.sha256()
    for cell in notebook["cells"]:
        source = cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
        sha.update(f"{cell['cell_type']}\0{source}\0".encode())
    return sha.hexdigest()[:16]


def execute(notebook: Any, folder: Path) -> None:
    """Run all cells in place, with this very interpreter and `folder` as the working folder."""
    from ipykernel.kernelspec import write_kernel_spec  # noqa: PLC0415
    from nbclient import NotebookClient  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as kernels:
        # A user's own kernel "python3" may start another Python: this one is found first.
        write_kernel_spec(Path(kernels) / "kernels" / "python3")
        os.environ["JUPYTER_PATH"] = kernels
        client = NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": str(folder)}},
        )
        client.execute()


def tidy(notebook: Any, metadata: dict[str, Any]) -> None:
    """Leave what is the same every time: small pictures, the notebook's own metadata."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = fewer_colours(data["image/png"])
    notebook.metadata = {**metadata, DIGEST: sources_digest(notebook)}


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
    """Run the notebooks of these names, by default all."""
    import nbformat  # noqa: PLC0415

    os.environ.pop("MPLBACKEND", None)  # it would draw elsewhere than in the notebook
    for path in [HERE / name for name in names] or sorted(HERE.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        metadata = {key: notebook.metadata[key] for key in ("kernelspec", "language_info")}
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder))
        tidy(notebook, metadata)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
