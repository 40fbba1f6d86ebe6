"""Scores where the model is: nothing in a batch waits for the host, and pictures go up as bytes.

There is no GPU here. The meta device stands for one, whose tensors hold nothing that a host could
read; and what the host reads is counted, which must not grow with the batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("flwr", reason="Watch is in fedprune, which needs flwr")

from datapruning.embeddings import embed as embeddings
from datapruning.embeddings.pretrained import AT_ONCE
from datapruning.scores import gradient, hessian, influence
from datapruning.scoring import steps
from datapruning.scoring.methods import METHODS
from datapruning.scoring.parts import Parts
from datapruning.scoring.score import score
from datapruning.scoring.steps import Shard
from fedprune.local.captured import Watch
from prunelab.data.samples import ImageSamples, Samples, TargetSamples
from prunelab.networks import build_model
from prunelab.training.loop import TrainingConfig
from prunelab.training.task import ImageClassification, batch_on

META, CPU = torch.device("meta"), torch.device("cpu")
TASK = ImageClassification()


def network(seed: int = 0) -> nn.Module:
    model = build_model("resnet8", num_classes=4, input_shape=(1, 8, 8), seed=seed, width=4)
    return model.eval()


def pictures(count: int) -> ImageSamples:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=random)
    return ImageSamples(images, torch.arange(count) % 4)


# --- a batch -------------------------------------------------------------------------------------


class Crossing(TorchDispatchMode):
    """Notes what goes from the CPU to the meta device: types and shapes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[torch.dtype, tuple[int, ...]]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch's compiler is imported, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        first = args[0] if args else None
        if isinstance(first, Tensor) and isinstance(found, Tensor) and first.device != found.device:
            self.seen.append((first.dtype, tuple(first.shape)))
        return found


class Own(ImageSamples):
    """Whose batches are made in another way."""

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = super().batch(rows)
        return images.double(), labels


ROWS = torch.tensor([3, 0, 1])
INTS = (torch.int64, (3,))


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (pictures(4), [(torch.uint8, (3, 1, 8, 8)), INTS]),
        (Own(pictures(4).images, pictures(4).labels), [(torch.float64, (3, 1, 8, 8)), INTS]),
        (
            TargetSamples(pictures(4).images, torch.rand(4)),
            [(torch.uint8, (3, 1, 8, 8)), (torch.float32, (3,))],
        ),
    ],
    ids=["pictures", "a batch of its own", "targets"],
)
def test_what_is_stored_goes_up(samples: Samples, expected: list[Any]) -> None:
    with Crossing() as crossing:
        there = batch_on(samples, ROWS, META)
    assert crossing.seen == expected
    here = batch_on(samples, ROWS, CPU)
    for theirs, ours, plain in zip(there, here, samples.batch(ROWS), strict=True):
        assert torch.equal(ours, plain)
        assert (theirs.device, theirs.dtype, theirs.shape) == (META, plain.dtype, plain.shape)


@pytest.mark.parametrize(
    "of_batch",
    [
        lambda model, batch, q: gradient.norms(TASK, model, batch),
        lambda model, batch, q: influence.products(TASK, model, batch, q),
        lambda model, batch, q: TASK.embedding(model, batch),
    ],
    ids=["GraNd", "influence", "embedding"],
)
def test_a_batch_neither_waits_nor_copies(of_batch: Callable[..., Tensor]) -> None:
    model = network().to(META)
    batch = batch_on(pictures(8), torch.arange(8), META)
    q = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with Watch(META) as watch:
        found = of_batch(model, batch, q)
    assert (found.device, len(found)) == (META, 8)
    # Layers that wait for their gradient have an empty tensor of the host's in its place.
    assert {found.partition(":")[0] for found in watch.obstacles} <= {"aten.empty.memory_format"}


# --- many batches --------------------------------------------------------------------------------


class Reads(TorchFunctionMode):
    """Counts by how many calls the host reads tensors, on whatever device they are."""

    KINDS = ("cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.KINDS and not (isinstance(args[0], Tensor) and args[0].is_meta):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def reads(call: Callable[[], object]) -> Counter[str]:
    with Reads() as found:
        call()
    return found.counts


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "BATCH", 4)


def shard_of(count: int, prepared: Any = None) -> Shard:
    model = network()
    return Shard(
        samples=pictures(count), task=TASK, rows=torch.arange(count), device=CPU, num_runs=1,
        models=lambda run: [model], in_subset=lambda: torch.ones(1, count).bool(),
        prepared=prepared,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["el2n", "grand", "tracin", "prototypes-supervised"])
def test_a_shard_is_read_once_whatever_its_batches(name: str, small_batches: None) -> None:
    observe = METHODS[name].observe
    assert observe is not None
    q = {name: torch.ones_like(p) for name, p in network().named_parameters()}
    found = [reads(lambda n=n: observe(shard_of(n, q))) for n in (8, 24)]
    assert found[0] == found[1]
    assert found[0]["cpu"] >= 1


def test_influence_of_all_samples_is_read_once() -> None:
    model, names = network(), ["fc.weight"]
    v = influence.mean_gradient(TASK, model, pictures(8), parameters=names)
    found = [
        reads(lambda n=n: influence._all_products(TASK, model, pictures(n), v, 4)) for n in (8, 24)
    ]
    assert found[0] == found[1]


def test_embeddings_are_read_once_a_block() -> None:
    def of(blocks: int) -> Counter[str]:
        samples = pictures(2 * AT_ONCE * blocks)
        return reads(lambda: embeddings.embed_by_task(samples, TASK, network(), batch_size=2))

    assert [of(blocks)["cpu"] for blocks in (1, 3)] == [1, 3]


def test_lissa_is_looked_at_now_and_then() -> None:
    model, names = network(), ["fc.weight"]
    product = hessian.Product(TASK, model, names, 0.1)
    batch = pictures(4).batch(torch.arange(4))
    h = torch.ones(model.get_parameter("fc.weight").numel())

    def of(depth: int) -> Counter[str]:
        return reads(lambda: hessian.lissa(product, lambda: batch, h, depth=depth, scale=100.0))

    assert of(3) == of(hessian.LISSA_LOOKS)


def test_models_and_directions_are_read_once_for_all_shards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two runs' models at two moments and a direction, though there are six shards."""
    loaded: Counter[str] = Counter()
    load = Parts.load

    def counted(parts: Parts, name: str) -> Any:
        loaded[name] += 1
        return load(parts, name)

    monkeypatch.setattr(Parts, "load", counted)
    arguments: dict[str, Any] = {
        "method": ["el2n-20", "influence-cg"], "model": network, "runs": 2, "shard_size": 4,
        "training": TrainingConfig(epochs=2, batch_size=8, lr=0.01), "options": {"damping": 1.0},
    }  # fmt: skip
    kept = score(pictures(24), **arguments)
    models = {name: count for name, count in loaded.items() if "epoch-" in name}
    # The model was read to make the direction, too, and the direction looked for before.
    assert models == {
        "run-100-000/epoch-0001.pt": 1,
        "run-100-001/epoch-0001.pt": 1,
        "run-100-000/epoch-0002.pt": 2,
    }
    assert loaded["influence-cg.pt"] == 2 + 1
    monkeypatch.setattr("datapruning.scoring.jobs.OPEN_BYTES", 0)
    again = score(pictures(24), **arguments)
    assert loaded["run-100-001/epoch-0001.pt"] == 1 + 6
    for name, table in kept.items():
        assert torch.equal(again[name].scores, table.scores)


def test_a_trained_model_has_tracin_at_its_last_moment() -> None:
    """As benchmarks.gpu_scores asks for it: η ⟨∇ℓ_i, v⟩ of the model as it is."""
    method = replace(METHODS["tracin"], moments="last", name="tracin of one model")
    model, samples = network(), pictures(6)
    training = TrainingConfig(epochs=1, lr=0.5)
    table = score(samples, method=method, model=model, training=training)
    v = influence.mean_gradient(TASK, model, samples)
    expected = influence.influence_of(TASK, model, samples.batch(torch.arange(6)), v)
    torch.testing.assert_close(table.scores / table.scores[0], expected / expected[0])
