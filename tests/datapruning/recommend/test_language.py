"""Prompts, effort, fine-tuning and grounding with a small model from scratch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from datapruning.errors import ScoreError
from datapruning.recommend import language
from datapruning.recommend.effort import answer_error, answer_loss, batches_of_tokens, effort
from datapruning.recommend.finetune import FinetuneConfig, finetune
from datapruning.recommend.grounding import embed, generate, ground, language_recommender
from datapruning.recommend.histories import HistorySamples, Question
from datapruning.recommend.prompts import TEMPLATES, Prompts, Template, texts_of
from datapruning.recommend.ragged import Ragged
from datapruning.recommend.surrogate import evaluate
from prunelab.data.samples import TokenSamples
from prunelab.errors import DataError, ModelError, RunError
from prunelab.training.task import CausalLM

from .made import made_histories

pytest.importorskip("transformers")

WORDS = Template("Titles: ", "; ", " -> ")


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Prompts, TokenSamples]:
    histories = made_histories(num_users=40)
    sizes = language.SIZES
    language.SIZES = {**sizes, "test": language.Size(32, 2, 2, vocabulary=300)}
    try:
        model, tokenizer = language.load("scratch:test", texts=texts_of(histories.titles, WORDS))
    finally:
        language.SIZES = sizes
    prompts = Prompts(tokenizer, histories.titles, template=WORDS, max_length=96)
    for p in model.parameters():  # far from the start, where some gradients vanish
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    return model, prompts, prompts.samples(HistorySamples(histories))


def copied(model: Any) -> Any:
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def adapted(model: Any, *, seed: int = 0) -> nn.Module:
    lora = language.with_lora(copied(model), language.LoraSettings(), seed=seed)
    for name, p in lora.named_parameters():
        if "lora_B" in name:  # 0 at first, and then no gradient reaches the other half
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return lora


def test_prompts_have_the_titles_in_order_and_the_loss_on_the_answer_alone() -> None:
    histories = made_histories(num_users=40)
    _, tokenizer = language.load("scratch:tiny", texts=texts_of(histories.titles, WORDS))
    prompts = Prompts(tokenizer, histories.titles, template=WORDS, max_length=96, max_titles=2)
    rows = HistorySamples(histories)
    row = int(torch.nonzero(rows.history.lengths >= 3)[0])
    tokens = prompts.samples(rows, rows=torch.tensor([row]))
    real = tokens.attention_mask[0].bool()
    older, newer = (histories.titles[int(i) - 1] for i in rows.history[row][-2:])
    answer = histories.titles[int(rows.targets[row]) - 1]
    whole = tokenizer.decode(tokens.input_ids[0][real])
    assert whole == f"<s>Titles: {older}; {newer} -> {answer}</s>"
    targets = tokens.targets[0][tokens.targets[0] != -100]
    assert tokenizer.decode(targets) == f"{answer}</s>"
    assert tokens.ids.tolist() == [int(rows.ids[row])]


def test_a_long_history_loses_its_oldest_tokens_never_its_answer() -> None:
    histories = made_histories(num_users=40)
    _, tokenizer = language.load("scratch:tiny", texts=texts_of(histories.titles, WORDS))
    prompts = Prompts(tokenizer, histories.titles, template=WORDS, max_length=32, max_title=8)
    samples = prompts.samples(HistorySamples(histories))
    assert int(samples.attention_mask.sum(1).max()) == 32
    rows = HistorySamples(histories)
    row = int(samples.attention_mask.sum(1).argmax())
    text = tokenizer.decode(samples.input_ids[row][samples.attention_mask[row].bool()])
    newest = tokenizer.decode(prompts.titles[int(rows.history[row][-1]) - 1])
    answer = tokenizer.decode(prompts.titles[int(rows.targets[row]) - 1])
    assert text.startswith("<s>Titles: ")
    assert text.endswith(f"{newest} -> {answer}</s>")
    with pytest.raises(DataError, match="raise it, or lower max_title"):
        Prompts(tokenizer, histories.titles, template=WORDS, max_length=64)
    cut = Prompts(tokenizer, histories.titles, template=WORDS, max_title=1)
    assert cut.num_cut == sum(len(title) > 1 for title in prompts.titles) > 0


def test_every_title_comes_back_from_its_tokens() -> None:
    titles = ["Pokémon™ – Édition «Rouge»", "塞尔达传说", "a  b"]
    tokenizer = language.train_tokenizer(titles, vocabulary=300)
    for title in [*titles, "Unseen ✓ title"]:
        assert tokenizer.decode(tokenizer(title)["input_ids"]) == title
    with pytest.raises(ModelError, match="needs texts"):
        language.train_tokenizer([""], vocabulary=300)


@pytest.mark.parametrize("title", ["C++ </s> and beyond", "</s>", "<s><pad>", "a<s>b </s>"])
def test_a_title_that_spells_the_tokenizers_own_marks_stays_text(title: str) -> None:
    titles = [title, "Other"]
    tokenizer = language.train_tokenizer(texts_of(titles, WORDS), vocabulary=300)
    prompts = Prompts(tokenizer, titles, template=WORDS, max_length=128)
    assert not set(prompts.titles[0]) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(prompts.titles[0]) == title
    history = Ragged.of([[1, 2]])
    texts = prompts.questions(history, torch.tensor([1]))
    marks = [int((texts.input_ids[0] == mark).sum()) for mark in (prompts.begin, prompts.end)]
    assert marks == [1, 1]  # the first and the last token


def test_a_text_without_targets_has_no_loss_and_no_effort(
    parts: tuple[Any, Prompts, TokenSamples],
) -> None:
    """A target at the first token, which nothing predicts, is none."""
    model, _, samples = parts
    targets = samples.targets.clone()
    targets[2], targets[5] = -100, -100
    targets[5, 0] = samples.input_ids[5, 0]
    some = TokenSamples(samples.input_ids, samples.attention_mask, targets, ids=samples.ids)
    undefined = torch.zeros(len(samples), dtype=torch.bool)
    undefined[[2, 5]] = True
    for score in (answer_loss, answer_error, effort):
        found, expected = score(copied(model), some), score(copied(model), samples)
        assert torch.equal(found.isnan(), undefined)
        torch.testing.assert_close(found[~undefined], expected[~undefined])
    first = int(samples.ids[2])
    with pytest.raises(
        DataError, match=f"2 texts have no target token, the first with the id {first}"
    ):
        finetune(copied(model), some, config=FinetuneConfig(epochs=1), seed=0)
    result = finetune(
        copied(model),
        some,
        config=FinetuneConfig(steps=1),
        seed=0,
        rows=torch.nonzero(~undefined).flatten(),
    )
    assert result.steps == 1


def plain_norms(model: nn.Module, samples: TokenSamples) -> list[float]:
    """One backward pass a sample, gradients of all that is trainable."""
    norms = []
    trained = [p for p in model.parameters() if p.requires_grad]
    for row in range(len(samples)):
        loss = CausalLM().loss(model, samples.batch(torch.tensor([row])))
        gradients = torch.autograd.grad(loss.squeeze(), trained, materialize_grads=True)
        norms.append(float(torch.stack([(g.double() ** 2).sum() for g in gradients]).sum().sqrt()))
    return norms


@pytest.mark.parametrize("kind", ["lora", "all"])
def test_effort_is_the_norm_of_each_samples_gradient(
    parts: tuple[Any, Prompts, TokenSamples], kind: str
) -> None:
    model, _, samples = parts
    model = adapted(model) if kind == "lora" else copied(model)
    found = effort(model, samples, tokens=400)
    torch.testing.assert_close(
        found, torch.tensor(plain_norms(model, samples), dtype=torch.float64), rtol=1e-4, atol=1e-7
    )
    again = effort(model, samples, tokens=90)  # other batches, the same norms
    torch.testing.assert_close(found, again, rtol=1e-4, atol=1e-7)


def test_effort_sees_adapters_alone_without_their_dropout_and_not_the_prompt(
    parts: tuple[Any, Prompts, TokenSamples],
) -> None:
    model, _, samples = parts
    lora = adapted(model)
    trained = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    found = effort(lora, samples)
    assert not torch.allclose(found, effort(copied(model), samples), rtol=0.05)
    everything = TokenSamples(
        samples.input_ids,
        samples.attention_mask,
        samples.input_ids.masked_fill(samples.attention_mask == 0, -100),
    )
    assert not torch.allclose(found, effort(lora, everything), rtol=0.05)
    lora.train()
    with pytest.raises(ScoreError, match="train mode"):
        effort(lora, samples)


def test_losses_and_errors_of_answers(parts: tuple[Any, Prompts, TokenSamples]) -> None:
    model, _, samples = parts
    found, errors = answer_loss(model, samples), answer_error(model, samples)
    for row in range(3):
        real = samples.attention_mask[row].bool()
        ids, targets = samples.input_ids[row][real], samples.targets[row][real]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1].double()
        answer = targets[1:] != -100
        probabilities = logits[answer].softmax(-1)
        own = probabilities.gather(1, targets[1:][answer][:, None])
        assert float(found[row]) == pytest.approx(float(-own.log().mean()), rel=1e-5)
        wrong = probabilities.clone().scatter_add_(
            1, targets[1:][answer][:, None], -torch.ones_like(own)
        )
        assert float(errors[row]) == pytest.approx(float(wrong.norm(dim=1).mean()), rel=1e-5)


def test_batches_of_tokens_hold_every_row_once_and_not_too_much() -> None:
    lengths = torch.tensor([5, 1, 9, 30, 5, 2, 2, 9])
    parts = list(batches_of_tokens(lengths, tokens=20))
    assert sorted(torch.cat(parts).tolist()) == list(range(8))
    for part in parts:
        assert len(part) == 1 or int(lengths[part].max()) * len(part) <= 20


def test_the_split_into_passes_does_not_change_a_step(
    parts: tuple[Any, Prompts, TokenSamples],
) -> None:
    model, _, samples = parts
    config = {"steps": 2, "batch_size": 12, "lr": 1e-3, "warmup": 0.0}
    whole, split = copied(model), copied(model)
    one = finetune(whole, samples, config=FinetuneConfig(**config, tokens=10**6), seed=0)  # type: ignore[arg-type]
    two = finetune(split, samples, config=FinetuneConfig(**config, tokens=150), seed=0)  # type: ignore[arg-type]
    assert one.losses == pytest.approx(two.losses, rel=1e-5)
    assert one.samples_seen == 24
    for (name, a), b in zip(whole.named_parameters(), split.parameters(), strict=True):
        # Adam's first steps are the sign of the gradient: a sum in another order may flip one of 0.
        assert (a - b).abs().mean() < 2e-5, name


def test_the_first_loss_is_the_mean_over_the_batch(
    parts: tuple[Any, Prompts, TokenSamples],
) -> None:
    model, _, samples = parts
    rows = torch.tensor([3, 7, 11])
    expected = float(answer_loss(model, samples)[rows].mean())
    config = FinetuneConfig(steps=1, batch_size=3)
    result = finetune(copied(model), samples, config=config, seed=0, rows=rows)
    assert result.losses == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "all"])
def test_fine_tuning_learns_and_continues_to_the_same_bits(
    parts: tuple[Any, Prompts, TokenSamples], kind: str, tmp_path: Path
) -> None:
    model, _, samples = parts
    make = adapted if kind == "lora" else copied
    config = FinetuneConfig(epochs=3, batch_size=16, lr=1e-2, save_every=2)
    whole = make(model)
    result = finetune(whole, samples, config=config, seed=0)
    assert result.steps == 3 * 3
    assert result.losses[-1] < result.losses[0]

    def stop(result: Any) -> None:
        if result.steps == 5:
            raise KeyboardInterrupt

    path, cut = tmp_path / "tuned.ckpt", make(model)
    with pytest.raises(KeyboardInterrupt):
        finetune(cut, samples, config=config, seed=0, checkpoint=path, on_step=stop)
    resumed = make(model)
    again = finetune(resumed, samples, config=config, seed=0, checkpoint=path)
    assert again == result
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(RunError, match="seed is 1"):
        finetune(make(model), samples, config=config, seed=1, checkpoint=path)
    if kind == "lora":  # a checkpoint of a large model holds its adapters alone
        content = io.BytesIO(path.read_bytes().partition(b"\n")[2])
        saved = torch.load(content, weights_only=True)["state"]["parameters"]
        assert all("lora" in name for name in saved)


def test_settings_out_of_range_are_all_named(parts: tuple[Any, Prompts, TokenSamples]) -> None:
    with pytest.raises(RunError, match=r"steps must be at least 1.*lr must be positive"):
        FinetuneConfig(steps=0, lr=0.0)
    model, _, samples = parts
    with pytest.raises(RunError, match="no sample"):
        finetune(
            model,
            samples,
            config=FinetuneConfig(),
            seed=0,
            rows=torch.tensor([], dtype=torch.int64),
        )


def test_embeddings_do_not_depend_on_the_batch(parts: tuple[Any, Prompts, TokenSamples]) -> None:
    model, prompts, _ = parts
    texts = Ragged.of([*prompts.titles[:7], []])
    found = embed(model, texts, begin=prompts.begin)
    for row in range(len(texts)):
        ids = torch.tensor([[prompts.begin, *texts[row].tolist()]])
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        expected = hidden[1:].mean(0) if len(texts[row]) else hidden[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embed(model, texts, begin=prompts.begin, tokens=1), found)


def test_grounding_is_the_euclidean_distance() -> None:
    random = torch.Generator().manual_seed(0)
    queries = torch.randn(3, 5, generator=random)
    items = torch.randn(4, 5, generator=random)
    expected = -(torch.cdist(queries, items) ** 2)
    torch.testing.assert_close(ground(queries, items), expected, rtol=1e-4, atol=1e-5)


def test_generated_titles_are_those_of_single_prompts(
    parts: tuple[Any, Prompts, TokenSamples],
) -> None:
    """Left padding changes nothing: greedy decoding, one history and one token at a time."""
    model, prompts, _ = parts
    question = made_histories(num_users=40).question("valid").take(torch.arange(5))
    written = generate(model, prompts, question, max_tokens=6)
    for row in range(len(question)):
        ids = prompts.prompt(question.history[row].tolist(), room=7)
        answer: list[int] = []
        while len(answer) < 6:
            logits = model(input_ids=torch.tensor([ids + answer])).logits[0, -1]
            answer.append(int(logits.argmax()))
            if answer[-1] == prompts.end:
                break
        assert written[row].tolist() == [token for token in answer if token != prompts.end]


def test_a_model_that_knows_its_samples_by_heart_names_their_items(
    parts: tuple[Any, Prompts, TokenSamples],
) -> None:
    model, prompts, samples = parts
    rows = HistorySamples(made_histories(num_users=40))
    targets = Ragged.of([target] for target in rows.targets.tolist())
    question = Question(rows.ids, rows.history, targets)
    tuned = copied(model)
    before = evaluate(language_recommender(tuned, prompts, max_tokens=12), question)["mrr"]
    config = FinetuneConfig(epochs=60, batch_size=8, lr=1e-2)
    finetune(tuned, samples, config=config, seed=0)
    after = evaluate(language_recommender(tuned, prompts, max_tokens=12), question)["mrr"]
    assert float(before.mean()) < 0.3
    assert float(after.mean()) > 0.6


def test_models_that_cannot_be_loaded() -> None:
    with pytest.raises(ModelError, match=r"unknown size 'huge'; known: scratch:tiny"):
        language.load("scratch:huge", texts=["a"])
    with pytest.raises(ModelError, match="cannot be loaded"):
        language.load("/no/such/folder")
    assert set(TEMPLATES) == {"instruction", "plain"}
