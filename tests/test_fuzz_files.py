"""Damaged files of runs are refused, all kinds of them; `benchmarks.fuzz_files` tries many more."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from benchmarks import fuzz_files
from benchmarks.fuzz_files import DAMAGE, KINDS, Sound, digest_of, fuzz_chunk, make_worlds

DAMAGES = 8


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds")
    make_worlds(folder)
    return folder


@pytest.mark.slow
def test_damaged_files_are_refused_or_say_what_was_written(worlds: Path) -> None:
    for number, kind in enumerate(KINDS):
        tally, crashes = fuzz_chunk(worlds, number, seed=1, chunk=0, count=DAMAGES)
        assert crashes == [], kind.file
        assert tally.total() == DAMAGES


@pytest.mark.slow
def test_the_fuzzer_sees_what_is_not_refused(worlds: Path, tmp_path: Path) -> None:
    """A reader without checks: other content is a crash, and so is another error."""
    kind = fuzz_files.Kind("cell.json", lambda world: (world / "cell.json").read_text()[60:])
    world = tmp_path / "0"
    shutil.copytree(worlds / "0", world)
    whole = digest_of(kind.read(world))
    (world / "cell.json").write_text((world / "cell.json").read_text() + " ")
    assert fuzz_files.outcome_of(kind, world, whole) == ("crashes", "something else was read")
    (world / "cell.json").write_bytes(b"\xff")
    assert fuzz_files.outcome_of(kind, world, whole)[1].startswith("UnicodeDecodeError")


def test_every_damage_changes_something() -> None:
    chance, sound = random.Random(0), Sound(b"of another run\n", [b"of another kind"])
    data = b"some lines\nof a file\n"
    for name, damage in DAMAGE.items():
        changed = sum(damage(data, chance, sound) != data for _ in range(50))
        assert changed > 40, name
