"""The benchmarks of the CUDA kernels, on kernels run on the host: what they time agrees first."""

import pytest
import torch

from benchmarks import cuda_kernels, gpu_choice
from benchmarks.cuda_kernels import Sizes
from sparsemodel.kernels.cuda import launch as kernels
from sparsemodel.kernels.cuda.launch import Runner
from sparsemodel.kernels.cuda.measured import Timed

SMALL = Sizes(entries=1000, width=48, batch=24, tokens=4, vocabulary=50, rows=6)


@pytest.fixture(autouse=True)
def _on_the_host(cuda: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(False)  # which some of torch's sparse products refuse
    monkeypatch.setattr(kernels, "runner", lambda device: cuda)
    monkeypatch.setattr(torch, "compile", lambda function: function)


def test_every_case_computes_what_its_peers_do() -> None:
    names = []
    for case in cuda_kernels.cases(torch.device("cpu"), SMALL, (0.1,)):
        cuda_kernels.compare(case)
        case.ours()
        names.append(case.name)
    assert len(names) == len(set(names)) == 11


def test_wrong_results_are_not_timed() -> None:
    case = next(cuda_kernels.linear_cases(SMALL, 0.1))
    wrong = cuda_kernels.Case(case.name, 0.1, lambda: case.ours() + 1, case.peers, 1)
    with pytest.raises(SystemExit, match="nothing was timed"):
        cuda_kernels.compare(wrong)


def test_the_table_has_a_row_for_every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_choice, "DENSITIES", (0.1,))
    timed = {"ours": 1.23456, "dense": 98.7654}
    monkeypatch.setattr(gpu_choice, "milliseconds", lambda calls, rounds: timed)
    found = list(gpu_choice.rows(((64, 64),), 1))
    assert [row.operator for row in found] == list(gpu_choice.OPERATORS.values())
    assert found[0] == Timed("forward", 64, 64, 0.1, 1.23, 98.8)
