"""Sparse proxies: their masks, that they leave the model alone, and that their scores mean it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from datapruning.scoring.proxy import sparse_proxy
from datapruning.selection.agreement import spearman
from prunelab.data.datasets import load_dataset
from prunelab.data.samples import ImageSamples
from prunelab.networks import build_model
from prunelab.training.loop import TrainingConfig, predict, train
from prunelab.training.task import ImageClassification
from sparsemodel.errors import DensityError, MaskError
from sparsemodel.layers.sparsify import densify, mask_of
from sparsemodel.masks import criteria
from sparsemodel.masks.distribution import erk, global_ranking
from sparsemodel.masks.mask import mask_from_scores, prunable_parameters

TASK = ImageClassification()


def digits(num: int = 300) -> ImageSamples:
    return ImageSamples.of(load_dataset("digits", num_train=num))


def network(seed: int = 0, *, dropout: float = 0.0) -> nn.Module:
    model = build_model("resnet8", num_classes=10, input_shape=(1, 8, 8), seed=seed, width=8)
    return nn.Sequential(model.eval(), nn.Dropout(dropout))


@pytest.mark.parametrize("criterion", ["snip", "magnitude"])
@pytest.mark.parametrize("density", [0.05, 0.5])
def test_density_is_exact_and_the_model_is_left_alone(criterion: str, density: float) -> None:
    model = network(dropout=0.2)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    proxy = sparse_proxy(model, digits(), TASK, density=density, criterion=criterion)
    mask = mask_of(proxy)
    assert list(mask) == list(prunable_parameters(model))
    assert mask.num_active == round(density * mask.num_weights)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    dense = densify(proxy).state_dict()
    for name, pattern in mask.items():
        assert torch.equal(dense[name], before[name] * pattern)


def test_masks_are_those_of_the_criteria() -> None:
    """SNIP of all samples (fewer than 256), in train mode, ranked over layers; |θ| by layer."""
    model, samples = network(), digits(200)
    names = list(prunable_parameters(model))
    shapes = {name: tuple(p.shape) for name, p in prunable_parameters(model).items()}
    magnitudes = criteria.magnitude(model, names)
    expected = mask_from_scores(magnitudes, erk(shapes, 0.1))
    assert mask_of(sparse_proxy(model, samples, TASK, density=0.1, criterion="magnitude")) == (
        expected
    )
    batch = samples.batch(torch.arange(200))
    scores = criteria.snip(model.train(), names, lambda m: TASK.loss(m, batch).mean())
    expected = mask_from_scores(scores, global_ranking(scores, 0.1))
    found = mask_of(sparse_proxy(model.eval(), samples, TASK, density=0.1, criterion="snip"))
    # Sums in another order may swap weights at the threshold.
    same = sum(int((found[name] & expected[name]).sum()) for name in names)
    assert same >= 0.99 * expected.num_active


def test_the_seed_alone_decides() -> None:
    """Dropout and the choice of 256 of 300 samples among it."""
    masks = []
    for noise, seed in ((0, 1), (1, 1), (0, 2)):
        torch.manual_seed(noise)
        proxy = sparse_proxy(network(dropout=0.5), digits(), TASK, density=0.1, criterion="snip",
                             seed=seed)  # fmt: skip
        masks.append(mask_of(proxy))
    assert masks[0] == masks[1] != masks[2]


def test_scores_of_a_proxy_agree_with_a_dense_models() -> None:
    """EL2N at density .1 after five epochs: nearly as alike as another dense network's."""
    samples, config = digits(600), TrainingConfig(epochs=5, lr=0.1)

    def el2n(model: nn.Module) -> Tensor:
        logits, labels = predict(model, samples, TASK)
        error = logits.double().softmax(1)
        error[torch.arange(len(labels)), labels] -= 1
        return error.norm(dim=1)

    dense = []
    for seed in (0, 1):
        model = network(seed)
        train(model, samples, TASK, config=config, seed=seed)
        dense.append(el2n(model))
    proxy = sparse_proxy(network(1), samples, TASK, density=0.1, seed=1)
    train(proxy, samples, TASK, config=config, seed=1)
    assert spearman(dense[0], el2n(proxy)) > 0.75 * spearman(dense[0], dense[1]) > 0.3


def test_refusals() -> None:
    with pytest.raises(MaskError, match="unknown criterion 'size'; known: magnitude"):
        sparse_proxy(network(), digits(), TASK, density=0.1, criterion="size")
    with pytest.raises(DensityError, match="lowest density possible"):
        sparse_proxy(network(), digits(), TASK, density=1e-6)
