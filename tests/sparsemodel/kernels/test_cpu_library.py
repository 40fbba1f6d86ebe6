"""Loading of the native library: lazy, switchable, and never fatal."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sparsemodel.errors import NativeLibraryWarning, SparseModelError
from sparsemodel.kernels.cpu import library as cpu

needs_library = pytest.mark.skipif(
    cpu.library_path() is None,
    reason="the native library is not built; `pip install -e .` with a C++ compiler builds it",
)


@pytest.fixture
def _fresh() -> Iterator[None]:
    """Loading starts anew in the test, and again after it."""
    cpu.library.cache_clear()
    yield
    cpu.library.cache_clear()


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@needs_library
def test_import_loads_nothing_and_needs_no_torch() -> None:
    code = (
        "import sys, sparsemodel.kernels.cpu.library as cpu;"
        "maps = lambda: 'sparse_cpu' in open('/proc/self/maps').read();"
        "before = maps(); cpu.isa(); print(before, maps(), 'torch' in sys.modules)"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc to see what is loaded")
    assert run(code) == "False True False"


@needs_library
def test_the_environment_chooses_the_instruction_set() -> None:
    code = "import sparsemodel.kernels.cpu.library as cpu; print(cpu.isa())"
    assert run(code, **{cpu.ENVIRONMENT: "scalar"}) == "scalar"
    assert run(code, **{cpu.ENVIRONMENT: "off"}) == "None"


@needs_library
@pytest.mark.usefixtures("_fresh")
def test_an_unknown_instruction_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.ENVIRONMENT, "mmx")
    with pytest.raises(SparseModelError, match="mmx"):
        cpu.library()


@pytest.mark.usefixtures("_fresh")
def test_without_a_library_one_warning_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cpu.ENVIRONMENT, raising=False)
    monkeypatch.setattr(cpu, "library_path", lambda: None)
    with pytest.warns(NativeLibraryWarning, match="not installed"):
        assert cpu.library() is None
    assert cpu.library() is None  # a second warning would be an error
    assert cpu.isa() is None


@pytest.mark.usefixtures("_fresh")
def test_a_damaged_library_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(cpu.ENVIRONMENT, raising=False)
    damaged = tmp_path / "libsparse_cpu.so"
    damaged.write_bytes(b"not a library")
    monkeypatch.setattr(cpu, "library_path", lambda: damaged)
    with pytest.warns(NativeLibraryWarning):
        assert cpu.library() is None


def _linear(lib: cpu.CpuLibrary, seed: int, threads: int) -> np.ndarray:
    """The output of a linear layer of all weights, large enough for two threads."""
    rng = np.random.default_rng(seed)
    g = cpu.Geometry.linear(128, 200, 100)
    row_ptr = np.arange(0, 20001, 200, dtype=np.int32)
    cols = np.tile(np.arange(200, dtype=np.int32), 100)
    values = rng.standard_normal(20000).astype(np.float32)
    x, y = rng.standard_normal((200, 128)).astype(np.float32), np.empty((100, 128), np.float32)
    lib.conv_forward(g, row_ptr, cols, values, None, x, y, threads)
    return y


@needs_library
def test_calls_from_many_threads_do_not_mix() -> None:
    lib = cpu.library()
    assert lib is not None
    expected = [_linear(lib, seed, 1) for seed in range(4)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(50):
            if not np.array_equal(_linear(lib, seed, 2), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


FORKING = """
import os, numpy as np, sparsemodel.kernels.cpu.library as cpu
lib = cpu.library(); g = cpu.Geometry.linear(256, 300, 300)
rows = np.arange(0, 90001, 300, dtype=np.int32)
cols = np.tile(np.arange(300, dtype=np.int32), 300)
v, x = np.ones(90000, np.float32), np.ones((300, 256), np.float32)
def call():
    y = np.zeros((300, 256), np.float32)
    lib.conv_forward(g, rows, cols, v, None, x, y, 2)
    assert (y == 300).all()
{before}
child = os.fork()
if child == 0:
    call(); os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])); call()
"""


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "before",
    [
        "call()",
        # Workers of torch's OpenMP, which a child cannot use, and our first call is the child's.
        "import torch; torch.set_num_threads(2); torch.ones(600, 600) @ torch.ones(600, 600)",
        "import torch; torch.set_num_threads(2); call()",
    ],
    ids=["ours", "torch's", "ours by torch's"],
)
def test_a_forked_child_has_workers_of_its_own(before: str) -> None:
    assert run(FORKING.format(before=before)) == "7"


@needs_library
def test_scratch_memory_can_be_released_between_calls() -> None:
    lib = cpu.library()
    assert lib is not None
    before = _linear(lib, 0, 2)
    lib.release_scratch()
    np.testing.assert_array_equal(_linear(lib, 0, 2), before)
