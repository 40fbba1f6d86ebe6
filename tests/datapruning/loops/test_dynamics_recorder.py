"""`DynamicsRecorder` in real runs of transformers' Trainer and of Lightning's.

What it tells is compared with what a second witness computes: the loss function of the run notes
ids and logits itself, and margins, rights and wrongs are counted from those by numpy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset
from training_loops import lightning_module, lightning_trainer, loader, texts, tiny_bert, trainer

import datapruning
from datapruning.errors import ScoreError
from prunelab.errors import DataError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`:UserWarning"),
]


class Witness:
    """Logits and label of each sample in each epoch, by its id."""

    def __init__(self) -> None:
        self.seen: dict[int, list[tuple[np.ndarray[Any, Any], int]]] = defaultdict(list)

    def note(self, ids: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        for name, row, label in zip(ids.tolist(), logits.detach(), labels.tolist(), strict=True):
            self.seen[name].append((row.float().numpy().astype(np.float64), label))

    def aum(self, name: int) -> float:
        """Minus the mean margin."""
        margins = [z[label] - np.delete(z, label).max() for z, label in self.seen[name]]
        return -float(np.mean(margins))

    def forgetting(self, name: int) -> float:
        right = [int(z.argmax()) == label for z, label in self.seen[name]]
        if not any(right):
            return len(right)
        return sum(before and not after for before, after in pairwise(right))

    def check(self, recorder: datapruning.DynamicsRecorder, *, epochs: int) -> None:
        assert {len(rows) for rows in self.seen.values()} == {epochs}
        for method in ("aum", "forgetting"):
            table = recorder.table(method)
            expected = [getattr(self, method)(name) for name in table.ids.tolist()]
            assert table.scores.tolist() == pytest.approx(expected, abs=1e-5)
            assert table.labels is not None
            assert table.labels.tolist() == [self.seen[n][0][1] for n in table.ids.tolist()]
            assert table.confidence is not None


def watched(witness: Witness, made: Any) -> Any:
    """A Trainer whose loss tells the witness; evaluation does not come by there."""
    plain = made.compute_loss

    def compute_loss(
        model: nn.Module, inputs: Any, *, return_outputs: bool = False, **_: Any
    ) -> Any:
        ids, labels, is_training = inputs["id"], inputs["labels"], model.training
        loss, outputs = plain(model, inputs, return_outputs=True)
        if is_training:
            witness.note(ids, outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss

    made.compute_loss = compute_loss
    return made


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_strategy": "steps", "eval_steps": 1, "gradient_accumulation_steps": 4},
        {"dataloader_num_workers": 2, "bf16": True, "num_train_epochs": 3},
        {"label_smoothing_factor": 0.1, "learning_rate": 0.05},
    ],
)
def test_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    """22 texts in batches of 4: the last has 2; evaluations in between are not recorded."""
    data, witness = texts(), Witness()
    columns = {name: torch.tensor([text[name] for text in data]) for name in data[0]}
    given: Any = data
    if "label_smoothing_factor" in settings:  # keeps the labels from the model
        given = datapruning.TokenSamples(
            columns["input_ids"], columns["attention_mask"], columns["labels"],
            ids=torch.arange(22) * 3 + 100,
        )  # fmt: skip
    recorder = datapruning.DynamicsRecorder(given)
    run = watched(
        witness,
        trainer(
            tiny_bert(), datapruning.indexed(given), tmp_path, callbacks=[recorder],
            remove_unused_columns=False, **settings,
        ),
    )  # fmt: skip
    run.eval_dataset = datapruning.indexed(data)
    run.train()
    witness.check(recorder, epochs=settings.get("num_train_epochs", 2))
    assert np.isfinite(run.evaluate()["eval_loss"])  # data with ids, after the training too
    kept = recorder.table("aum").select(keep=0.5)
    assert kept.of(given)[0]["labels"] == data[kept.of(given).indices[0]]["labels"]


def test_hugging_face_columns_and_pictures(tmp_path: Path) -> None:
    """A `datasets.Dataset` of images, a network of one's own that returns a mapping."""
    import datasets  # noqa: PLC0415

    drawn = torch.Generator().manual_seed(0)
    images, labels = torch.rand(10, 4, 4, generator=drawn), torch.arange(10) % 3
    data = datasets.Dataset.from_dict({"x": images.tolist(), "labels": labels.tolist()})

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
            from transformers.modeling_outputs import SequenceClassifierOutput  # noqa: PLC0415

            logits = self.last(x.flatten(1))
            loss = functional.cross_entropy(logits, labels)
            return SequenceClassifierOutput(loss=loss, logits=logits)

    recorder, witness = datapruning.DynamicsRecorder(data), Witness()
    run = trainer(
        Network(), datapruning.indexed(data), tmp_path, callbacks=[recorder],
        remove_unused_columns=False,
    )  # fmt: skip
    watched(witness, run).train()
    witness.check(recorder, epochs=2)
    assert len(recorder.table("aum").select(keep=4).of(data)) == 4


@pytest.mark.parametrize("step", [6, 8])
def test_transformers_resumes(step: int, tmp_path: Path) -> None:
    """From the end of an epoch and from the middle of one: the table of a run in one go."""

    def run() -> tuple[datapruning.DynamicsRecorder, Any]:
        recorder = datapruning.DynamicsRecorder(texts())
        made = trainer(
            tiny_bert(), datapruning.indexed(texts()), tmp_path, callbacks=[recorder],
            remove_unused_columns=False, save_strategy="steps", save_steps=2, num_train_epochs=3,
        )  # fmt: skip
        return recorder, made

    whole, made = run()
    made.train()
    again, made = run()
    made.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    for method in ("aum", "forgetting"):
        assert torch.equal(again.table(method).scores, whole.table(method).scores)
    (tmp_path / f"checkpoint-{step}" / "dynamics-0.pt").unlink()
    with pytest.raises(ScoreError, match=r"goes on at step \d, and .*dynamics-0.pt is missing"):
        run()[1].train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))


class Points(Dataset[Any]):
    """Vectors, varied each time they are read."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        drawn = torch.Generator().manual_seed(row)
        return torch.randn(6, generator=drawn) + 0.1 * torch.randn(6), row % 3


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def fit(
    folder: Path, recorder: datapruning.DynamicsRecorder, *, witness: Witness | None = None,
    resume: Path | None = None, others: Sequence[Any] = (), **settings: Any,
) -> Any:  # fmt: skip
    module = lightning_module(make_net())
    plain = module.training_step

    def training_step(batch: Any, *_: Any) -> Any:
        step = plain(batch, 0)
        if witness is not None:
            witness.note(batch[2], step["logits"], batch[1])
        return step

    module.training_step = training_step
    run = lightning_trainer(folder, callbacks=[recorder, *others], **settings)
    data = datapruning.indexed(Points())
    torch.manual_seed(1)
    run.fit(module, loader(data), loader(data, shuffle=False), ckpt_path=resume, weights_only=True)
    return run


@pytest.mark.parametrize(
    "settings",
    [
        {"val_check_interval": 2, "accumulate_grad_batches": 4},
        {"precision": "bf16-mixed", "max_epochs": 3},
    ],
)
def test_lightning(settings: dict[str, Any], tmp_path: Path) -> None:
    recorder, witness = datapruning.DynamicsRecorder(Points()), Witness()
    fit(tmp_path, recorder, witness=witness, **settings)
    witness.check(recorder, epochs=settings.get("max_epochs", 2))


def test_lightning_resumes(tmp_path: Path) -> None:
    recorder, witness = datapruning.DynamicsRecorder(Points()), Witness()
    fit(tmp_path, recorder, witness=witness, max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    again = datapruning.DynamicsRecorder(Points())
    fit(tmp_path, again, witness=witness, max_epochs=3, resume=tmp_path / "one.ckpt")
    witness.check(again, epochs=3)


def test_what_was_broken_off_does_not_mix_into_the_next_run(tmp_path: Path) -> None:
    """In the middle of an epoch; another model is trained with the same recorder."""
    recorder, witness = datapruning.DynamicsRecorder(Points()), Witness()

    class Broken(pytorch_lightning.Callback):
        def on_fit_start(self, trainer: Any, module: nn.Module) -> None:
            for parameter in module.parameters():
                nn.init.normal_(parameter)  # other logits than the next run's

        def on_train_batch_start(self, *given: Any) -> None:
            if given[-1] == 2:
                raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        fit(tmp_path, recorder, others=[Broken()])
    fit(tmp_path, recorder, witness=witness)
    witness.check(recorder, epochs=2)


def test_a_loop_of_ones_own(tmp_path: Path) -> None:
    """Both samples' logits by hand: margins 1 and −2, then 3 and 2."""
    recorder = datapruning.DynamicsRecorder([("a", 0), ("b", 1)])
    for first, second in ((1.0, -2.0), (3.0, 2.0)):
        recorder.record(torch.tensor([1]), torch.tensor([[0.0, second]]), torch.tensor([1]))
        recorder.record(torch.tensor([0]), torch.tensor([[first, 0.0]]), torch.tensor([0]))
        recorder.close_epoch()
    table = recorder.table("aum")
    assert table.scores.tolist() == [-2.0, 0.0]
    table.write(tmp_path / "aum.parquet")
    again = datapruning.ScoreTable.read(tmp_path / "aum.parquet")
    assert again.content() == table.content()
    assert recorder.table("dyn-unc", options={"window": 2}).scores[0] > 0


def test_of_samples_that_come_twice_the_first_counts() -> None:
    recorder = datapruning.DynamicsRecorder([("a", 0), ("b", 1)])
    rows, labels = torch.tensor([0, 1, 0]), torch.tensor([0, 1, 0])
    recorder.record(rows, torch.tensor([[5.0, 0.0], [0.0, 1.0], [9.0, 0.0]]), labels)
    recorder.record(rows[:1], torch.tensor([[7.0, 0.0]]), labels[:1])
    recorder.close_epoch()
    assert recorder.table("aum").scores.tolist() == [-5.0, -1.0]


def test_what_does_not_say_which_sample_it_is_is_refused(tmp_path: Path) -> None:
    recorder = datapruning.DynamicsRecorder(texts())
    with pytest.raises(ScoreError, match=r"TrainingArguments\(remove_unused_columns=False\)"):
        trainer(tiny_bert(), datapruning.indexed(texts()), tmp_path, callbacks=[recorder])
    run = trainer(tiny_bert(), texts(), tmp_path, callbacks=[recorder], remove_unused_columns=False)
    with pytest.raises(ScoreError, match="the batch holds no 'id': give Trainer"):
        run.train()
    module = lightning_module(make_net())
    with pytest.raises(ScoreError, match="the batch holds no ids: train on"):
        lightning_trainer(tmp_path, callbacks=[datapruning.DynamicsRecorder(Points())]).fit(
            module, loader(Points())
        )
    module.training_step = lambda *given: module.net(given[0][0]).sum()
    with pytest.raises(ScoreError, match=r'has to return {"loss": loss, "logits": logits}'):
        lightning_trainer(tmp_path, callbacks=[datapruning.DynamicsRecorder(Points())]).fit(
            module, loader(datapruning.indexed(Points()))
        )


def test_wrong_ids_methods_and_runs_are_named() -> None:
    recorder = datapruning.DynamicsRecorder([("a", 0), ("b", 1)])
    logits, labels = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ScoreError, match="the batch holds the id 2, which none of the 2 samples"):
        recorder.record(torch.tensor([2]), logits, labels)
    with pytest.raises(ScoreError, match="holds no labels"):
        recorder.record(torch.tensor([0]), logits)
    with pytest.raises(ScoreError, match=r"expected logits \[B, C\]"):
        recorder.record(torch.tensor([0]), torch.zeros(1, 4, 2), labels)
    with pytest.raises(ScoreError, match=r"1 and torch.float32 \[1, 2\]"):  # several classes each
        recorder.record(torch.tensor([0]), logits, torch.zeros(1, 2))
    with pytest.raises(ScoreError, match=r"'el2n' needs more than .*: forgetting, aum, dyn-unc"):
        recorder.table("el2n")
    with pytest.raises(ScoreError, match="nothing has been recorded"):
        recorder.table("aum")
    recorder.record(torch.tensor([0]), logits, labels)
    recorder.close_epoch()
    with pytest.raises(ScoreError, match="epoch 0 begins, and the recorder has seen 1"):
        recorder._open(0)
    with pytest.warns(datapruning.errors.ScoreWarning, match="1 of 2 scores are not finite"):
        table = recorder.table("aum")
    assert table.labels is None


def test_indexed_items() -> None:
    images, labels = torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 1])
    assert datapruning.indexed(TensorDataset(images, labels))[2][1:] == (labels[2], 2)
    assert datapruning.indexed([{"x": 1, "label": 0}])[0] == {"x": 1, "label": 0, "id": 0}
    samples = datapruning.ImageSamples(images, labels, ids=[7, 5, 6])
    assert datapruning.indexed(samples)[1][1:] == (labels[1], 5)
    assert len(datapruning.indexed((images, labels))) == 3
    with pytest.raises(DataError, match="has an entry 'id' of its own"):
        datapruning.indexed([{"x": 1, "label": 0, "id": 0}])[0]
    with pytest.raises(DataError, match=r"sample 0 is a int, expected \(image, label\)"):
        datapruning.indexed([3])
