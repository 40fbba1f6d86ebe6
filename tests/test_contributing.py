"""What CONTRIBUTING.md and docs/rooms.md say of places is so.

A worked example of each kind of change is a patch in tests/contributing/. All of them are applied
to a copy of the checkout: each may touch the places of its row, its test and the changelog, and
its test and the contract tests over its registry pass there. Where an example no longer applies,
make its change by hand and write `git diff -U1` over the patch.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from datapruning.scoring.methods import METHODS as SCORES
from datapruning.selection.policies import POLICIES
from fedprune.methods import METHODS
from prunelab.data.datasets import DATASETS
from prunelab.networks import MODELS

ROOT = Path(__file__).parent.parent
PACKAGES = ("sparsemodel", "prunelab", "datapruning", "fedprune")


@dataclass(frozen=True)
class Example:
    """A worked change.

    Attributes:
        patch: name of its file in tests/contributing/, less the ending.
        contracts: existing tests that it has to pass by name.
        obeys: a place that its row cannot name, since it differs from change to change.
    """

    patch: str
    contracts: tuple[str, ...] = ()
    obeys: tuple[str, ...] = ()


PRUNE = "tests/sparsemodel/masks/test_prune.py::test_every_criterion_and_distribution_by_name"
SELECT = "tests/datapruning/selection/test_select.py::test_"
EXAMPLES = {
    "a federated method": Example(
        "method",
        (
            "tests/fedprune/methods/test_methods.py::test_contract_of_every_method[server-step]",
            "tests/fedprune/methods/test_traits.py::test_a_method_is_of_its_kind[server-step]",
            "tests/fedprune/test_config.py::test_every_method_has_a_target_density",
            "tests/fedprune/test_config.py::test_the_settings_of_a_method_are_one_key_of_flower",
        ),
    ),
    "a setting of a method": Example("setting_of_a_method"),
    "a setting of every run": Example(
        "setting_of_every_run",
        ("tests/fedprune/test_config.py::test_flower_app_lists_every_key_with_its_default",),
        obeys=("fedprune/local/optimizer.py",),
    ),
    "a data set": Example("data_set"),
    "a network": Example(
        "network", ("tests/prunelab/test_networks.py::test_check_model_knows_the_names",)
    ),
    "a score of samples": Example("score", ("datapruning/scores/error.py",)),
    "a selection policy": Example(
        "policy",
        (
            f"{SELECT}counts_are_exact_and_rows_may_come_in_any_order[spaced]",
            f"{SELECT}ties_and_draws_follow_the_seed[spaced]",
        ),
    ),
    "a pruning criterion": Example(
        "criterion",
        (
            "tests/sparsemodel/masks/test_criteria.py::"
            "test_every_criterion_keeps_its_contract_and_leaves_no_trace[lamp]",
            f"{PRUNE}[erk-lamp]",
            "tests/sparsemodel/test_planted.py::test_planted_weights_are_found[lamp]",
            "tests/test_pruning_page.py::test_its_tables_are_the_registries",
        ),
    ),
    "a layer-density distribution": Example(
        "distribution", (f"{PRUNE}[root-magnitude]", "sparsemodel/masks/distribution.py")
    ),
    "a layer or function of a network that programs already compute": Example("layer_of_programs"),
    "a chart of a run's page": Example("chart"),
}

# An editable install finds the packages by a hook of its own: here the copy has to be found.
RUN_PYTEST = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in type(finder).__name__
                 and "Redirecting" not in type(finder).__name__]
import pytest, sparsemodel
from pathlib import Path
assert Path(sparsemodel.__file__).is_relative_to(Path.cwd()), sparsemodel.__file__
sys.exit(pytest.main(sys.argv[1:]))
"""


def rows() -> dict[str, list[str]]:
    """Kind of change -> the places that CONTRIBUTING.md's table names for it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (.+?) \| (.+) \|$", text.split("| to add |")[1], re.MULTILINE)
    places = {kind: re.findall(r"`([^` ]+)`", cell) for kind, cell in table}
    return {kind: [p for p in found if "/" in p or p.endswith(".md")] for kind, found in
            places.items() if not set(kind) <= set("- ")}  # fmt: skip


def lies_at(file: str, place: str) -> bool:
    """Whether a place, a file or folder or pattern of files, has that file."""
    return fnmatch.fnmatch(file, place) or (place.endswith("/") and file.startswith(place))


@dataclass(frozen=True)
class Copy:
    """The checkout with all examples applied; what each of them touched by `git diff`."""

    folder: Path
    touched: dict[str, set[str]]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    folder = tmp_path_factory.mktemp("checkout")

    def git(*arguments: str, cwd: Path = folder) -> list[str]:
        done = subprocess.run(
            ["git", *arguments], cwd=cwd, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"git {' '.join(arguments)}: {done.stderr}"
        return done.stdout.split("\0")[:-1]

    for name in git("ls-files", "-z", cwd=ROOT):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    git("init", "--quiet")
    git("add", "--all")
    touched = {}
    for kind, example in EXAMPLES.items():
        git("apply", str(ROOT / "tests" / "contributing" / f"{example.patch}.patch"))
        new = git("ls-files", "-z", "--others", "--exclude-standard")
        touched[kind] = {*git("diff", "-z", "--name-only"), *new}
        git("add", "--all")
    return Copy(folder, touched)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_an_example_touches_the_places_of_its_row(kind: str, copy: Copy) -> None:
    places, touched = [*rows()[kind], *EXAMPLES[kind].obeys], copy.touched[kind]
    assert any(file.startswith("tests/") for file in touched)
    rest = {file for file in touched if not file.startswith("tests/")} - {"CHANGELOG.md"}
    assert [file for file in rest if not any(lies_at(file, place) for place in places)] == []
    assert [place for place in places if not any(lies_at(file, place) for file in rest)] == []


def test_the_examples_work(copy: Copy) -> None:
    """Their tests and the contract tests over the registries, in one process for all."""
    tests = [test for example in EXAMPLES.values() for test in example.contracts]
    tests += sorted(
        file for touched in copy.touched.values() for file in touched if "/test_" in file
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-c", RUN_PYTEST, "-n", "0", "-p", "no:cacheprovider", *tests],
        cwd=copy.folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_examples_are_written_as_the_project_is(copy: Copy) -> None:
    beside = str(Path(sys.executable).parent)
    ruff = shutil.which("ruff", path=os.pathsep.join((beside, os.environ["PATH"])))
    if ruff is None:
        pytest.skip("needs ruff")
    files = sorted(
        file for touched in copy.touched.values() for file in touched if file.endswith(".py")
    )
    for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = subprocess.run(
            [ruff, *command, *files], cwd=copy.folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("kind", rows())
def test_every_place_of_a_row_is_there(kind: str) -> None:
    gone = [place for place in rows()[kind] if not list(ROOT.glob(place.removesuffix("/")))]
    assert gone == []


@pytest.mark.parametrize(
    ("registry", "document"),
    [
        (METHODS, "README.md"),
        (DATASETS, "docs/runs.md"),
        (MODELS, "docs/runs.md"),
        (SCORES, "docs/datapruning.md"),
        ({**POLICIES, "auto": None}, "docs/datapruning.md"),
    ],
    ids=["methods", "data sets", "networks", "scores", "policies"],
)
def test_every_name_has_its_row(registry: dict[str, object], document: str) -> None:
    """In the first column of a table, `-b` after `a-c` standing for `a-b`."""
    text = (ROOT / document).read_text(encoding="utf-8")
    listed = set()
    for cell in re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE):
        first, *others = re.findall(r"`([^`]+)`", cell)
        stem = first.rpartition("-")[0]
        listed |= {first, *(stem + name if name[0] == "-" else name for name in others)}
    assert [name for name in registry if name not in listed] == []


def test_every_room_is_named() -> None:
    """docs/rooms.md has a word for each folder with code and each file beside the rooms."""
    text = (ROOT / "docs" / "rooms.md").read_text(encoding="utf-8")
    sections = {part.partition(":")[0]: part for part in text.split("\n## ")}
    for package in PACKAGES:
        named = set(re.findall(r"`([^`]+)`", sections[package]))
        rooms = {f"{file.parent.name}/" for file in (ROOT / package).glob("*/__init__.py")}
        files = {file.name for file in (ROOT / package).glob("*.py") if file.name[0] != "_"}
        assert rooms | (files - {"cli.py", "errors.py"}) <= named, package
        gone = {name for name in named if name.endswith(("/", ".py"))}
        assert [name for name in gone if not list((ROOT / package).rglob(name))] == []
