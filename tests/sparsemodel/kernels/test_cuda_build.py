"""Compiling the CUDA kernels without a GPU, the folder of compiled ones, and what is refused."""

import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparsemodel.errors import NativeLibraryWarning, SparseModelError
from sparsemodel.kernels.cuda import build as cuda_build
from sparsemodel.kernels.cuda import launch as cuda
from sparsemodel.kernels.cuda import measured
from sparsemodel.kernels.cuda import source as cuda_source


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cuda_build.ENVIRONMENT, str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def compiler() -> None:
    """Skips where kernels cannot be compiled, and says what would change that."""
    why = cuda.obstacle()
    if why is not None:
        pytest.skip(why)


def has_types(family: str) -> bool:
    return "REAL_BFLOAT16" in cuda_source.source(family)


FAMILIES = sorted(path.stem for path in cuda_source.FOLDER.glob("*.cu"))
CASES = [
    (family, real)
    for family in FAMILIES
    for real in (cuda_source.REALS if has_types(family) else [torch.float32])
]


@pytest.mark.usefixtures("compiler", "cache")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("family", "real"), CASES)
def test_kernels_compile_and_are_all_there(family: str, real: torch.dtype, arch: str) -> None:
    binary = cuda_build.compiled(family, real, arch)
    assert binary[:4] == b"\x7fELF"
    for kernel in cuda_source.kernels(family):
        assert f".text.{kernel}\0".encode() in binary


def test_the_table_of_kernels_misses_none() -> None:
    for family in FAMILIES:
        written = re.findall(r"^KERNEL\b", cuda_source.source(family), re.MULTILINE)
        assert len(cuda_source.kernels(family)) == len(written) > 0


def test_kernels_run_in_blocks_of_the_size_they_are_written_for() -> None:
    assert f"#define BLOCK {cuda_source.BLOCK} " in cuda_source.source("arrays")


def test_an_argument_that_does_not_fit_is_refused() -> None:
    call = [None, None, None, 1, 0.1, 0.9, 0.0]
    cuda_source.arguments("arrays", "sgd_step", call)
    with pytest.raises(AssertionError, match="takes 7 arguments"):
        cuda_source.arguments("arrays", "sgd_step", call[:-1])
    with pytest.raises(AssertionError, match="n is a number"):
        cuda_source.arguments("arrays", "sgd_step", [None, None, None, None, *call[4:]])
    with pytest.raises(AssertionError, match="values is a pointer"):
        cuda_source.arguments("arrays", "sgd_step", [1, *call[1:]])


def test_a_size_that_does_not_fit_is_refused_and_not_wrapped() -> None:
    call = [None, None, None, None, None, None, None]
    cuda_source.arguments("linear", "spmm", [*call, 1, 2**31 - 1])
    with pytest.raises(SparseModelError, match="batch = 2,147,483,648 is too large"):
        cuda_source.arguments("linear", "spmm", [*call, 1, 2**31])


@pytest.mark.usefixtures("compiler")
def test_a_second_call_reads_and_a_damaged_entry_is_compiled_again(cache: Path) -> None:
    first = cuda_build.compiled("arrays", torch.float32, "sm_80")
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-1])
    assert cuda_build.read_entry(entry) is None
    assert cuda_build.compiled("arrays", torch.float32, "sm_80") == first
    assert [path.read_bytes() for path in cache.iterdir()] == [whole]
    content = b"another"
    cuda_build.write_entry(entry, content)
    assert cuda_build.compiled("arrays", torch.float32, "sm_80") == content


@pytest.mark.usefixtures("compiler")
def test_entries_differ_by_architecture_and_type(cache: Path) -> None:
    cuda_build.compiled("arrays", torch.float32, "sm_80")
    cuda_build.compiled("arrays", torch.float32, "sm_90")
    cuda_build.compiled("arrays", torch.float16, "sm_80")
    assert len(list(cache.iterdir())) == 3


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cuda_build.write_entry(tmp_path / "file" / "entry", b"content")
    assert cuda_build.read_entry(tmp_path / "file" / "entry") is None


@pytest.fixture
def _unknown() -> Iterator[None]:
    """What is known of this machine's GPUs is forgotten, before and after."""
    for kept in (cuda._loaded, cuda._warn_once):
        kept.cache_clear()
    yield
    for kept in (cuda._loaded, cuda._warn_once):
        kept.cache_clear()


def test_kernels_are_used_where_they_run_unless_they_are_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = object()
    monkeypatch.setattr(cuda, "_loaded", lambda index: made)
    monkeypatch.delenv(cuda.ENVIRONMENT, raising=False)
    assert cuda.runner(torch.device("cuda", 0)) is made
    monkeypatch.setenv(cuda.ENVIRONMENT, "off")
    assert cuda.runner(torch.device("cuda", 0)) is None


def test_no_kernels_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda.ENVIRONMENT, "on")
    assert cuda.runner(torch.device("cpu")) is None


@pytest.mark.usefixtures("_unknown")
def test_without_cuda_core_there_is_one_warning_with_the_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(cuda.ENVIRONMENT, "on")
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.warns(NativeLibraryWarning, match=r"fedprune\[cuda\]"):
        assert cuda.runner(torch.device("cuda", 0)) is None
    assert cuda.runner(torch.device("cuda", 0)) is None  # a second warning would be an error


@pytest.mark.usefixtures("_unknown")
def test_kernels_that_nobody_asked_for_are_missed_in_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(cuda.ENVIRONMENT, raising=False)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda.runner(torch.device("cuda", 0)) is None


@pytest.mark.usefixtures("compiler", "_unknown")
def test_without_a_gpu_there_is_one_warning_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    monkeypatch.setenv(cuda.ENVIRONMENT, "on")
    with pytest.warns(NativeLibraryWarning, match="do not load on cuda:0"):
        assert cuda.runner(torch.device("cuda")) is None
    assert cuda.runner(torch.device("cuda", 0)) is None


@pytest.mark.usefixtures("_unknown")
def test_a_line_says_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    assert cuda.in_use(torch.device("cpu")) == ""
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert re.match(r"plain torch on cuda:0 \(.*fedprune\[cuda\]", cuda.in_use(device))
    monkeypatch.setenv(cuda.ENVIRONMENT, "off")
    assert cuda.in_use(device) == "plain torch on cuda:0 (SPARSEMODEL_CUDA=off)"
    monkeypatch.setenv(cuda.ENVIRONMENT, "on")
    monkeypatch.setattr(cuda, "_loaded", lambda index: object())
    monkeypatch.setattr(measured, "gpu_of", lambda device: measured.MEASURED[0])
    for name, rule in (("NVIDIA H200", "its own measurements"),
                       ("NVIDIA A100", "measurements of an NVIDIA H200")):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index, name=name: name)
        assert cuda.in_use(device) == f"CUDA kernels on cuda:0 ({name}), chosen by {rule}"


def test_importing_the_kernels_imports_no_binding() -> None:
    code = "import sys, sparsemodel.kernels.cuda.launch; print('cuda.core' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
