"""The benchmark of structured layers: its cases agree with dense torch; no GPU is said so."""

import sys

import pytest
import torch

from benchmarks import cuda_structured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_cases_compute_what_dense_torch_does(
    dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    names = set()
    for case in cuda_structured.cases(64, 8, dtype, (16, 32)):
        cuda_structured.compare(case, dtype)
        assert cuda_structured.DENSE in cuda_structured.working(case)
        names.add(case.name)
    assert len(names) == 6
    assert "left out torch BSR" in capsys.readouterr().err or dtype == torch.float32


def test_wrong_results_are_not_timed() -> None:
    case = next(cuda_structured.cases(64, 8, torch.float32, (16,)))
    wrong = cuda_structured.Case(case.name, case.density, lambda: case.ours() + 1, case.peers)
    with pytest.raises(SystemExit, match="differ; nothing was timed"):
        cuda_structured.compare(wrong, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cuda_structured", "--json"])
    with pytest.raises(SystemExit, match="no NVIDIA GPU"):
        cuda_structured.main()
