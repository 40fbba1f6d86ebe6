"""SASRec against torch's own encoder, its losses against plain ones, and its training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from datapruning.recommend.sasrec import NextItem, SASRec, batches_by_length, position_losses
from datapruning.recommend.surrogate import (
    SurrogateConfig,
    evaluate,
    popularity_recommender,
    sasrec_recommender,
    train_surrogate,
)
from prunelab.errors import RunError

from .made import made_histories


class PlainSASRec(nn.Module):
    """The same network from torch's parts, histories padded on the left to one length."""

    def __init__(self, num_items: int, *, hidden: int, max_length: int, dropout: float) -> None:
        super().__init__()
        self.max_length = max_length
        self.items = nn.Embedding(num_items + 1, hidden, padding_idx=0)
        self.places = nn.Embedding(max_length, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            hidden, 2, 4 * hidden, dropout, activation="gelu", batch_first=True
        )
        layer.dropout.p = 0.0  # torch has one more, inside the feed-forward part
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, history: Tensor) -> Tensor:
        length = history.shape[1]
        assert length == self.max_length
        x = self.dropout(self.norm(self.items(history) + self.places.weight))
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        # Padding sees itself, or its softmax would be over nothing.
        hidden = (history == 0)[:, None, :] & ~torch.eye(length, dtype=torch.bool)
        mask = (causal | hidden).repeat_interleave(2, dim=0)
        return self.encoder(x, mask=mask)


def copied_into_plain(model: SASRec) -> PlainSASRec:
    hidden = model.items.embedding_dim
    plain = PlainSASRec(model.num_items, hidden=hidden, max_length=model.max_length, dropout=0.0)
    plain.items.weight.data = model.items.weight.data
    plain.places.weight.data = model.positions.weight.data.flip(0)  # from the past to the present
    plain.norm.load_state_dict(model.norm.state_dict())
    for block, layer in zip(model.blocks, plain.encoder.layers, strict=True):
        layer.self_attn.in_proj_weight.data = block.attention.joint.weight.data
        layer.self_attn.in_proj_bias.data = block.attention.joint.bias.data
        layer.self_attn.out_proj.load_state_dict(block.attention.output.state_dict())
        layer.linear1.load_state_dict(block.inner.state_dict())
        layer.linear2.load_state_dict(block.outer.state_dict())
        layer.norm1.load_state_dict(block.attention_norm.state_dict())
        layer.norm2.load_state_dict(block.norm.state_dict())
    return plain.eval()


def shaken(num_items: int, **options: object) -> SASRec:
    """A model whose every parameter is random, biases and norms as well."""
    torch.manual_seed(0)
    model = SASRec(num_items, **options)  # type: ignore[arg-type]
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model.eval()


def test_it_is_torchs_encoder_with_causal_attention_and_no_padding() -> None:
    model = shaken(9, hidden=8, max_length=6)
    history = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 0, 0, 0, 0], [5, 3, 5, 0, 0, 0]])
    left = torch.tensor([[3, 1, 4, 1, 5, 9], [0, 0, 0, 0, 2, 6], [0, 0, 0, 5, 3, 5]])
    ours, plain = model(history), copied_into_plain(model)(left)
    for row, length in enumerate([6, 2, 3]):
        torch.testing.assert_close(ours[row, :length], plain[row, 6 - length :])
    torch.testing.assert_close(model.last(history), plain[:, -1])


def test_neither_padding_nor_neighbours_nor_the_future_change_a_history() -> None:
    model = shaken(9, hidden=8, max_length=6)
    alone = model(torch.tensor([[2, 6, 7]]))
    together = model(torch.tensor([[2, 6, 7, 0, 0, 0], [1, 2, 3, 4, 5, 6]]))
    torch.testing.assert_close(alone[0], together[0, :3])
    # The item that follows moves the positions, so compare what attention alone lets through.
    model.positions.weight.data.zero_()
    torch.testing.assert_close(
        model(torch.tensor([[2, 6]]))[0], model(torch.tensor([[2, 6, 7]]))[0, :2]
    )


def test_losses_at_every_position_are_those_of_each_prefix() -> None:
    model = shaken(9, hidden=8, max_length=6)
    model.positions.weight.data.zero_()  # see above
    sequences = torch.tensor([[3, 1, 4, 1], [2, 6, 0, 0]])
    prefixes = [([3], 1), ([3, 1], 4), ([3, 1, 4], 1), ([2], 6)]
    expected = [
        NextItem().loss(model, (torch.tensor([history]), torch.tensor([target])))
        for history, target in prefixes
    ]
    torch.testing.assert_close(position_losses(model, sequences), torch.cat(expected))
    scores = model.scores(model.last(torch.tensor([[3, 1]])))
    plain = functional.cross_entropy(scores, torch.tensor([3]))
    torch.testing.assert_close(expected[1].squeeze(), plain)


def test_losses_on_a_sample_that_has_each_item_equally_often_are_those_over_all_items() -> None:
    model = shaken(9, hidden=8, max_length=6)
    sequences = torch.tensor([[3, 1, 4, 1, 5], [2, 6, 0, 0, 0]])
    sampled = position_losses(model, sequences, negatives=torch.arange(1, 10).repeat(3))
    torch.testing.assert_close(sampled, position_losses(model, sequences))


def test_batches_hold_every_row_once_and_similar_lengths() -> None:
    lengths = torch.tensor([5, 1, 9, 1, 5, 2, 2, 9])
    random = torch.Generator().manual_seed(0)
    parts = batches_by_length(lengths, batch_size=2, generator=random)
    assert sorted(torch.cat(parts).tolist()) == list(range(8))
    assert all(len(lengths[part].unique()) == 1 for part in parts)
    assert [part.tolist() for part in batches_by_length(lengths, batch_size=4)] == [
        [1, 3, 5, 6],
        [0, 4, 2, 7],
    ]


SMALL = SurrogateConfig(
    epochs=12, patience=12, batch_size=16, lr=1e-2, hidden=16, max_length=12, dropout=0.1
)


def plain_training(seed: int) -> float:
    """Validation NDCG@10 of the plain network: left padding, no buckets, own ranking loop."""
    histories = made_histories()
    torch.manual_seed(seed)
    model = PlainSASRec(histories.num_items, hidden=16, max_length=12, dropout=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rows = [histories.train[user].tolist() for user in range(len(histories.users))]
    rows = [row for row in rows if len(row) >= 2]
    best = 0.0
    for _ in range(12):
        model.train()
        for part in torch.randperm(len(rows)).split(16):
            inputs = torch.tensor([[0] * (13 - len(rows[i])) + rows[i][:-1] for i in part])
            wanted = torch.tensor([[0] * (13 - len(rows[i])) + rows[i][1:] for i in part])
            scores = model(inputs) @ model.items.weight.T
            loss = functional.cross_entropy(scores[wanted > 0][:, 1:], wanted[wanted > 0] - 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        best = max(best, plain_ndcg(model))
    return best


@torch.no_grad()
def plain_ndcg(model: PlainSASRec) -> float:
    question, gains = made_histories().question("valid"), []
    model.eval()
    rows = [question.history[user].tolist() for user in range(len(question))]
    hidden = model(torch.tensor([[0] * (12 - len(row)) + row for row in rows]))
    for user, scores in enumerate((hidden[:, -1] @ model.items.weight.T)[:, 1:]):
        rank = int((scores >= scores[int(question.targets[user]) - 1]).sum())
        gains.append(1 / math.log2(rank + 1) if rank <= 10 else 0.0)
    return sum(gains) / len(gains)


def test_it_learns_as_much_as_the_plain_network_and_more_than_popularity() -> None:
    histories = made_histories()
    question = histories.question("valid")
    ours = [
        max(train_surrogate(histories, config=SMALL, seed=seed)[1].validation) for seed in (0, 1)
    ]
    plain = [plain_training(seed) for seed in (0, 1)]
    popular = float(evaluate(popularity_recommender(histories), question)["ndcg@10"].mean())
    # 91 users: the standard error of one of these means is about 0.04.
    assert abs(sum(ours) - sum(plain)) / 2 < 0.08
    assert min(ours) > popular + 0.2


def test_the_best_epoch_is_kept_not_the_last() -> None:
    histories = made_histories()
    config = SurrogateConfig(
        epochs=60, patience=6, batch_size=32, lr=2e-2, hidden=16, max_length=12, dropout=0.0
    )
    model, result = train_surrogate(histories, config=config, seed=0)
    found = evaluate(sasrec_recommender(model), histories.question("valid"))["ndcg@10"].mean()
    assert result.best_epoch == result.validation.index(max(result.validation))
    assert result.best_epoch == len(result.validation) - 7 < config.epochs - 1
    assert float(found) == pytest.approx(max(result.validation))
    assert result.validation[-1] < max(result.validation)


def test_same_seed_same_bits_also_after_an_interruption(tmp_path: Path) -> None:
    histories = made_histories()
    config = SurrogateConfig(epochs=4, batch_size=32, hidden=16, max_length=12, negatives=20)
    whole, result = train_surrogate(histories, config=config, seed=3)

    def stop(result: object) -> None:
        if len(result.losses) == 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    path = tmp_path / "surrogate.ckpt"
    with pytest.raises(KeyboardInterrupt):
        train_surrogate(histories, config=config, seed=3, checkpoint=path, on_epoch=stop)
    resumed, again = train_surrogate(histories, config=config, seed=3, checkpoint=path)
    assert result == again
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    with pytest.raises(RunError, match="seed is 4"):
        train_surrogate(histories, config=config, seed=4, checkpoint=path)


def test_the_test_items_change_nothing() -> None:
    histories = made_histories()
    config = SurrogateConfig(epochs=1, batch_size=32, hidden=16, max_length=12)
    other = type(histories)(
        histories.name, histories.users, histories.train, histories.valid,
        histories.test.without_last(1), histories.titles,
    )  # fmt: skip
    one, two = (train_surrogate(h, config=config, seed=0)[0] for h in (histories, other))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_evaluation_does_not_depend_on_the_order_of_users() -> None:
    histories = made_histories()
    model = shaken(histories.num_items, hidden=8, max_length=12)
    question = histories.question("test")
    found = evaluate(sasrec_recommender(model), question)["mrr"]
    order = torch.randperm(len(question), generator=torch.Generator().manual_seed(1))
    again = evaluate(sasrec_recommender(model), question.take(order))["mrr"]
    torch.testing.assert_close(again, found[order])
    alone = evaluate(sasrec_recommender(model), question.take(torch.tensor([5])))["mrr"]
    torch.testing.assert_close(alone, found[5:6])


def test_settings_out_of_range_are_all_named() -> None:
    with pytest.raises(RunError, match=r"patience must be at least 1.*dropout must be"):
        SurrogateConfig(patience=0, dropout=1.0)
    with pytest.raises(RunError, match="no multiple of num_heads"):
        SurrogateConfig(hidden=9)
