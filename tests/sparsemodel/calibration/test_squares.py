"""Sums of squared inputs of linear layers and convolutions, against plain loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_language import VOCABULARY, llama, opt, texts
from torch import Tensor, nn

from sparsemodel.calibration.collect import INPUTS, calibrate
from sparsemodel.calibration.squares import input_squares, rows_of
from sparsemodel.errors import CalibrationError


def linear_weights(model: nn.Module) -> list[str]:
    return [f"{n}.weight" for n, module in model.named_modules() if isinstance(module, nn.Linear)]


def by_hand(layer: Any, inputs: Tensor) -> Tensor:
    """Patch by patch: where a unit vector of a row puts each input, by the layer itself."""
    rows = layer.weight[0].numel()
    found = torch.zeros(layer.groups, rows, dtype=torch.float64)
    probe = copy.deepcopy(layer).double()
    probe.bias = None
    each = layer.out_channels // layer.groups
    for column in range(rows):
        with torch.no_grad():
            probe.weight.zero_()
            probe.weight.reshape(len(probe.weight), -1)[:, column] = 1.0
            outputs = probe(inputs.double())  # of each output exactly the input at that column
        for group in range(layer.groups):
            found[group, column] = outputs[:, group * each].square().sum()
    return found


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 4, 3), (5, 3, 7, 8)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (5, 4, 9, 8)),
        (nn.Conv2d(4, 4, 3, padding="same", dilation=2, groups=4), (3, 4, 6, 6)),
        (nn.Conv2d(2, 4, (3, 1), padding=(1, 0), padding_mode="reflect"), (3, 2, 6, 6)),
        (nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), (3, 2, 6, 6)),
        (nn.Conv1d(4, 6, 5, padding=2), (3, 4, 11)),
        (nn.Conv3d(2, 4, 2, padding=1), (2, 2, 4, 3, 5)),
        (nn.Conv2d(3, 4, 3), (3, 7, 8)),
    ],
)
def test_what_a_convolution_s_row_multiplies(layer: nn.Module, shape: tuple[int, ...]) -> None:
    inputs = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(layer)
    found = input_squares(model, ["0.weight"], [inputs, 2 * inputs])["0.weight"]
    batched = inputs if inputs.dim() == layer.get_parameter("weight").dim() else inputs[None]
    expected = 5 * by_hand(layer, batched)  # 1 + 2²
    assert rows_of(model, ["0.weight"]) == {"0.weight": tuple(expected.shape)}
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_hand_worked_row() -> None:
    """Inputs (1, 2) and (3, 0): 1 + 9 and 4 + 0; a kernel of two on (1, 2, 3): 1 + 4 and 4 + 9."""
    linear = nn.Sequential(nn.Linear(2, 3))
    batches = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]])]
    assert input_squares(linear, ["0.weight"], batches)["0.weight"].tolist() == [[10.0, 4.0]]
    conv = nn.Sequential(nn.Conv1d(1, 2, 2))
    found = input_squares(conv, ["0.weight"], [torch.tensor([[[1.0, 2.0, 3.0]]])])
    assert found["0.weight"].tolist() == [[5.0, 13.0]]


@pytest.mark.parametrize("make", [llama, opt])
def test_linear_layers_have_the_norms_of_a_calibration(make: Any) -> None:
    """Of every linear layer of a language model; padded tokens left out of both."""
    model, names = make(), linear_weights(make())
    batches: list[Any] = []
    for number, batch in enumerate(texts()):
        mask = torch.ones(batch["input_ids"].shape, dtype=torch.int64)
        mask[0, 5 + number :] = 0
        batches.append({**batch, "attention_mask": mask})
    found = input_squares(model, names, batches)
    layers = [name.removesuffix(".weight") for name in names]
    known = calibrate(model, batches, {INPUTS: layers})
    for name, layer in zip(names, layers, strict=True):
        squares = known.moments(INPUTS, layer).squares
        torch.testing.assert_close(found[name][0], squares, rtol=1e-6, atol=0)


def test_padding_changes_nothing_however_tokens_are_laid_out() -> None:
    """A network that flattens its tokens, [n · tokens, features]; padded with whatever there is."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Embedding(VOCABULARY, 4), nn.Linear(4, 3)
            self.flat = nn.Linear(4, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            hidden = self.embed(input_ids)
            out: Tensor = self.fc(hidden).flatten(0, 1) + self.flat(hidden.flatten(0, 1))
            return out

    torch.manual_seed(0)
    model, names = Flat(), ["fc.weight", "flat.weight"]
    ids = texts(1)[0]["input_ids"]
    mask = torch.zeros_like(ids)
    mask[:, :7] = 1
    short = [{"input_ids": ids[:, :7], "attention_mask": mask[:, :7]}]
    expected = input_squares(model, names, short)
    for other in (ids, ids.flip(0)):
        padded = torch.where(mask > 0, ids, other)
        found = input_squares(model, names, [{"input_ids": padded, "attention_mask": mask}])
        assert all(torch.equal(found[name], expected[name]) for name in names)
        batch = {"input_ids": padded, "attention_mask": mask}
        known = calibrate(model, [batch], {INPUTS: ["fc", "flat"]})
        counts = [known.moments(INPUTS, layer).count for layer in ("fc", "flat")]
        assert counts == [7 * len(ids)] * 2
    assert torch.equal(expected["fc.weight"], expected["flat.weight"])


def test_a_layer_that_is_called_twice_or_never() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.never = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x) + self.fc(input=3 * x)
            return out

    found = input_squares(Twice(), ["fc.weight", "never.weight"], [torch.tensor([[1.0, 2.0]])])
    assert found["fc.weight"].tolist() == [[10.0, 40.0]]
    assert found["never.weight"].tolist() == [[0.0, 0.0]]
    assert input_squares(Twice(), ["fc.weight"], [])["fc.weight"].tolist() == [[0.0, 0.0]]


def test_large_inputs_lose_nothing() -> None:
    """About 10⁴ with a spread of 10⁻², float32: the sum of squares to 10⁻¹²."""
    generator = torch.Generator().manual_seed(0)
    inputs = 1e4 + 1e-2 * torch.randn(3000, 5, generator=generator)
    found = input_squares(nn.Sequential(nn.Linear(5, 2)), ["0.weight"], inputs.split(7))
    expected = inputs.double().square().sum(0)
    torch.testing.assert_close(found["0.weight"][0], expected, rtol=1e-12, atol=0)


def test_the_model_is_left_as_it_was_and_runs_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    before = copy.deepcopy(model.state_dict())
    inputs = torch.randn(6, 3)
    first, again = (input_squares(model, ["3.weight"], [inputs]) for _ in range(2))
    assert torch.equal(first["3.weight"], again["3.weight"])
    model[0].weight.grad = torch.ones(4, 3)
    input_squares(model, ["3.weight"], [inputs])
    assert model.training
    assert model[0].weight.grad is not None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("1.weight", "of a BatchNorm1d"),
        ("2.weight", "of a ConvTranspose2d"),
        ("0.bias", "of a Linear"),
        ("9.weight", "nothing"),
        ("weight", "of a Sequential"),
    ],
)
def test_other_weights_are_refused(name: str, what: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ConvTranspose2d(1, 1, 2))
    with pytest.raises(CalibrationError, match=what):
        input_squares(model, [name], [])
    with pytest.raises(CalibrationError, match=what):
        rows_of(model, [name])
