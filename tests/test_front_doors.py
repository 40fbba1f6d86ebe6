"""Three lines a package, as the README shows them, and everything that may stand in them."""

from __future__ import annotations

import copy
import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import datapruning
import fedprune
import sparsemodel
from datapruning.errors import SubsetWarning
from datapruning.scores.error import el2n
from datapruning.scoring.methods import METHODS
from datapruning.scoring.steps import of_logits
from prunelab.data.datasets import load_dataset
from prunelab.data.objects import as_samples
from prunelab.errors import DataError, DataWarning, ModelError

ROOT = Path(__file__).parent.parent
TRAINING = datapruning.TrainingConfig(epochs=6, batch_size=16, lr=0.05)


def digits(count: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
    data = load_dataset("digits", num_train=count)
    return data.train_images, data.train_labels


def make_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 10),
    )


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """A trained network."""
    return datapruning.train(digits(), model=make_net, training=TRAINING)


class Pictures(Dataset[Any]):
    """A torch data set of Pillow pictures and ints."""

    def __init__(self, *, noise: float = 0.0) -> None:
        from PIL import Image  # noqa: PLC0415

        images, labels = digits()
        self.pictures = [Image.fromarray(image[0].numpy()) for image in images]
        self.labels = labels.tolist()
        self.noise = noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        if not self.noise:
            return self.pictures[row], self.labels[row]
        image = torch.from_numpy(np.array(self.pictures[row]))[None].float() / 255
        return image + self.noise * torch.randn(image.shape), self.labels[row]


def hugging_face() -> Any:
    import datasets  # noqa: PLC0415

    pictures = Pictures()
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
    )
    columns = {"img": pictures.pictures, "label": pictures.labels}
    return datasets.Dataset.from_dict(columns, features=features)


def readme_lines(package: str) -> str:
    """The README's three lines for a package."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## Three lines a package")[1].split("\n## ")[0]
    (lines,) = [code for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
                if code.startswith(f"import {package}\n")]  # fmt: skip
    return lines


def test_sparsemodel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's lines, and that what was saved comes back."""
    monkeypatch.chdir(tmp_path)
    model = make_net()
    before = copy.deepcopy(model.state_dict())
    names: dict[str, Any] = {"model": model}
    exec(readme_lines("sparsemodel"), names)
    mask, sparse = names["mask"], names["sparse"]

    assert mask.density == pytest.approx(0.05, abs=1e-3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    loaded = sparsemodel.load("tiny.safetensors", make_net())
    assert isinstance(loaded[3], sparsemodel.SparseConv2d)
    assert isinstance(loaded[6], sparsemodel.SparseLinear)
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(loaded.eval()(images), sparse.eval()(images))
    stored = sparsemodel.load("tiny.safetensors")
    assert stored.mask == mask
    mask.apply(model)
    assert all(torch.equal(stored.state[n], v) for n, v in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::datapruning.errors.SubsetWarning")
def test_datapruning(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's lines on a torch data set, with short trainings."""
    monkeypatch.setattr("datapruning.students.train.TrainingConfig", lambda: TRAINING)
    names: dict[str, Any] = {"dataset": Pictures(), "net": net, "teacher": net}
    exec(readme_lines("datapruning"), names)
    table, kept, student = names["table"], names["kept"], names["student"]

    assert (len(table), len(kept)) == (150, 75)
    hardest = table.scores.argsort(descending=True)[:75]
    assert sorted(hardest.tolist()) == kept.ids.tolist()
    assert datapruning.evaluate(student, digits()).accuracy > 0.5
    assert not student.training


def test_fedprune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's lines on a torch data set, but for few rounds of two clients."""
    monkeypatch.chdir(tmp_path)
    plain = fedprune.run

    def short(**arguments: Any) -> fedprune.Result:
        assert arguments.pop("rounds") == 20
        method = dataclasses.replace(arguments.pop("method"), density=0.2)  # of a tiny network
        return plain(**arguments, method=method, rounds=2, clients=2)

    monkeypatch.setattr(fedprune, "run", short)
    names: dict[str, Any] = {"make_net": make_net, "dataset": Pictures()}
    exec(readme_lines("fedprune"), names)
    result = names["result"]
    assert isinstance(result.model[3], sparsemodel.SparseConv2d)
    assert result.model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert result.summary["rounds"] == 2
    assert result.report.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [line["round"] for line in result.metrics if "round" in line] == [1, 2]
    assert result.state.patterns.density == pytest.approx(0.2, rel=0.05)


DRESSES: dict[str, Callable[[], Any]] = {
    "tensors": digits,
    "arrays": lambda: tuple(part.numpy() for part in digits()),
    "gray arrays": lambda: (digits()[0][:, 0].numpy(), digits()[1].numpy().astype(np.int32)),
    "channels last": lambda: (digits()[0].permute(0, 2, 3, 1).numpy(), digits()[1].numpy()),
    "samples": lambda: datapruning.ImageSamples(*digits()),
    "image set": lambda: load_dataset("digits", num_train=150),
    "tensor data set": lambda: TensorDataset(*digits()),
    "torch data set": Pictures,
    "hugging face": hugging_face,
}


@pytest.mark.filterwarnings("ignore::datapruning.errors.SubsetWarning")
@pytest.mark.filterwarnings("ignore:.* have channels last:prunelab.errors.DataWarning")
@pytest.mark.parametrize("dress", DRESSES)
def test_the_same_data_in_any_dress(dress: str, net: nn.Module) -> None:
    """Same fingerprint, same scores, and the kept samples serve training and a DataLoader."""
    data = DRESSES[dress]()
    samples, expected = as_samples(data), datapruning.ImageSamples(*digits())
    assert samples.fingerprint == expected.fingerprint
    kept = datapruning.score(data, model=net, method="loss").select(keep=40)
    chosen = kept.of(data)
    assert len(chosen) == 40
    rows = chosen._indices["indices"].to_pylist() if dress == "hugging face" else chosen.indices
    assert rows == kept.ids.tolist()
    once = datapruning.TrainingConfig(epochs=1, lr=0.01)
    student = datapruning.train(chosen, model=net, training=once)
    plain = datapruning.train(kept.of(digits()), model=net, training=once)
    for ours, theirs in zip(student.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    if dress not in {"torch data set", "hugging face"}:  # whose pictures torch cannot stack
        images, labels = next(iter(DataLoader(chosen, batch_size=40)))
        assert images.shape == (40, 1, 8, 8)
        assert torch.equal(labels, digits()[1][kept.ids])


def test_kept_samples_of_a_named_data_set() -> None:
    table = datapruning.score("digits", method="random", seed=3)
    chosen = table.select(keep=5).of("digits")
    images, _ = next(iter(DataLoader(chosen, batch_size=5)))
    assert images.shape == (5, 1, 8, 8)
    assert images.dtype == torch.float32


def test_other_data_are_refused(net: nn.Module) -> None:
    images, labels = digits()
    kept = datapruning.score((images, labels), model=net, method="loss").select(keep=40)
    with pytest.raises(ValueError, match="these data have fingerprint"):
        kept.of((images.flip(0), labels))
    with pytest.raises(ValueError, match=r"chosen from 150 samples of tuple, these data have 149"):
        kept.of(TensorDataset(images[1:], labels[1:]))
    with pytest.raises(ValueError, match="when the subset was chosen; give the data set"):
        kept.of(TensorDataset(images, labels.roll(1)))


def test_random_transforms_train_but_do_not_score(net: nn.Module) -> None:
    noisy = Pictures(noise=0.1)
    with pytest.raises(DataError, match="sample 0 is another one each time it is read"):
        datapruning.score(noisy, model=net, method="loss")
    kept = datapruning.score(Pictures(), model=net, method="loss").select(keep=10)
    images, labels = next(iter(DataLoader(kept.of(noisy), batch_size=10)))
    assert images.shape == (10, 1, 8, 8)
    assert torch.equal(labels, digits()[1][kept.ids])


def uncertain(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Minus the largest probability."""
    return -logits.softmax(1).amax(1)


def test_objects_stand_where_names_do(net: nn.Module) -> None:
    """A method, a policy, an engine and a network, given as functions and objects."""
    data = digits()
    table = datapruning.score(data, model=net, method=uncertain)
    assert table.method == "uncertain"
    logits = net(as_samples(data).batch(torch.arange(150))[0])
    assert torch.allclose(table.scores, uncertain(logits, data[1]).double())
    mine = datapruning.Method("EL2N again.", "here", runs=1, observe=of_logits(el2n), name="mine")
    both = datapruning.score(data, model=net, method=[mine, "el2n"])
    assert torch.equal(both["mine"].scores, both["el2n"].scores)

    def first(scored: Any, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.arange(count)

    assert table.select(keep=3, policy=first).ids.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="needs a name"):
        datapruning.score(data, model=net, method=METHODS["el2n"])


def test_models_by_name_function_and_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal seeds give equal models, wherever they come from; a given model stays as it is."""
    data, once = digits(60), datapruning.TrainingConfig(epochs=1, lr=0.01)
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n"
        "def linear(num_classes, input_shape):\n"
        "    width = input_shape[0] * input_shape[1] * input_shape[2]\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(width, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)

    def linear() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    first = datapruning.train(data, model="my_networks:linear", training=once)
    second = datapruning.train(data, model=linear, training=once)
    start = second[1].weight.detach().clone()
    third = datapruning.train(data, model=second, training=once)
    assert torch.equal(first[1].weight, second[1].weight)
    assert torch.equal(second[1].weight, start)
    assert not torch.equal(third[1].weight, start)
    assert datapruning.train(data, model="resnet8", training=once).fc.out_features == 10
    for wrong, message in (
        ("my_networks:quadratic", "has no 'quadratic'"),
        ("nowhere:linear", "cannot import 'nowhere'"),
        ("resnet9", "unknown model 'resnet9'"),
        (nn.Linear, "may ask for num_classes, input_shape"),
        (lambda: "net", "returned a str"),
    ):
        with pytest.raises(ValueError, match=message):
            datapruning.train(data, model=wrong, training=once)


def test_fresh_samples_in_each_epoch(net: nn.Module) -> None:
    """Of the 40 kept 10 an epoch, every one of them once in four epochs."""
    seen: list[torch.Tensor] = []

    class Watch:
        def on_batch(self, epoch: int, rows: torch.Tensor, *_: torch.Tensor) -> None:
            seen.append(rows)

        def on_epoch(self, epoch: int, model: nn.Module) -> None:
            pass

    kept = datapruning.score(digits(), model=net, method="loss").select(keep=40)
    four = datapruning.TrainingConfig(epochs=4, batch_size=10, lr=0.01)
    datapruning.train(kept.of(digits()), model=net, fresh=0.25, training=four, callbacks=[Watch()])
    assert [len(rows) for rows in seen] == [10] * 4
    assert torch.cat(seen).sort().values.tolist() == kept.ids.tolist()


def test_a_sparse_student_stays_sparse(net: nn.Module) -> None:
    sparse = sparsemodel.sparsify(net, sparsemodel.prune(net, density=0.2))
    student = datapruning.train(digits(), model=sparse, training=TRAINING)
    assert isinstance(student[6], sparsemodel.SparseLinear)
    assert datapruning.evaluate(student, digits()).accuracy > 0.5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((torch.zeros(3, 1, 8, 8), torch.tensor([0, -1, 0])), "sample 1 has the label -1"),
        ((torch.zeros(3, 1, 8, 8), torch.zeros(3) * 1j), "labels are complex64"),
        ((torch.zeros(3, 1, 8, 8), torch.tensor([0, 1])), "3 images but 2 labels"),
        ((torch.full((2, 8, 8), torch.nan), torch.tensor([0, 1])), "sample 0 holds values that"),
        (
            (torch.zeros(2, 1, 8, 8, dtype=torch.int64), torch.tensor([0, 1])),
            "images are int64; expected bytes",
        ),
        ({"train": 1, "test": 2}, "mapping of 'train', 'test'; give one of them"),
        ([(torch.zeros(1, 8, 8), None)], "labels are object"),
        ([(torch.zeros(1, 8, 8), 0), (torch.zeros(1, 9, 8), 0)], "sample 1 is float32"),
        ([torch.zeros(1, 8, 8)], r"sample 0 is a Tensor, expected \(image, label\)"),
        ([{"text": "a", "label": 1}], "texts, which need a tokenizer"),
        ([("a", 1)], "the image of sample 0 is a str"),
        ([], "no samples"),
        (7, "data is a int"),
        (torch.zeros(3, 1, 8, 8), r"data is a Tensor; expected \(images, labels\)"),
        (np.array(3), "data is a ndarray"),
        ("nowhere", "unknown data set 'nowhere'"),
        (b"nowhere", "data is a bytes"),
    ],
)
def test_data_that_are_none_are_named(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_samples(data)


class ByClass(nn.Module):
    """A network whose class builds it, for 8×8 images."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(1, 4, 3), nn.Linear(144, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(self.conv(images).relu().flatten(1))
        return logits


@pytest.mark.parametrize("method", ["el2n", "grand", "forgetting", "vog", "prototypes-ssl"])
def test_scores_do_not_depend_on_torchs_default_type(method: str) -> None:
    data, two = digits(40), datapruning.TrainingConfig(epochs=2, batch_size=16, lr=0.05)
    expected = datapruning.score(data, model=ByClass, method=method, training=two)
    torch.set_default_dtype(torch.float64)
    try:
        found = datapruning.score(data, model=ByClass, method=method, training=two)
        student = datapruning.train(data, model=ByClass, training=two)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.scores, expected.scores)
    assert student.last.weight.dtype == torch.float32


def test_a_network_of_another_type_is_fed_in_its_own(net: nn.Module) -> None:
    data, double = digits(40), copy.deepcopy(net).double()
    expected = datapruning.score(data, model=net, method="grand").scores
    found = datapruning.score(data, model=double, method="grand").scores
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    once = datapruning.TrainingConfig(epochs=1, lr=0.01)
    assert datapruning.train(data, model=double, training=once)[0].weight.dtype == torch.float64
    assert datapruning.evaluate(double, data).accuracy == datapruning.evaluate(net, data).accuracy


@pytest.mark.parametrize("model", [ByClass, ByClass(), lambda: ByClass(3)])
def test_data_that_do_not_fit_the_network_are_one_clear_error(model: Any) -> None:
    images, labels = digits(40)
    once = datapruning.TrainingConfig(epochs=1, lr=0.01)
    calls: list[Callable[[Any], Any]] = [
        lambda data: datapruning.score(data, model=model, method="loss", training=once),
        lambda data: datapruning.train(data, model=model, training=once),
    ]
    if isinstance(model, nn.Module):
        calls.append(lambda data: datapruning.evaluate(model, data))
    for call in calls:
        for data, words in (
            ((images.flatten(1), labels), r"does not fit images \[2, 64\]: RuntimeError"),
            ((images[:, :, :5], labels), r"does not fit images \[2, 1, 5, 8\]"),
            ((images, torch.arange(40) % 11), "logits, and the data have 11 classes; a function"),
        ):
            if "11" in words and model is ByClass:
                continue  # it is built for as many as there are
            with pytest.raises(ModelError, match=words):
                call(data)


def test_gaps_between_classes_are_mentioned_where_networks_are_made(net: nn.Module) -> None:
    images, labels = digits(40)
    even = labels // 2 * 2
    with pytest.warns(
        DataWarning, match="labels reach 8, so the network gets 9 outputs, but no sa"
    ):
        table = datapruning.score((images, even), model=net, method="loss")
    # What is kept of them, and what is evaluated, may lack a class without a word.
    kept = table.select(keep=5).of(TensorDataset(images, even))
    once = datapruning.TrainingConfig(epochs=1, lr=0.01)
    with pytest.warns(SubsetWarning, match="holds no sample of class"):
        datapruning.train(kept, model=net, training=once)
    datapruning.evaluate(net, (images[:4], even[:4]))


@pytest.mark.parametrize("package", ["sparsemodel", "datapruning", "fedprune"])
def test_names_are_shown_and_imported_when_used(package: str) -> None:
    code = (
        f"import sys, {package} as p\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(p.__all__) <= set(dir(p)), sorted(set(p.__all__) - set(dir(p)))\n"
        "from importlib import import_module\n"
        "assert all(getattr(p, name) is not None for name in p.__all__)\n"
        "assert not hasattr(p, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
