"""Scores of training dynamics on traces worked by hand, and the recorder behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from datapruning.errors import ScoreError
from datapruning.scores.dynamics import (
    Recorder,
    aum,
    confidence,
    dual,
    dyn_unc,
    forgetting,
    tdds,
)
from prunelab.data.samples import ImageSamples
from prunelab.data.tensors import prepare
from prunelab.networks import build_model
from prunelab.training.loop import TrainingConfig, train
from prunelab.training.task import ImageClassification


def logits_of(probability: float, num_classes: int = 2) -> list[float]:
    """Logits whose softmax gives class 0 this probability and shares the rest evenly."""
    rest = (1 - probability) / (num_classes - 1)
    return [math.log(probability), *[math.log(rest)] * (num_classes - 1)]


def recorded(traces: Sequence[Sequence[float]]) -> Recorder:
    """A recorder of two-class samples labelled 0, with these probabilities by epoch."""
    recorder = Recorder(len(traces))
    for epoch, column in enumerate(zip(*traces, strict=True)):
        logits = torch.tensor([logits_of(p) for p in column])
        recorder.record(epoch, torch.arange(len(traces)), logits, torch.zeros(len(traces)).long())
    return recorder


def random_logits(num_epochs: int, num_samples: int, num_classes: int, *, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(num_epochs, num_samples, num_classes, generator=random)


def record_all(logits: Tensor, labels: Tensor) -> Recorder:
    recorder = Recorder(len(labels))
    for epoch, values in enumerate(logits):
        recorder.record(epoch, torch.arange(len(labels)), values, labels)
    return recorder


def test_forgetting_by_hand() -> None:
    """Right (p > .5) by epoch: 10110 forgets twice, 01111 never, 11110 once; 00000 was never
    learned and counts 5, the number of epochs, above all others."""
    recorder = recorded(
        [
            [0.9, 0.1, 0.9, 0.9, 0.1],
            [0.1, 0.9, 0.9, 0.9, 0.9],
            [0.9, 0.9, 0.9, 0.9, 0.1],
            [0.1, 0.2, 0.3, 0.4, 0.1],
        ]
    )
    assert forgetting(recorder).tolist() == [2, 0, 1, 5]


def test_aum_by_hand() -> None:
    """p_y = .8, .6, .1 in two classes: margins .6, .2, −.8, their mean 0, though the last alone
    is −.8; logits: log(4), log(1.5), log(1/9), mean −.1352. High is hard: the sign is turned."""
    recorder = recorded([[0.8, 0.6, 0.1], [0.9, 0.9, 0.9]])
    torch.testing.assert_close(
        aum(recorder, margin="probability"), torch.tensor([0.0, -0.8]).double(), atol=1e-6, rtol=0
    )
    by_logit = aum(recorder)
    assert by_logit[0] == pytest.approx(-(math.log(4) + math.log(1.5) - math.log(9)) / 3, abs=1e-6)
    assert by_logit[1] == pytest.approx(-math.log(9), abs=1e-6)
    with pytest.raises(ScoreError, match="expected logit or probability, got 'loss'"):
        aum(recorder, margin="loss")


def test_dyn_unc_by_hand() -> None:
    """J = 2, p_y = .1, .3, .3: windows deviate by .2/√2 and 0, so (.1414 + 0) / 2 = .0707."""
    recorder = recorded([[0.1, 0.3, 0.3], [0.5, 0.5, 0.5]])
    expected = torch.tensor([0.2 / math.sqrt(2) / 2, 0.0]).double()
    torch.testing.assert_close(dyn_unc(recorder, window=2), expected, atol=1e-7, rtol=0)


def test_dual_by_hand() -> None:
    """J = 2, p_y = .1, .3, .3: window means .2 and .3, so (.8 · .1414 + .7 · 0) / 2 = .0566. A
    product of means over all epochs would be (1 − .2333) · .0707 = .0542. T = 2: .8 · .1414."""
    recorder = recorded([[0.1, 0.3, 0.3]])
    deviation = 0.2 / math.sqrt(2)
    assert dual(recorder, window=2, epochs=None).item() == pytest.approx(0.4 * deviation, abs=1e-7)
    assert dual(recorder, window=2, epochs=2).item() == pytest.approx(0.8 * deviation, abs=1e-7)


def test_confidence_by_hand() -> None:
    """Means of .1, .3, .3 and .9: over three epochs 7/30, over all of them .4; unseen: NaN."""
    recorder = recorded([[0.1, 0.3, 0.3, 0.9]])
    assert confidence(recorder, epochs=3).item() == pytest.approx(0.7 / 3, abs=1e-7)
    assert confidence(recorder).item() == pytest.approx(0.4, abs=1e-7)


def test_tdds_by_hand() -> None:
    """p_0 = .5, .5, .2, .2 (p_1 the rest): d = 0, .2 log(2.5) + .8 log(1.6) = .5593, 0.

    J = 3: both windows hold 0 and .5593, whose deviations ∓.2796 have norm .3955. β = .9:
    .9 · .3955 · (.1 + 1) = .3915. A steady sample scores 0.
    """
    change = 0.2 * math.log(2.5) + 0.8 * math.log(1.6)
    recorder = recorded([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.3, 0.3]])
    torch.testing.assert_close(
        recorder.table("change")[1:, 0], torch.tensor([0, change, 0]), atol=1e-6, rtol=0
    )
    expected = torch.tensor([0.9 * (change / math.sqrt(2)) * 1.1, 0.0]).double()
    torch.testing.assert_close(tdds(recorder, window=3), expected, atol=1e-6, rtol=0)


def test_tdds_windows_move_and_later_ones_count_more() -> None:
    """One jump early, one jump late: the late one is worth 1 / (1 − β) times as much a window."""
    recorder = recorded([[0.2, 0.8, 0.8, 0.8, 0.8], [0.8, 0.8, 0.8, 0.8, 0.2]])
    jump_up = 0.8 * math.log(4) + 0.2 * math.log(4)
    jump_down = 0.2 * math.log(4) + 0.8 * math.log(4)
    # Windows of 3 epochs: the early jump is in k = 0 alone, the late one in k = 2 alone.
    found = tdds(recorder, window=3, decay=0.9)
    assert found[0].item() == pytest.approx(0.9 * 0.01 * jump_up / math.sqrt(2), rel=1e-5)
    assert found[1].item() == pytest.approx(0.9 * jump_down / math.sqrt(2), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(3, 8), st.integers(2, 5), st.integers(3, 5))
def test_equal_a_plain_loop_in_float64(
    seed: int, num_epochs: int, num_classes: int, window: int
) -> None:
    """Every score again, one sample, epoch and class at a time, from the whole cube of logits."""
    window = min(window, num_epochs)
    logits = random_logits(num_epochs, 6, num_classes, seed=seed)
    labels = torch.randint(num_classes, (6,), generator=torch.Generator().manual_seed(seed))
    recorder = record_all(logits, labels)
    p = logits.double().softmax(2).tolist()
    expected = [
        plain_scores([p[t][i] for t in range(num_epochs)], logits[:, i].tolist(), y, window)
        for i, y in enumerate(labels.tolist())
    ]
    found = {
        "forgetting": forgetting(recorder),
        "aum": aum(recorder),
        "aum of p": aum(recorder, margin="probability"),
        "dyn_unc": dyn_unc(recorder, window=window),
        "dual": dual(recorder, window=window, epochs=None),
        "tdds": tdds(recorder, window=window, decay=0.8),
    }
    for name, scores in found.items():
        wanted = torch.tensor([scores_of_i[name] for scores_of_i in expected]).double()
        torch.testing.assert_close(scores, wanted, atol=1e-4, rtol=1e-4, msg=name)


def plain_scores(
    p: list[list[float]], z: list[list[float]], y: int, window: int
) -> dict[str, float]:
    """The scores of one sample from its probabilities and logits, [epochs][classes]."""
    epochs = range(len(p))
    others = [c for c in range(len(p[0])) if c != y]
    p_y = [p[t][y] for t in epochs]
    margins = [p_y[t] - max(p[t][c] for c in others) for t in epochs]
    right = [margin > 0 for margin in margins]
    windows = range(len(p) - window + 1)
    stds = [_std(p_y[k : k + window]) for k in windows]
    changes = [
        sum(abs(b * (math.log(b) - math.log(a))) for a, b in zip(p[t], p[t + 1], strict=True))
        for t in epochs[:-1]
    ]
    tdds_sum = 0.0
    for k in windows:
        inside = changes[k : k + window - 1]
        norm = math.sqrt(sum((change - _mean(inside)) ** 2 for change in inside))
        tdds_sum += 0.8 * 0.2 ** (len(p) - window - k) * norm
    events = sum(right[t] and not right[t + 1] for t in epochs[:-1])
    return {
        "forgetting": events if any(right) else len(p),
        "aum": -_mean([z[t][y] - max(z[t][c] for c in others) for t in epochs]),
        "aum of p": -_mean(margins),
        "dyn_unc": _mean(stds),
        "dual": _mean([(1 - _mean(p_y[k : k + window])) * stds[k] for k in windows]),
        "tdds": tdds_sum,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _std(values: Sequence[float]) -> float:
    return math.sqrt(sum((v - _mean(values)) ** 2 for v in values) / (len(values) - 1))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(0, 100))
def test_batches_and_their_order_do_not_matter(batch_size: int, seed: int) -> None:
    logits, labels = random_logits(4, 9, 3, seed=seed), torch.arange(9) % 3
    expected, found = record_all(logits, labels), Recorder(9)
    random = torch.Generator().manual_seed(seed)
    for epoch in range(4):
        for rows in torch.randperm(9, generator=random).split(batch_size):
            found.record(epoch, rows, logits[epoch, rows], labels[rows])
    for score in (forgetting, aum, lambda r: tdds(r, window=3), lambda r: dyn_unc(r, window=2)):
        assert torch.equal(score(found), score(expected))


def test_a_training_run_fills_the_recorder() -> None:
    """What it holds of the first epoch of one batch is the untouched model's, in train mode."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 1, 8, 8), generator=random, dtype=torch.uint8)
    samples = ImageSamples(images, torch.arange(12) % 3)
    model = build_model("resnet8", num_classes=3, input_shape=(1, 8, 8), seed=0, width=2)
    with torch.no_grad():
        expected = model.train()(prepare(images[:8])).softmax(1)[
            torch.arange(8), samples.labels[:8]
        ]
    model = build_model("resnet8", num_classes=3, input_shape=(1, 8, 8), seed=0, width=2)
    recorder = Recorder(12)
    config = TrainingConfig(epochs=3, batch_size=8, lr=0.05)
    rows = torch.arange(8)
    train(
        model, samples, ImageClassification(),
        config=config, seed=0, rows=rows, callbacks=[recorder],
    )  # fmt: skip
    torch.testing.assert_close(recorder.table("probability")[0, :8], expected)
    scores = dyn_unc(recorder, window=2)
    assert scores.dtype == torch.float64
    assert bool(scores[:8].isfinite().all())
    assert bool(scores[8:].isnan().all())  # never trained on


def test_a_run_cut_off_and_resumed_records_the_same(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 1, 8, 8), generator=random, dtype=torch.uint8)
    samples = ImageSamples(images, torch.arange(12) % 3)

    class Dies(Recorder):
        def on_epoch(self, epoch: int, model: nn.Module) -> None:
            if epoch == 2:
                raise KeyboardInterrupt
            super().on_epoch(epoch, model)

    def run(recorder: Recorder, name: str) -> Recorder:
        model = build_model("resnet8", num_classes=3, input_shape=(1, 8, 8), seed=0, width=2)
        config = TrainingConfig(epochs=4, batch_size=8, lr=0.05)
        train(
            model, samples, ImageClassification(),
            config=config, seed=0, callbacks=[recorder], checkpoint=tmp_path / name,
        )  # fmt: skip
        return recorder

    whole = run(Recorder(12), "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Dies(12), "cut")
    resumed = run(Recorder(12), "cut")
    for name in ("probability", "margin_logit", "correct", "el2n", "change"):
        a, b = whole.table(name), resumed.table(name)
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)), name
    with pytest.raises(ScoreError, match="state is of 12 samples"):
        Recorder(11).load_state_dict(whole.state_dict())


def test_a_last_epoch_cut_short_is_left_out() -> None:
    logits, labels = random_logits(4, 6, 3, seed=0), torch.arange(6) % 3
    whole, cut = record_all(logits[:3], labels), record_all(logits[:3], labels)
    cut.record(3, torch.tensor([2, 5]), logits[3, [2, 5]], labels[[2, 5]])
    for score in (forgetting, aum, lambda r: tdds(r, window=3)):
        assert torch.equal(score(cut), score(whole))


def test_epochs_of_different_samples_are_refused() -> None:
    logits, labels = random_logits(3, 6, 3, seed=0), torch.arange(6) % 3
    recorder = Recorder(6)
    for epoch, rows in enumerate(([0, 1, 2], [3, 4, 5])):
        recorder.record(epoch, torch.tensor(rows), logits[epoch, rows], labels[rows])
    with pytest.raises(ScoreError, match="epochs have different samples"):
        forgetting(recorder)


def test_refusals() -> None:
    recorder = recorded([[0.5, 0.5, 0.5]])
    with pytest.raises(ScoreError, match="a window of 10 epochs needs as many, and 3"):
        dyn_unc(recorder)
    with pytest.raises(ScoreError, match="epochs 0 to 29 are wanted, and 3 were recorded in full"):
        dual(recorder)
    with pytest.raises(ScoreError, match="window must be at least 3"):
        tdds(recorder, window=2)
    with pytest.raises(ScoreError, match="decay must be in"):
        tdds(recorder, window=3, decay=0)
    with pytest.raises(ScoreError, match="nothing has been recorded"):
        forgetting(Recorder(3))
    plain = Recorder(1, changes=False)
    row, label = torch.tensor([0]), torch.tensor([1])
    for epoch in range(3):
        plain.record(epoch, row, torch.zeros(1, 2), label)
    with pytest.raises(ScoreError, match=r"no 'change'.*Recorder\(changes=True\)"):
        tdds(plain, window=3)
    plain.on_epoch(2, nn.Identity())
    for epoch in (0, 1, 4):
        with pytest.raises(ScoreError, match=f"epoch {epoch} follows after 3"):
            plain.record(epoch, row, torch.zeros(1, 2), label)
    plain.record(3, row, torch.zeros(1, 2), label)
    with pytest.raises(ScoreError, match="recorded twice in epoch 3"):
        plain.record(3, row, torch.zeros(1, 2), label)
    with pytest.raises(ScoreError, match="rows run from 1 to 1; the recorder has 1"):
        plain.record(4, torch.tensor([1]), torch.zeros(1, 2), label)
    with pytest.raises(ScoreError, match="of two classes or more"):
        plain.record(4, row, torch.zeros(1, 1), label)
    with pytest.raises(ScoreError, match="one sample or more"):
        Recorder(0)


def test_memory_does_not_grow_with_classes_and_epochs() -> None:
    """Ten epochs of 50 samples and 40 classes: 21 bytes a sample and epoch, and one [50, 40]."""
    logits, labels = random_logits(10, 50, 40, seed=0), torch.arange(50) % 40
    state = record_all(logits, labels).state_dict()
    held = sum(c.numel() * c.element_size() for cs in state["columns"].values() for c in cs)
    assert held == 21 * 50 * 10
    assert state["log_p"].shape == (50, 40)
