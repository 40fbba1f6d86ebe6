"""The table by which a GPU chooses: no layer smaller or denser than one where kernels won."""

import pytest
import torch

from sparsemodel.kernels.cuda import measured
from sparsemodel.kernels.cuda.measured import Gpu, Timed, nearest, sparse_is_faster
from sparsemodel.layers.linear_and_conv import SparseConv2d, SparseLinear

WIDTH, ROWS = 4096, 8192
X = torch.zeros(1)


def wins(
    operator: measured.Operator,
    density: float,
    *,
    width: int = WIDTH,
    rows: int | None = ROWS,
    x: torch.Tensor = X,
) -> bool:
    nnz = round(density * width**2)
    return sparse_is_faster(operator, x, weights=width**2, nnz=nnz, rows=rows)


@pytest.mark.parametrize(
    ("operator", "most"),
    [
        ("forward", 0.1),
        ("input gradient", 0.1),
        ("gradient at the mask", 0.05),
        ("norms", 0.05),
        ("norms of sequences", 0.05),
    ],
)
def test_the_densest_layer_of_an_h200_at_which_each_operator_won(
    operator: measured.Operator, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """9.4 ms against 5.4 for the gradient at 0.1; 4.4 against 5.4 for the forward product."""
    monkeypatch.setattr(measured, "gpu_of", lambda device: measured.MEASURED[0])
    assert wins(operator, 0.001)
    assert wins(operator, most)
    assert not wins(operator, most + 0.01)


def test_smaller_layers_and_batches_are_dense() -> None:
    assert wins("forward", 0.01, width=2 * WIDTH, rows=2 * ROWS)
    assert wins("forward", 0.01, rows=None)
    assert not wins("forward", 0.01, width=WIDTH // 2)
    assert not wins("forward", 0.01, rows=ROWS - 1)


def test_tensor_cores_are_never_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not wins("forward", 0.01, x=X.bfloat16())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert not wins("forward", 0.01)
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_device_without_rows_goes_by_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = Gpu("old", (8, 0), ()), Gpu("new", (9, 0), (Timed("norms", 1, 1, 0.1, 1, 2),))
    monkeypatch.setattr(measured, "MEASURED", (old, new))
    assert nearest("other", (7, 5)) is old
    assert nearest("other", (10, 0)) is new
    assert nearest("old", (9, 0)) is old


def test_layers_train_sparse_only_where_both_products_won(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse forward 1 ms against 2, for the input's gradient 3 against 2; convolutions never."""
    rows = (Timed("forward", 2, 5, 0.5, 1, 2), Timed("input gradient", 2, 5, 0.5, 3, 2))
    monkeypatch.setattr(measured, "gpu_of", lambda device: Gpu("any", (9, 0), rows))
    linear = SparseLinear(4, 4, torch.eye(4, dtype=torch.bool))
    assert linear._won_on_gpu(4, 5, training=False)
    assert not linear._won_on_gpu(4, 4, training=False)
    assert not linear._won_on_gpu(4, 5, training=True)
    conv = SparseConv2d(4, 4, 1, torch.eye(4, dtype=torch.bool)[..., None, None])
    assert not conv._won_on_gpu(4, 5, training=False)
