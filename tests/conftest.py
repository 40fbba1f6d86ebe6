"""How the tests share a machine: workers of one thread, slow files first, Ray alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

settings.register_profile("long")  # --hypothesis-profile=long: a hundred times as many hostile runs

_WORKER = os.environ.get("PYTEST_XDIST_WORKER")

if _WORKER is not None:
    # Workers fill the cores already: more threads would only wait for each other. Set before
    # torch is imported, and handed down to the processes that tests start.
    for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(_name, "1")


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: tests of processes and servers wait a third of their time."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a slow case come first: a worker that starts one last makes the others wait."""
    slow = {i.path for i in items if i.get_closest_marker("slow") or i.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder that all workers of this session see."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if _WORKER is None else base.parent) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def _one_ray_at_a_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ray takes every core and much memory: its tests take turns."""
    if request.node.get_closest_marker("ray") is None:
        yield
        return
    with FileLock(request.getfixturevalue("shared_folder") / "ray.lock"):
        yield
