"""The directions of imports, and that importing a package stays light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEVICE = "torch ray datasets pyarrow sklearn scipy torchvision matplotlib jinja2 pandas"


def test_imports_go_one_way() -> None:
    """The contracts in pyproject.toml: layers, a torch-only core, flwr only at the edge."""
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("sparsemodel", "torch flwr datasets sklearn torchvision"),
        ("sparsemodel.codec", "torch flwr datasets sklearn torchvision matplotlib"),
        ("sparsemodel.runtime.trainer", "torch flwr datasets sklearn torchvision matplotlib"),
        ("sparsemodel.masks.adjust", "flwr datasets sklearn torchvision transformers matplotlib"),
        ("prunelab", "torch flwr datasets sklearn torchvision transformers"),
        ("datapruning", "torch flwr datasets sklearn torchvision"),
        ("fedprune", "torch flwr ray datasets sklearn torchvision matplotlib"),
        ("fedprune.config", "torch flwr ray datasets sklearn torchvision matplotlib"),
        ("fedprune.cli", f"{DEVICE} flwr"),
        ("fedprune.methods", "torch flwr ray datasets sklearn torchvision matplotlib"),
        ("fedprune.rounds.loop", "torch flwr ray datasets sklearn torchvision matplotlib"),
        ("fedprune.flower.client", DEVICE),
        ("fedprune.device.keys", DEVICE),
        ("prunelab.data.own_store", f"{DEVICE} PIL"),
        ("fedprune.flower.server", "torch ray datasets sklearn torchvision matplotlib"),
    ],
)
def test_import_is_light(module: str, heavy: str) -> None:
    code = f"import sys, {module}; print([m for m in {heavy.split()!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
