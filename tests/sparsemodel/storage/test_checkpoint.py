"""Sparse checkpoints: round trips, equal bytes, atomic replacement, hostile files."""

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from sparsemodel.errors import CheckpointError
from sparsemodel.masks.mask import Mask
from sparsemodel.storage.checkpoint import load_sparse, save_sparse
from sparsemodel.storage.header import FORMAT, METADATA_KEY
from sparsemodel.storage.sealed import BLANK, CHECKSUM, seal
from sparsemodel.storage.state_file import load_state

Header = dict[str, Any]


def sparse_model() -> tuple[dict[str, torch.Tensor], Mask]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5))
    generator = torch.Generator().manual_seed(1)
    patterns = {
        name: torch.rand(model.get_parameter(name).shape, generator=generator) < 0.2
        for name in ("3.weight", "0.weight")  # not the order of the model
    }
    mask = Mask(patterns)
    mask.apply(model)
    return model.state_dict(), mask


def assert_same(loaded: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_round_trip_of_a_model(tmp_path: Path) -> None:
    state, mask = sparse_model()
    path = tmp_path / "model.safetensors"
    save_sparse(path, state, mask, metadata={"method": "größe"})
    loaded = load_sparse(path)
    assert_same(loaded.state, state)
    assert loaded.mask == mask
    assert loaded.mask is not None
    assert list(loaded.mask) == ["3.weight", "0.weight"]
    assert loaded.metadata == {"method": "größe"}


def test_the_file_holds_active_values_and_packed_bits(tmp_path: Path) -> None:
    """Pattern 1010 0000 1 packs to 0xA0, 0x80; the values are those at 0, 2 and 8."""
    pattern = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 0, 1]], dtype=torch.bool)
    weight = torch.tensor([[1.5, 0.0, 2.5], [0.0, 0.0, 0.0], [0.0, 0.0, -3.0]])
    path = tmp_path / "model.safetensors"
    save_sparse(path, {"w": weight, "b": torch.ones(1)}, Mask({"w": pattern}), metadata={})
    raw = safetensors.torch.load(path.read_bytes())
    assert sorted(raw) == ["b", "w.mask", "w.values"]
    assert raw["w.mask"].tolist() == [0xA0, 0x80]
    assert raw["w.values"].tolist() == [1.5, 2.5, -3.0]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.integers(1, 5), max_size=3),
    st.integers(0, 1000),
    st.floats(0, 1),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_round_trip_of_any_shape_and_density(
    tmp_path: Path, shape: list[int], seed: int, density: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.rand(shape, generator=generator) < density
    weight = torch.randn(shape, generator=generator).to(dtype).masked_fill(~pattern, 0.0)
    state = {"w": weight, "step": torch.tensor(3), "none": torch.empty(0, 2)}
    mask = Mask({"w": pattern})
    save_sparse(tmp_path / "m", state, mask, metadata={})
    loaded = load_sparse(tmp_path / "m")
    assert_same(loaded.state, state)
    assert loaded.mask == mask


def test_without_a_mask_everything_is_stored_whole(tmp_path: Path) -> None:
    state, _ = sparse_model()
    state["strided"] = torch.arange(6.0).reshape(2, 3).T
    state["shared"] = state["3.bias"]
    save_sparse(tmp_path / "m", state, None, metadata={})
    loaded = load_sparse(tmp_path / "m")
    assert_same(loaded.state, state)
    assert loaded.mask is None


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    state, mask = sparse_model()
    metadata = {chr(ord("a") + i): str(i) for i in range(20)}
    for number in range(5):
        backwards = number % 2
        pairs = list(metadata.items())
        save_sparse(
            tmp_path / f"{number}",
            dict(reversed(state.items())) if backwards else state,
            mask,
            metadata=dict(reversed(pairs) if backwards else pairs),
        )
    assert len({(tmp_path / f"{number}").read_bytes() for number in range(5)}) == 1


def test_loaded_tensors_outlive_the_file(tmp_path: Path) -> None:
    state, mask = sparse_model()
    path = tmp_path / "m"
    save_sparse(path, state, mask, metadata={})
    loaded = load_sparse(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    path.unlink()
    loaded.state["3.bias"].add_(0.0)  # writable, and its own memory
    assert_same(loaded.state, state)


def test_a_reader_of_the_old_file_is_not_disturbed(tmp_path: Path) -> None:
    state, mask = sparse_model()
    path = tmp_path / "m"
    save_sparse(path, state, mask, metadata={"round": "1"})
    old = path.read_bytes()
    with open(path, "rb") as reader:
        save_sparse(path, state, mask, metadata={"round": "2"})
        assert reader.read() == old
    assert load_sparse(path).metadata == {"round": "2"}
    assert os.listdir(tmp_path) == ["m"]


def test_a_write_that_fails_leaves_no_litter(tmp_path: Path) -> None:
    """The target is a folder, so the last step, the replacement, fails."""
    state, mask = sparse_model()
    (tmp_path / "m").mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_sparse(tmp_path / "m", state, mask, metadata={})
    assert os.listdir(tmp_path) == ["m"]


def test_the_file_gets_the_usual_permissions(tmp_path: Path) -> None:
    state, mask = sparse_model()
    save_sparse(tmp_path / "m", state, mask, metadata={})
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("m", "plain")}
    assert len(modes) == 1


def test_bad_content_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    state, mask = sparse_model()
    path = tmp_path / "m"
    unmasked = {**state, "3.weight": torch.ones(5, 12)}
    with pytest.raises(CheckpointError, match=r"call mask\.apply"):
        save_sparse(path, unmasked, mask, metadata={})
    with pytest.raises(CheckpointError, match=r"no tensor '3\.weight'"):
        save_sparse(path, {"0.weight": state["0.weight"]}, mask, metadata={})
    with pytest.raises(CheckpointError, match="expects floating point of shape"):
        save_sparse(path, {**state, "3.weight": torch.ones(5)}, mask, metadata={})
    with pytest.raises(CheckpointError, match="already has tensors"):
        save_sparse(path, {**state, "3.weight.mask": torch.ones(5)}, mask, metadata={})
    with pytest.raises(CheckpointError, match="strings to strings"):
        save_sparse(path, state, mask, metadata={"round": 3})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_sparse(tmp_path / "absent" / "m", state, mask, metadata={})
    assert os.listdir(tmp_path) == []


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], Header], Any]) -> None:
    """Change a valid file's tensors and header, and write it back as a valid, sealed file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][METADATA_KEY])
    tensors = safetensors.torch.load(data)
    header[CHECKSUM] = BLANK
    change(tensors, header)
    path.write_bytes(
        seal(safetensors.torch.save(tensors, {METADATA_KEY: json.dumps(header)}), FORMAT)
    )


def set_layers(*layers: Any) -> Callable[[dict[str, torch.Tensor], Header], Any]:
    return lambda tensors, header: header.update(layers=list(layers))


def set_tensor(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor], Header], Any]:
    return lambda tensors, header: tensors.update({name: value})


HOSTILE: dict[str, tuple[Callable[[dict[str, torch.Tensor], Header], Any], str]] = {
    "no mask tensor": (lambda t, h: t.pop("w.mask"), r"lacks the tensors \['w.mask'\]"),
    "no values": (lambda t, h: t.pop("w.values"), r"lacks the tensors \['w.values'\]"),
    "stored twice": (set_tensor("w", torch.ones(9)), "holds 'w' twice"),
    "listed twice": (set_layers(["w", [9]], ["w", [9]]), "holds 'w' twice"),
    "too few values": (set_tensor("w.values", torch.ones(2)), "expected 3 floating-point values"),
    "too many values": (set_tensor("w.values", torch.ones(4)), "expected 3 floating-point values"),
    "integer values": (
        set_tensor("w.values", torch.ones(3, dtype=torch.int32)),
        "expected 3 floating-point values",
    ),
    "matrix of values": (set_tensor("w.values", torch.ones(3, 1)), "expected 3 floating-point"),
    "short mask": (set_tensor("w.mask", torch.ones(1, dtype=torch.uint8)), "expected 2 bytes"),
    "mask of floats": (set_tensor("w.mask", torch.ones(2)), "expected 2 bytes"),
    "padding bits": (
        set_tensor("w.mask", torch.tensor([0xA0, 0xC0], dtype=torch.uint8)),
        "bits past its 9 weights",
    ),
    "more bits": (
        set_tensor("w.mask", torch.tensor([0xF0, 0x80], dtype=torch.uint8)),
        "expected 5 floating-point values",
    ),
    "huge shape": (set_layers(["w", [2**62, 2**62]]), "expected 26584559915698317458"),
    "negative shape": (set_layers(["w", [-3, -3]]), "no name and shape"),
    "zero shape": (set_layers(["w", [0, 2**70]]), "no name and shape"),
    "boolean shape": (set_layers(["w", [True, 9]]), "no name and shape"),
    "fractional shape": (set_layers(["w", [9.0]]), "no name and shape"),
    "shape is no list": (set_layers(["w", 9]), "no name and shape"),
    "name is no string": (set_layers([1, [9]]), "no name and shape"),
    "other layer": (set_layers(["x", [9]]), "lacks the tensors"),
    "no layers": (set_layers(), "no list or is empty"),
    "layers are an object": (lambda t, h: h.update(layers={"w": [9]}), "no list or is empty"),
    "next version": (lambda t, h: h.update(version=3), "format version 3, this release reads 2"),
    "first version": (lambda t, h: h.update(version=1), "format version 1, this release reads 2"),
    "no version": (lambda t, h: h.pop("version"), "format version None"),
    "other format": (lambda t, h: h.update(format="x"), "does not say"),
    "metadata with numbers": (lambda t, h: h.update(metadata={"a": 1}), "strings to strings"),
    "no metadata": (lambda t, h: h.pop("metadata"), "strings to strings"),
}


def valid_file(path: Path) -> None:
    pattern = torch.tensor([1, 0, 1, 0, 0, 0, 0, 0, 1], dtype=torch.bool)
    save_sparse(path, {"w": pattern.float()}, Mask({"w": pattern}), metadata={})


@pytest.mark.parametrize("case", HOSTILE)
def test_files_that_contradict_themselves_are_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    valid_file(path)
    rewrite(path, lambda tensors, header: None)
    assert load_sparse(path).mask is not None
    change, message = HOSTILE[case]
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_sparse(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "3", "null", '{"version": 1}'])
def test_metadata_that_is_not_ours_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(safetensors.torch.save({"a": torch.ones(1)}, {METADATA_KEY: text}))
    with pytest.raises(CheckpointError, match="its metadata"):
        load_sparse(path)


def test_plain_safetensors_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for metadata in (None, {"format": "pt"}):
        path.write_bytes(safetensors.torch.save({"a": torch.ones(1)}, metadata))
        with pytest.raises(CheckpointError, match="not a sparse checkpoint"):
            load_sparse(path)


def test_truncated_files_are_refused_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "m"
    valid_file(path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            load_sparse(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_bytes_never_load(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "m"
    valid_file(path)
    whole = path.read_bytes()
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    if content != whole:
        for load in (load_sparse, load_state):
            with pytest.raises(CheckpointError, match=re.escape(str(path))):
                load(path)


def test_every_single_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "m"
    valid_file(path)
    whole = path.read_bytes()
    for place in range(8 * len(whole)):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            load_sparse(path)


def test_a_missing_file_is_reported_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent.*cannot be read"):
        load_sparse(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_sparse(tmp_path)


def test_packed_order_is_that_of_numpy(tmp_path: Path) -> None:
    state, mask = sparse_model()
    save_sparse(tmp_path / "m", state, mask, metadata={})
    raw = safetensors.torch.load((tmp_path / "m").read_bytes())
    for name in mask:
        expected = np.packbits(mask[name].numpy().reshape(-1))
        assert raw[f"{name}.mask"].tolist() == expected.tolist()
