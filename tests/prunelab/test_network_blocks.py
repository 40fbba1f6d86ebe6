"""Blocks of foreign networks and of any module tree, and hints where to cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunelab.errors import ModelError
from prunelab.networks import parameter_blocks
from prunelab.networks.blocks import MOST
from prunelab.networks.build import build_model
from sparsemodel.masks.mask import prunable_parameters


def blocks_of(model: nn.Module, **hint: Any) -> list[list[str]]:
    """Its blocks, each as the names of its layers."""
    blocks = parameter_blocks(model, granularity="block", **hint)
    assert [name for block in blocks for name in block] == list(prunable_parameters(model))
    return [[name.removesuffix(".weight") for name in block] for block in blocks]


def cuts(model: nn.Module, depth: int) -> list[str]:
    """Where its blocks begin, as the first parts of a name."""
    return [".".join(block[0].split(".")[:depth]) for block in blocks_of(model)]


@pytest.mark.parametrize(
    ("name", "depth", "expected"),
    [
        ("torchvision/resnet50", 1, ["layer1", "layer2", "layer3", "layer4"]),
        # The last convolution and both linear layers lie in the last of them.
        ("torchvision/mobilenet_v3_small", 2, [f"features.{i}" for i in range(1, 13)]),
        ("torchvision/efficientnet_b0", 2, [f"features.{i}" for i in range(1, 9)]),
        # A single convolution between stages goes with the stage behind it.
        ("torchvision/convnext_tiny", 2, [f"features.{i}" for i in (1, 2, 4, 6)]),
        ("torchvision/densenet121", 2,
         ["features.denseblock1", *(f"features.transition{i}" for i in (1, 2, 3))]),
        ("torchvision/vgg11", 2, ["features.3", "features.6", "features.11", "features.16",
                                  "classifier.0"]),
        ("torchvision/vit_b_32", 3, [f"encoder.layers.encoder_layer_{i}" for i in range(12)]),
        ("timm/mobilenetv3_small_100", 2, [f"blocks.{i}" for i in range(6)]),
        ("timm/convnext_atto", 2, [f"stages.{i}" for i in range(4)]),
        ("timm/test_vit", 2, [f"blocks.{i}" for i in range(6)]),
    ],
)  # fmt: skip
def test_blocks_of_libraries_networks(name: str, depth: int, expected: list[str]) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    with torch.device("meta"):
        model = build_model(name, num_classes=10, input_shape=(3, 64, 64), seed=0)
    assert cuts(model, depth) == expected
    assert blocks_of(model)[-1][-1].partition(".")[0] in {"classifier", "fc", "head", "heads"}


def test_blocks_of_encoders_are_their_layers_or_several() -> None:
    hf = pytest.importorskip("transformers")
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 9}
    end = {"bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 1}
    with torch.device("meta"):
        llama = hf.LlamaForCausalLM(hf.LlamaConfig(**size, **end, num_hidden_layers=20))
        bert = hf.BertForSequenceClassification(hf.BertConfig(**size, num_hidden_layers=3))
    assert cuts(llama, 3) == [f"model.layers.{i}" for i in range(0, 20, 2)]
    assert blocks_of(llama)[-1][-1] == "lm_head"
    assert cuts(bert, 4) == [f"bert.encoder.layer.{i}" for i in range(3)]
    assert blocks_of(bert)[-1][-2:] == ["bert.pooler.dense", "classifier"]
    assert [len(block) for block in blocks_of(bert)] == [6, 6, 8]


class UNet(nn.Module):
    """Halves and doubles the resolution, two levels of each."""

    def __init__(self) -> None:
        super().__init__()
        self.downs = nn.ModuleList([self.double(1, 4), self.double(4, 8)])
        self.middle = self.double(8, 16)
        self.ups = nn.ModuleList(
            [nn.ConvTranspose2d(16, 8, 2, 2), self.double(16, 8), self.double(8, 4)]
        )
        self.out = nn.Conv2d(4, 1, 1)

    @staticmethod
    def double(before: int, after: int) -> nn.Sequential:
        first, second = nn.Conv2d(before, after, 3), nn.Conv2d(after, after, 3)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())


def test_blocks_of_a_u_net_and_of_small_networks() -> None:
    assert blocks_of(UNet()) == [
        ["downs.0.2", "downs.1.0", "downs.1.2"],
        ["middle.0", "middle.2"],
        ["ups.1.0", "ups.1.2", "ups.2.0", "ups.2.2", "out"],
    ]
    linear = [nn.Linear(4, 4) for _ in range(30)]
    assert blocks_of(nn.Sequential(*linear[:2])) == [["1"]]
    assert blocks_of(nn.Sequential(*linear[:3])) == [["1"], ["2"]]
    assert blocks_of(nn.Sequential(*linear[:4])) == [["1"], ["2", "3"]]
    sizes = [len(block) for block in blocks_of(nn.Sequential(*linear))]
    assert len(sizes) == 10
    assert max(sizes) - min(sizes) <= 2


def tree(children: st.SearchStrategy[nn.Module]) -> st.SearchStrategy[nn.Module]:
    return st.lists(children, min_size=1, max_size=14).map(lambda parts: nn.Sequential(*parts))


LEAVES = st.sampled_from(["linear", "conv", "relu"]).map(
    lambda kind: {"linear": nn.Linear(2, 2), "conv": nn.Conv2d(2, 2, 1), "relu": nn.ReLU()}[kind]
)


@settings(max_examples=40, deadline=None)
@given(st.recursive(LEAVES, tree, max_leaves=30), st.data())
def test_every_prunable_layer_of_a_tree_is_in_one_block(inner: nn.Module, data: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), inner, nn.Linear(2, 2))
    blocks = blocks_of(model)
    assert all(blocks)
    assert len(blocks) <= MOST
    # Prefixes that each have a layer of their own, in the model's order.
    paths = [name.removesuffix(".weight") for name in prunable_parameters(model)]
    hint = data.draw(st.lists(st.sampled_from(paths), unique=True, min_size=1).map(sorted))
    found = blocks_of(model, hint=[path for path in paths if path in hint])
    assert [block[0] for block in found[1:]] == [path for path in paths if path in hint][1:]
    assert all(blocks_of(model, hint=2))


def test_a_hint_cuts_where_it_says() -> None:
    net = UNet()
    assert blocks_of(net, hint=["downs", "ups"]) == [
        ["downs.0.2", "downs.1.0", "downs.1.2", "middle.0", "middle.2"],
        ["ups.1.0", "ups.1.2", "ups.2.0", "ups.2.2", "out"],
    ]
    # What comes before the first goes with it; a longer name counts before a shorter one.
    assert [len(block) for block in blocks_of(net, hint=["middle", "ups", "ups.2"])] == [5, 2, 3]
    assert [block[0] for block in blocks_of(net, hint=1)] == ["downs.0.2", "middle.0", "ups.1.0",
                                                              "out"]  # fmt: skip
    with pytest.raises(ModelError, match=r"no prunable layer lies under 'down'; such as downs"):
        parameter_blocks(net, granularity="block", hint=["down"])
    # Registered from the output to the input: only a hint knows the order.
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    assert parameter_blocks(net, granularity="block", hint=["2", "1"]) == [
        ["2.weight"],
        ["1.weight"],
    ]
