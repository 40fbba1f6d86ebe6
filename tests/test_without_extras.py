"""What the base distribution does without torch, and what it says where torch is needed."""

from __future__ import annotations

import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from light import command_light, run_light

from sparsemodel.extras import EXTRAS
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.state_file import save_state

ROOT = Path(__file__).parent.parent
HAS_DEVICE_COMMANDS = find_spec("fedprune.device.commands") is not None


def test_the_base_distribution_brings_nothing_that_an_extra_is_named_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\[<>=; ]", requirement)[0] for requirement in requirements}

    called = {"sklearn": "scikit-learn", "PIL": "pillow", "pyarrow": "datasets", "ray": "flwr"}
    for package, extra in EXTRAS.items():
        name = called.get(package, package)
        assert name in names(project["optional-dependencies"][extra])
        assert name == "flwr" or name not in names(project["dependencies"])
    assert names(project["optional-dependencies"]["device"]) == {"pillow"}


def sparse_file(folder: Path) -> Path:
    pattern = Pattern((2, 3), np.array([0, 1, 2], np.int32), np.array([2, 0], np.int32))
    state = SparseState({"0.weight": np.array([1, 2], np.float32)}, Patterns({"0.weight": pattern}))
    save_state(folder / "model.safetensors", state, metadata={})
    return folder / "model.safetensors"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], "Federated pruning on Flower"),
        (["--version"], "fedprune "),
        (["methods"], "fedtiny"),
        (["methods", "fedtiny"], "pool_size"),
        (["inspect", "model.safetensors"], "0.3333"),
        (["new", "my-app"], "made my-app"),
        pytest.param(
            ["device", "--help"], "init",
            marks=pytest.mark.skipif(not HAS_DEVICE_COMMANDS, reason="there is no fedprune device"),
        ),
    ],
)  # fmt: skip
def test_commands_of_a_device_need_no_torch(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    sparse_file(tmp_path)
    done = command_light("fedprune", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert words in done.stdout


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("fedprune run", "fedprune run needs jinja2: pip install 'fedprune[torch]'"),
        ("fedprune report x", "fedprune report needs jinja2: pip install 'fedprune[torch]'"),
        ("fedprune predict x y", "fedprune.load needs torch: pip install 'fedprune[torch]'"),
        (
            "fedprune export x --format onnx",
            "fedprune export needs torch: pip install 'fedprune[torch]'",
        ),
        (
            "datapruning score digits --method el2n",
            "datapruning score needs torch: pip install 'fedprune[torch]'",
        ),
        ("datapruning methods", "datapruning methods needs torch: pip install 'fedprune[torch]'"),
    ],
)
def test_a_command_that_needs_torch_says_what_to_install(
    command: str, line: str, tmp_path: Path
) -> None:
    done = command_light(*command.split(), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == f"error: {line}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "fedprune.Trained",
        "datapruning.score",
        "datapruning.ImageSamples",
        "sparsemodel.prune",
        "prunelab.save_pretrained",
    ],
)
def test_a_name_that_needs_torch_says_what_to_install(name: str) -> None:
    package, _, inside = name.partition(".")
    done = run_light("-c", f"from {package} import {inside}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"sparsemodel.errors.NotInstalledError: {name} needs torch: pip install 'fedprune[torch]'"
    )


def test_a_run_in_python_says_what_to_install_before_it_makes_a_folder(tmp_path: Path) -> None:
    code = """
import fedprune
from sparsemodel.errors import NotInstalledError
for call in (lambda: fedprune.run(data="digits", folder="out"), lambda: fedprune.load("out")):
    try:
        call()
    except NotInstalledError as error:
        assert isinstance(error, ImportError)
        print(error)
"""
    done = run_light("-c", code, cwd=tmp_path)
    assert done.stdout.splitlines() == [
        "fedprune.run needs torch: pip install 'fedprune[torch]'",
        "fedprune.load needs torch: pip install 'fedprune[torch]'",
    ]
    assert list(tmp_path.iterdir()) == []
