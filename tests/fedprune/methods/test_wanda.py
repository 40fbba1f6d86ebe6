"""Wanda over clients: the mask and the norms are those of all their samples in one place."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import digest, laid_out, places_of, run_inline, tiny
from flwr.app import Context, Error, Message
from torch import Tensor, nn

import fedprune
from fedprune.errors import ClientError, ConfigError
from fedprune.exchange.gate import check_parts
from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.exchange.pooled import Pooled
from fedprune.exchange.wide import PARTS, joined
from fedprune.flower import client as real
from fedprune.flower import wire
from fedprune.local.data import ClientData, Split
from fedprune.local.model import Network
from fedprune.local.site import Local
from fedprune.methods.base import Start
from fedprune.methods.calibrated import SQUARES, Wanda, measure, union_squares
from fedprune.privacy.vector import Spec, num_words, pooled_of, vector_of
from fedprune.rounds.folder import read_metrics, read_model, read_summary, stored_config
from fedprune.rounds.setup import Setup
from fedprune.rounds.workspace import _opened, open_workspace
from prunelab.data.given import forget
from prunelab.data.samples import ImageSamples, TokenSamples
from prunelab.data.tensors import batch_of
from prunelab.errors import RunError
from prunelab.networks import float_state
from sparsemodel.errors import CodecError
from sparsemodel.layers.from_state import load_state_
from sparsemodel.masks.mask import prunable_parameters
from sparsemodel.masks.prune import prune
from sparsemodel.runtime.pattern import Patterns
from sparsemodel.runtime.state import SparseState

Build = Callable[[], nn.Module]
Samples = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)
    )


class Convnet(nn.Module):
    """Two convolutions, of which one has groups, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.conv = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.conv(self.stem(x).relu()).relu().mean((2, 3)))
        return out


def samples_of(
    counts: Sequence[int], shape: tuple[int, ...], *, mean: float = 0.0
) -> list[Samples]:
    """Those of clients, each on a scale of its own."""
    random = np.random.default_rng(0)
    return [
        (
            (mean + (1 + place) * random.normal(size=(count, *shape))).astype(np.float32),
            random.integers(0, 4, count),
        )
        for place, count in enumerate(counts)
    ]


@dataclasses.dataclass(frozen=True)
class Federation:
    """Clients in this process, asked as a run asks them."""

    build: Build
    samples: Sequence[Samples]

    @property
    def state(self) -> SparseState:
        return SparseState({n: v.numpy() for n, v in float_state(self.build()).items()})

    def place(self, client: int) -> Local:
        inputs, targets = self.samples[client]
        own, none = Split(inputs, targets), Split(inputs[:0], targets[:0])
        data = ClientData(own, none, none, 4, "classification")
        shapes = {name: value.shape for name, value in self.state.values.items()}
        config = tiny(method__name="wanda", training__execution="dense")
        return Local(client, data, config, Network(None, self.build, shapes))

    def replies(self, request: Request, order: Sequence[int]) -> Iterator[tuple[int, Reply]]:
        for client in order:
            try:
                reply = measure(request, self.place(client))
            except ClientError:
                continue
            check_parts(reply, request)
            yield client, reply

    def start(self, order: Sequence[int], *, secure: bool = False) -> Start:
        def ask(request: Request) -> Iterator[tuple[int, Reply]]:
            for client, reply in self.replies(request, order):
                request.check(reply)
                yield client, reply

        def masked(request: Request) -> Pooled:
            """The sum of vectors that clients send under masks, the masks left out."""
            assert request.expected.tensors.keys() == PARTS.keys()
            answered = list(self.replies(request, order))
            weights = {client: reply.num_examples for client, reply in answered}
            whole = sum(len(targets) for _, targets in self.samples)
            spec = Spec.of(request, "a session", order, total_weight=whole)
            shapes = {name: value.shape for name, value in self.state.values.items()}
            total = np.zeros(num_words(request, spec, shapes), np.uint64)
            for _, reply in answered:
                total += vector_of(reply, spec.asked(request), spec)
            total %= np.uint64(2 ** (8 * spec.width))
            return pooled_of(total, request, spec, shapes, weights=weights)[0]

        prunable = {n: tuple(p.shape) for n, p in prunable_parameters(self.build()).items()}
        return Start(
            lambda: self.state, prunable, {}, ask, 2, 7,
            place=lambda: self.place(0), pooler=masked if secure else None,
        )  # fmt: skip

    def batches(self, clients: Sequence[int]) -> list[Samples]:
        """All samples of some clients."""
        return [
            batch_of(*self.samples[client]) for client in clients if len(self.samples[client][1])
        ]

    def central(self, clients: Sequence[int], method: Wanda) -> Patterns:
        """The mask of `prune` on all samples at once; of linear layers alone."""
        return prune(
            self.build(), method.density, criterion="wanda", within=method.within,
            distribution=method.distribution, data=self.batches(clients),
        ).csr()  # fmt: skip


COUNTS = (30, 7, 0, 101)


@pytest.fixture(scope="module")
def federation() -> Federation:
    """An MLP and four clients, of which one has no samples."""
    return Federation(mlp, samples_of(COUNTS, (6,)))


# --- the mask ------------------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"density": 0.3},
        {"density": 0.3, "within": "layer"},
        {"density": 0.5, "within": "2:4"},
        {"density": 0.25, "within": "1:4"},
        {"density": 0.1, "within": "row", "distribution": "erk"},
    ],
)
def test_the_mask_is_that_of_all_samples_in_one_place(
    settings: dict[str, Any], secure: bool, federation: Federation
) -> None:
    method = Wanda(**settings)
    clients = [0, 1, 2, 3]
    expected = federation.central(clients, method)
    masks = [
        method.mask(federation.start(order, secure=secure))
        for order in (clients, clients[::-1], [2, 3, 0, 1])
    ]
    assert masks == [expected] * 3
    assert expected.num_active == round(method.density * expected.num_weights)
    assert expected != federation.central([0], method)


@pytest.mark.parametrize("secure", [False, True])
def test_who_drops_out_is_missing_and_no_more(secure: bool, federation: Federation) -> None:
    method = Wanda(0.3)
    for kept in itertools.combinations(range(4), 3):
        if len(federation.batches(kept)) < 2:
            continue
        assert method.mask(federation.start(kept, secure=secure)) == federation.central(
            kept, method
        )


def test_the_start_s_weights_are_kept_as_they_are(federation: Federation) -> None:
    state = Wanda(0.3).start(federation.start([0, 1, 3])).model
    dense = federation.state
    assert state.patterns is not None
    for name, value in dense.values.items():
        pattern = state.patterns.get(name)
        held = value if pattern is None else value.reshape(-1)[pattern.positions()]
        assert np.array_equal(state.values[name], held)


def test_a_planted_input_is_found() -> None:
    """Weights of one size; of three inputs of the last layer one is ten times as large."""

    class Planted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fc = nn.Linear(3, 3), nn.Linear(3, 4)
            with torch.no_grad():
                self.stem.weight.copy_(torch.diag(torch.tensor([1.0, 10.0, 1.0])))
                self.fc.weight.fill_(-1.0)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(self.stem(x))
            return out

    one = Federation(Planted, samples_of((9, 5), (3,)))
    patterns = Wanda(1 / 3).mask(one.start([0, 1]))
    assert patterns["fc.weight"].positions().tolist() == [1, 4, 7, 10]


def test_convolutions_are_pruned_by_their_patches() -> None:
    """The same by unfolding: |w| times the norm of the patch's place, within each output."""
    one = Federation(Convnet, samples_of((12, 20), (1, 8, 8)))
    patterns = Wanda(0.25).mask(one.start([1, 0]))
    assert set(patterns) == {"conv.weight", "fc.weight"}
    model = Convnet()
    inputs = torch.cat([batch[0] for batch in one.batches([0, 1])]).double()  # type: ignore[arg-type]
    with torch.no_grad():
        patches = nn.functional.unfold(model.double().stem(inputs).relu(), 3, padding=1)
    norms = patches.square().sum((0, 2)).sqrt().reshape(2, 18)  # by group
    scores = model.conv.weight.detach().abs().reshape(2, 3, 18) * norms[:, None]
    rows = scores.reshape(6, 18)
    active = np.zeros(6 * 18, bool)
    active[patterns["conv.weight"].positions()] = True
    for row, kept in zip(rows, active.reshape(6, 18), strict=True):
        expected = row.topk(int(kept.sum())).indices.sort().values
        assert np.flatnonzero(kept).tolist() == expected.tolist()
        assert kept.sum() in {4, 5}


# --- the statistic -------------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1.0, 1e4, 1e8])
def test_the_sums_are_those_of_the_union(scale: float, secure: bool) -> None:
    """Inputs about the scale, spread a little or a lot, one client empty: to a relative 10⁻⁶."""
    parts = samples_of((50, 3, 0, 400), (6,), mean=3.0)
    scaled = [((scale * inputs).astype(np.float32), targets) for inputs, targets in parts]
    one = Federation(lambda: nn.Sequential(nn.Linear(6, 4)), scaled)
    found = union_squares(one.start([3, 2, 0, 1], secure=secure), {"0.weight": (1, 6)})
    union = np.concatenate([inputs for inputs, _ in scaled]).astype(np.float64)
    np.testing.assert_allclose(found["0.weight"][0], (union**2).sum(0), rtol=2.0**-22)


def test_a_mean_of_ten_thousand_and_a_spread_of_one() -> None:
    random = np.random.default_rng(3)
    parts = [
        ((1e4 + random.normal(size=(n, 6))).astype(np.float32), np.zeros(n, np.int64))
        for n in (40, 0, 25)
    ]
    one = Federation(lambda: nn.Sequential(nn.Linear(6, 4)), parts)
    union = np.concatenate([inputs for inputs, _ in parts]).astype(np.float64)
    for secure in (False, True):
        found = union_squares(one.start([0, 1, 2], secure=secure), {"0.weight": (1, 6)})
        np.testing.assert_allclose(found["0.weight"][0], (union**2).sum(0), rtol=1e-6)


def test_clients_at_both_ends_of_the_range() -> None:
    """One whose inputs are 10⁻⁸ and one whose are 10⁷, of other features each."""
    random = np.random.default_rng(3)
    scales = np.array([[1e-8, 1e7, 1.0], [1e-8, 1.0, 0.0]])
    parts = [
        ((scale * random.normal(size=(20, 3))).astype(np.float32), np.zeros(20, np.int64))
        for scale in scales
    ]
    one = Federation(lambda: nn.Sequential(nn.Linear(3, 4)), parts)
    union = np.concatenate([inputs for inputs, _ in parts]).astype(np.float64)
    for secure in (False, True):
        found = union_squares(one.start([0, 1], secure=secure), {"0.weight": (1, 3)})
        np.testing.assert_allclose(found["0.weight"][0], (union**2).sum(0), rtol=1e-6)


def asked(federation: Federation, layers: Any) -> Request:
    return Request(SQUARES, fields={"layers": layers}, states={MODEL: federation.state})


def test_a_client_sends_a_number_an_input_and_no_more(federation: Federation) -> None:
    reply = measure(asked(federation, ["2.weight", "4.weight"]), federation.place(1))
    assert (reply.num_examples, reply.fields, reply.states) == (7, {}, {})
    assert set(reply.tensors) == set(PARTS)
    shapes = {name: value.shape for name, value in joined(reply.tensors).items()}
    assert shapes == {"2.weight": (1, 24), "4.weight": (1, 16)}


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, "2.weight", ["what"], [3], {"2.weight": 1}])
def test_layers_that_are_not_there_are_refused(layers: Any, federation: Federation) -> None:
    with pytest.raises(ClientError, match="field 'layers'"):
        measure(asked(federation, layers), federation.place(0))


def test_a_client_without_samples_says_so(federation: Federation) -> None:
    with pytest.raises(ClientError, match="no training sample"):
        measure(asked(federation, ["2.weight"]), federation.place(2))


def test_no_answer_is_an_error(federation: Federation) -> None:
    with pytest.raises(RunError, match="no client could measure"):
        Wanda(0.3).mask(federation.start([2]))


def test_inputs_that_are_not_finite_are_refused() -> None:
    odd = np.full((3, 6), np.inf, np.float32), np.zeros(3, np.int64)
    one = Federation(mlp, [odd])
    with pytest.raises(ClientError, match=r"'2.weight' holds numbers below 0, of 2\^60"):
        measure(asked(one, ["2.weight"]), one.place(0))


class Attending(nn.Module):
    """Whose attention uses the weight of a linear layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Linear(6, 8), nn.Linear(8, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x)[:, None]
        out: Tensor = self.fc(self.attention(hidden, hidden, hidden)[0][:, 0])
        return out


def test_a_layer_that_no_input_reaches_is_named() -> None:
    one = Federation(Attending, samples_of((9,), (6,)))
    with pytest.raises(RunError, match=r"has reached attention\.out_proj\.weight at any client"):
        Wanda(0.3).mask(one.start([0]))


def test_rows_that_do_not_divide_are_named_before_anybody_is_asked() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))

    one = Federation(build, samples_of((9,), (6,)))

    def nobody(request: Request) -> Pooled:
        raise AssertionError("asked")

    server = dataclasses.replace(one.start([0]), pooler=nobody)
    with pytest.raises(RunError, match=r"those of '2.weight' have 10 weights"):
        Wanda(0.5, within="2:4").mask(server)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"within": "column"}, "method.within: expected 'row', 'layer' or such as '2:4'"),
        ({"within": "5:4", "density": 0.5}, "method.within: expected"),
        ({"within": "0:4", "density": 0.5}, "method.within: expected"),
        ({"within": "2:4", "density": 0.3}, "method.density: '2:4' keeps 0.5 of all weights"),
        ({"within": "2:4", "density": 0.5, "distribution": "erk"}, "method.distribution: '2:4'"),
        ({"distribution": "global"}, "method.distribution: expected one of uniform, erk, erk-conv"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        Wanda(**settings)


@pytest.mark.parametrize("change", ["part", "layer", "negative", "nan", "shape"])
def test_answers_are_checked(change: str, federation: Federation) -> None:
    """What lacks a part or a layer, or holds what no sum of squares is."""
    seen: list[Request] = []

    def pooler(request: Request) -> Pooled:
        seen.append(request)
        return Pooled([], 0)

    with pytest.raises(RunError):
        Wanda(0.3).mask(dataclasses.replace(federation.start([0]), pooler=pooler))
    (request,) = seen
    reply = measure(request, federation.place(0))
    tensors = {part: dict(some) for part, some in reply.tensors.items()}
    shapes = {name: value.shape for name, value in federation.state.values.items()}

    def through(odd: Mapping[str, Any]) -> None:
        sent = wire.encode_reply(Reply(30, tensors=odd), request, dtype="fp16")
        back = wire.decode_reply(sent, request, shapes=shapes)
        check_parts(back, request)
        request.check(back)
        for part, some in odd.items():  # exactly, whatever type models travel in
            assert all(np.array_equal(back.tensors[part][name], v) for name, v in some.items())

    through(tensors)
    if change == "part":
        del tensors["large"]
    elif change == "layer":
        del tensors["middle"]["2.weight"]
    elif change == "shape":  # the model's
        tensors["middle"]["2.weight"] = federation.state.values["2.weight"]
    else:
        worth = -1.0 if change == "negative" else np.nan
        tensors["middle"]["2.weight"] = np.full((1, 24), worth, np.float32)
    with pytest.raises((ClientError, CodecError)):
        through(tensors)


# --- runs ----------------------------------------------------------------------------------------


RUN: dict[str, Any] = {"method__name": "wanda", "training__rounds": 1, "data__num_train": 160}


def gone(*clients: int) -> Any:
    """The real ClientApp on nodes of which some fail when they are asked to measure."""

    def app(message: Message, context: Context) -> Message | None:
        header, _ = wire.read_record(message.content)
        if header["a"] == SQUARES and int(context.node_config["partition-id"]) in clients:
            return Message(Error(code=2, reason="the node is gone"), reply_to=message)
        return real.app(message, context)

    return app


@pytest.mark.parametrize("dropped", [(), (1,)])
def test_a_secure_run_has_the_bits_of_a_plain_one(dropped: tuple[int, ...], tmp_path: Path) -> None:
    """Through the real protocol, with everybody and without one; another client, another mask."""
    settings = {**RUN, "federation__quorum": 0.5}
    plain = run_inline(tiny(**settings), tmp_path / "plain", clients=gone(*dropped))
    private = tiny(**settings, privacy__secure_aggregation=True)
    out = run_inline(private, tmp_path / "secure", clients=gone(*dropped))
    assert digest_of(out) == digest_of(plain)
    assert [s["client"] for s in read_metrics(out)[0]["skipped"]] == list(dropped)
    assert {s["client"] for s in read_metrics(plain)[0]["skipped"]} == set(dropped)


def digest_of(out: Path) -> tuple[str, bytes]:
    state = read_model(out)[0]
    assert state.patterns is not None
    return state.patterns.digest(), b"".join(v.tobytes() for v in state.values.values())


def test_bytes_of_the_start_are_those_of_the_sums(tmp_path: Path) -> None:
    """Twelve bytes an input, and not a tenth of the dense model that came down for it."""
    out = run_inline(tiny(**{**RUN, "model__width": 8}), tmp_path / "run")
    setup = laid_out(tmp_path / "setup", **{**RUN, "model__width": 8})
    inputs = sum(int(np.prod(shape[1:])) for shape in setup.prunable.values())
    summary = read_summary(out)
    assert 12 * inputs < summary["bytes_start_up"] < 12 * inputs + 1500
    assert summary["bytes_start_down"] > summary["bytes_dense_round"]
    # A forward pass over all training samples, of which training takes three: a third of a round.
    other = {**RUN, "model__width": 8, "method__name": "magnitude"}
    without = read_summary(run_inline(tiny(**other), tmp_path / "magnitude"))
    spent = summary["train_flops_ratio"] - without["train_flops_ratio"]
    assert spent == pytest.approx(1 / 3, rel=1e-6)


def test_two_runs_have_the_same_bits_whatever_the_test_side_holds(tmp_path: Path) -> None:
    first = digest(run_inline(tiny(**RUN), tmp_path / "one"))
    work = open_workspace(tiny(**RUN))
    test = work.dataset.test
    poisoned = ImageSamples(test.images.flip(0), (test.labels + 1) % 10)
    object.__setattr__(work.dataset, "test", poisoned)
    try:
        assert digest(run_inline(tiny(**RUN), tmp_path / "two")) == first
    finally:
        _opened.cache_clear()
        forget()


def test_a_federation_s_mask_is_that_of_its_clients_training_samples(tmp_path: Path) -> None:
    """resnet8, batch norms by their running statistics; neither dev samples nor the server's."""
    setup = laid_out(tmp_path, **RUN, data__alpha=0.3)
    places = places_of(setup)

    def ask(request: Request) -> Iterator[tuple[int, Reply]]:
        yield from ((place.client, measure(request, place)) for place in places)

    server = Start(setup.start_state, setup.prunable, setup.blocks, ask, 1, 7, place=setup.place)
    patterns = Wanda(0.2).mask(server)
    weights = sum(pattern.num_weights for pattern in patterns.values())
    assert patterns.num_active == round(0.2 * weights)
    model = setup.network.build()
    load_state_(model, setup.start_state())
    batches = [batch_of(p.data.train.inputs, p.data.train.targets) for p in places]
    counts = {"fc.weight": patterns["fc.weight"].num_active}
    fc = prune(
        model, 0.2, criterion="wanda", within="row", names=list(counts), data=batches,
        distribution=lambda: counts,
    )  # fmt: skip
    assert set(patterns) == set(setup.prunable)
    assert patterns["fc.weight"] == fc.csr()["fc.weight"]


# --- language models -----------------------------------------------------------------------------


def texts(count: int = 90) -> TokenSamples:
    """Ascending token ids, 4 to 10 of them; behind them whatever."""
    random = np.random.default_rng(0)
    ids = np.cumsum(random.integers(1, 3, (count, 10)), 1) % 29 + 1
    mask = (np.arange(10) < random.integers(4, 11, count)[:, None]).astype(np.int64)
    return TokenSamples(ids, mask, np.where(mask > 0, ids, -100))


def language_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.filterwarnings("ignore:the samples have no classes")
@pytest.mark.parametrize("secure", [False, True])
def test_a_language_model_over_three_clients(secure: bool, tmp_path: Path) -> None:
    """The mask is that of `prune` on all their texts; then they train a round on it."""
    result = fedprune.run(
        model=language_model, data=texts(), method=Wanda(0.5), rounds=1, clients=3,
        optimizer="adamw", folder=tmp_path / "run",
        settings={
            "training.batch_size": 16, "training.lr": 0.01, "server.pretrain_epochs": 1,
            "privacy.secure_aggregation": secure,
        },
    )  # fmt: skip
    work = open_workspace(stored_config(result.folder))
    work.lay_out(tmp_path / "setup", with_start=True)
    setup = Setup(work.config, tmp_path / "setup")
    start = setup.start_state()
    model = setup.network.build()
    load_state_(model, start)
    batches = []
    for place in places_of(setup):
        own = place.data.train
        assert (own.inputs < 0).any()  # padded
        batches.append(batch_of(own.inputs, own.targets))
    names = list(setup.prunable)
    assert any("q_proj" in name for name in names)
    mask = prune(model, 0.5, criterion="wanda", within="row", names=names, data=batches)
    assert result.state.patterns == mask.csr()
    assert result.state.patterns.num_active == round(0.5 * mask.num_weights)
    moved = [
        not np.array_equal(result.state.values[n], start.values[n].reshape(-1)[p.positions()])
        for n, p in result.state.patterns.items()
    ]
    assert all(moved)
    lines = result.metrics
    assert [line["skipped"] for line in lines] == [[], []]
    assert np.isfinite(lines[-1]["test_loss"])
