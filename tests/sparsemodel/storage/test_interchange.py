"""Models in other formats compute what they computed here, read by those formats' own readers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import sparsemodel
from prunelab.networks import build_model
from sparsemodel.errors import ExportError
from sparsemodel.masks.prune import prune

ENDINGS = (".safetensors", ".pt", ".onnx", ".pt2")
Example = Tensor | tuple[Any, ...] | dict[str, Any]


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def built_in(name: str, *shape: int, width: int | None = None) -> tuple[nn.Module, Example]:
    model = build_model(name, num_classes=10, input_shape=shape, seed=0, width=width)
    return model, images(2, *shape)


def squeezenet() -> tuple[nn.Module, Example]:
    import torchvision  # noqa: PLC0415

    torch.manual_seed(0)
    return torchvision.models.squeezenet1_1(num_classes=5), images(2, 3, 32, 32)


def vision_transformer() -> tuple[nn.Module, Example]:
    import timm  # noqa: PLC0415

    torch.manual_seed(0)
    settings = {"img_size": 32, "depth": 1, "embed_dim": 48, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **settings), images(2, 3, 32, 32)


def bert() -> tuple[nn.Module, Example]:
    import transformers  # noqa: PLC0415

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50}
    config = transformers.BertConfig(
        **sizes, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )
    ids = torch.arange(10).reshape(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    # In another order than forward's.
    return transformers.BertForSequenceClassification(config), {
        "attention_mask": mask,
        "input_ids": ids,
    }


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Example]]] = {
    "resnet8": lambda: built_in("resnet8", 1, 8, 8, width=4),
    "resnet20": lambda: built_in("resnet20", 1, 8, 8, width=4),
    "resnet18": lambda: built_in("resnet18", 3, 16, 16, width=4),
    "vgg11_bn": lambda: built_in("vgg11_bn", 3, 32, 32),
    "torchvision's squeezenet": squeezenet,
    "timm's vision transformer": vision_transformer,
    "transformers' BERT": bert,
}


def called(function: Callable[..., Any], example: Example) -> Tensor:
    """The only output of a model."""
    if isinstance(example, dict):
        found = function(**example)
    else:
        found = function(*example) if isinstance(example, tuple) else function(example)
    if isinstance(found, Tensor):
        return found
    (only,) = found.values()
    assert isinstance(only, Tensor)
    return only


def sized(example: Example, size: int) -> Example:
    """As many samples, the example's over and over."""
    if isinstance(example, Tensor):
        return example[torch.arange(size) % len(example)]
    if isinstance(example, dict):
        return {name: sized(part, size) for name, part in example.items()}
    return tuple(sized(part, size) for part in example)


def read(path: Path, fresh: nn.Module, example: Example) -> Tensor:
    """What a file computes, by the reader that its users have."""
    if path.suffix == ".onnx":
        import onnxruntime  # noqa: PLC0415

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        if isinstance(example, dict):
            feed = {name: example[name].numpy() for name in names}
        else:
            parts = example if isinstance(example, tuple) else (example,)
            feed = dict(zip(names, (part.numpy() for part in parts), strict=True))
        return torch.from_numpy(session.run(None, feed)[0])
    if path.suffix == ".pt2":
        return called(torch.export.load(path).module(), example)
    if path.suffix == ".pt":
        fresh.load_state_dict(torch.load(path, weights_only=True))
    else:
        fresh.load_state_dict(safetensors.torch.load_file(path))
    return called(fresh.eval(), example)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "sparse"])
@torch.no_grad()
def test_every_network_goes_out_and_computes_the_same(
    name: str, pruned: bool, tmp_path: Path
) -> None:
    model, example = NETWORKS[name]()
    model = sparsemodel.sparsify(model, prune(model, density=0.2)) if pruned else model
    for ending in ENDINGS:
        path = tmp_path / f"model{ending}"
        done = sparsemodel.export(model, path, example=example)
        assert (done.path, done.num_bytes) == (path, path.stat().st_size)
        for size in (1, 5):
            batch = sized(example, size)
            expected = called(model.eval(), batch)
            found = read(path, NETWORKS[name]()[0], batch)
            limit = 1e-5 * float(expected.abs().max())
            assert found.shape == expected.shape
            assert float((found - expected).abs().max()) <= limit, (ending, size)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_pruned_weights_are_zeros_in_the_file(tmp_path: Path) -> None:
    model = small()
    mask = prune(model, density=0.25)
    sparsemodel.export(
        sparsemodel.sparsify(model, mask), tmp_path / "model.safetensors", example=torch.ones(2, 4)
    )
    mask.apply(model)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(stored[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("ending", [".safetensors", ".onnx", ".pt2"])
def test_strings_go_with_the_model(ending: str, tmp_path: Path) -> None:
    path, strings = tmp_path / f"model{ending}", {"class_names": '["a", "b"]', "dataset": "digits"}
    sparsemodel.export(small(), path, example=torch.ones(2, 4), metadata=strings)
    if ending == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            assert file.metadata() == strings
    elif ending == ".pt2":
        beside = {"metadata.json": ""}
        torch.export.load(path, extra_files=beside)
        assert json.loads(beside["metadata.json"]) == strings
    else:
        import onnxruntime  # noqa: PLC0415

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert session.get_modelmeta().custom_metadata_map == strings
        assert session.get_inputs()[0].shape == ["batch", 4]


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = small().train()
    model(torch.randn(5, 4)).sum().backward()  # type: ignore[no-untyped-call]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [p.grad for p in model.parameters()]
    sparsemodel.export(model, tmp_path / "model.pt2", example=torch.randn(2, 4))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


class OfTexts(nn.Module):
    """Classes of texts, whatever their length."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(20, 8), nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.out(self.words(ids).mean(1))
        return logits


@pytest.mark.parametrize("ending", [".onnx", ".pt2"])
@torch.no_grad()
def test_texts_may_be_of_any_length(ending: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = OfTexts().eval(), tmp_path / f"model{ending}"
    sparsemodel.export(model, path, example=torch.arange(12).reshape(2, 6))
    for length in (3, 9):
        ids = torch.arange(4 * length).reshape(4, length) % 20
        torch.testing.assert_close(read(path, model, ids), model(ids), rtol=1e-5, atol=1e-6)


class TwoInputs(nn.Module):
    """Two tensors and a switch, a mapping of outputs; `shared` is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor, y: Tensor, negative: bool = False) -> dict[str, Tensor]:
        total = self.one(x) + self.two(y)
        return {"total": -total if negative else total, "kept": x}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("by_name", [False, True])
def test_several_inputs_and_outputs(ending: str, by_name: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 4)
    example: Example = {"negative": True, "y": y, "x": x} if by_name else (x, y, True)
    done = sparsemodel.export(TwoInputs(), tmp_path / f"model{ending}", example=example)
    assert done.difference < 1e-6


class ElseWhenExported(nn.Module):
    """Computes something else as a program."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + 0.25 if torch.compiler.is_exporting() else y


@pytest.mark.parametrize("ending", [".onnx", ".pt2"])
def test_what_computes_something_else_is_not_written(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{ending}"
    path.write_bytes(b"an earlier one")
    with pytest.raises(ExportError, match=r"not written: of a batch of 1, .* by 0\.25 at \[0, "):
        sparsemodel.export(ElseWhenExported(), path, example=torch.ones(3, 2), force=True)
    assert path.read_bytes() == b"an earlier one"
    assert list(tmp_path.iterdir()) == [path]


class FixedBatch(nn.Module):
    """Knows its batch by heart."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 4) if len(x) == 2 else x.reshape(len(x), 4)


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    model, example = small(), torch.ones(2, 4)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    refused: list[tuple[str, Path, dict[str, Any]]] = [
        (r"there already; overwrite it with --force", path, {}),
        (r"ending names no format; expected \.safetensors", tmp_path / "model.bin", {}),
        (
            r"unknown format 'tflite'; expected one of dense, t",
            tmp_path / "m",
            {"format": "tflite"},
        ),
        (r"a folder that exists", tmp_path / "none" / "model.pt", {}),
        (r"equally long; got \[2, 3\]", tmp_path / "m.pt", {"example": (example, torch.ones(3))}),
        (r"equally long; got no tensors", tmp_path / "m.pt", {"example": 3}),
        (r"cannot be run on the example: RuntimeError", tmp_path / "m.pt", {"example": example.T}),
    ]
    for text, where, more in refused:
        with pytest.raises(ExportError, match=text):
            sparsemodel.export(model, where, **{"example": example, **more})
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b""
    sparsemodel.export(model, path, example=example, force=True)
    assert path.stat().st_size


def test_a_fixed_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be written as 'program'"):
        sparsemodel.export(FixedBatch(), tmp_path / "m.pt2", example=torch.ones(1, 4))


def test_onnx_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = small(), torch.ones(2, 4)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(
            ExportError, match=r"needs onnxscript: pip install 'fedprune\[export\]'"
        ):
            sparsemodel.export(model, tmp_path / "model.onnx", example=example)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # checked by onnx's own reference
    assert sparsemodel.export(model, tmp_path / "model.onnx", example=example).difference < 1e-6
