# %% [markdown]
# # Recommenders on game histories: few samples for a language model
#
# What will somebody play next? A language model can be taught to say so: it reads the titles of a
# history and writes the next title. Fine-tuning it on everybody's history is dear. DEALRec (Lin et
# al., *Data-efficient Fine-tuning for LLM-based Recommendation*, SIGIR 2024) chooses the histories
# that are worth it.
#
# At the end of this notebook you will have read a table of purchases, trained a small recommender
# and a small language model on it, scored every history in two ways, chosen a quarter of them, and
# measured who recommends best, on purchases that none of them has seen.
#
# You know PyTorch; [03_prune_your_data.ipynb](03_prune_your_data.ipynb) has the first words of data
# pruning. Three more:
#
# - **Influence** of a sample: how much the training loss would rise without it.
# - **Effort**: how strongly the language model would have to change for it.
# - **Surrogate**: a small model that stands in where a large one would be too dear.
#
# Everything runs on one CPU core in half a minute. Nothing is downloaded, nothing stays behind. It
# needs `pip install 'fedprune[llm,notebooks]'`.

# %%
import copy
import csv
import random
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from datapruning.recommend.finetune import FinetuneConfig, finetune
from datapruning.recommend.grounding import generate, language_recommender
from datapruning.recommend.histories import HistorySamples
from datapruning.recommend.overall import overall_table, select_covering
from datapruning.recommend.readers import read
from datapruning.recommend.steps import effort_table, influence_table, load_language
from datapruning.recommend.surrogate import (
    SurrogateConfig,
    evaluate,
    popularity_recommender,
    sasrec_recommender,
    train_surrogate,
)

torch.set_num_threads(1)
# Colours that stay apart for colour-blind readers (Okabe and Ito).
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
plt.rcParams.update({
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
})

# %% [markdown]
# ## 1. A table of purchases
#
# Eight made-up series of games, five parts each. Everybody likes two series and buys their parts in
# order, now and then anything else. A table has a row for each purchase: who, what, when. Yours may
# be a `.csv`, `.tsv` or `.parquet` with such columns.

# %%
SERIES = [
    "Castle Rally", "Deep Lantern", "Dragon Harbour", "Ghost Railway", "Iron Meadow",
    "Robot Garden", "Star Kitchen", "Wolf Academy",
]
PARTS = ["", " II", " III", " IV", " V"]
GAMES = [series + part for series in SERIES for part in PARTS]

home = tempfile.TemporaryDirectory(prefix="fedprune-")
root = Path(home.name)
draw = random.Random(0)
with (root / "bought.csv").open("w", newline="", encoding="utf-8") as file:
    table = csv.writer(file)
    table.writerow(["user", "item", "title", "time"])
    for user in range(240):
        part = {series: draw.randrange(2) for series in draw.sample(SERIES, 2)}
        for day in range(draw.randint(4, 9)):
            series = draw.choice(list(part))
            if draw.random() < 0.15 or part[series] == len(PARTS):
                game = draw.choice(GAMES)
            else:
                game = series + PARTS[part[series]]
                part[series] += 1
            table.writerow([user, game, game, day])

histories, report = read(str(root / "bought.csv"))
print(f"{report.users} users, {report.items} games, {report.interactions:,} purchases")

# %% [markdown]
# Reading divides by time: a user's last purchase is for the test, the one before for validation,
# the rest for training. A training sample is the last training purchase, to be told from those
# before it.

# %%
figure, ax = plt.subplots(figsize=(9, 3.6))
colors = {"train": GREY, "valid": ORANGE, "test": BLUE}
place = {title: number for number, title in enumerate(sorted(GAMES))}
for user, marker in ((1, "o"), (3, "s"), (4, "^")):
    time = 0
    for split, color in colors.items():
        for item in getattr(histories, split)[user].tolist():
            ax.plot(time, place[histories.titles[item - 1]], marker, color=color, markersize=9)
            time += 1
for label, color in zip(("training", "validation", "test"), colors.values(), strict=True):
    ax.plot([], [], "o", color=color, label=label)
ax.set(title="Three users (one shape each)", xlabel="purchase, in the order of time",
       yticks=range(2, 40, 5), yticklabels=SERIES, ylim=(39.5, -0.5))
for line in range(0, 40, 5):
    ax.axhline(line - 0.5, color=GREY, linewidth=0.5)
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# ## 2. A small recommender: the surrogate
#
# *SASRec* (Kang and McAuley, ICDM 2018) is a transformer whose words are games. It knows nothing of
# titles. Recall@10: how often what was really bought is among the ten that it puts first, of all
# forty. Whoever sells would first recommend what sells best; that is the line to beat.

# %%
settings = SurrogateConfig(epochs=60, patience=10, batch_size=64, lr=0.003, dropout=0.2)
samples = HistorySamples(histories)
influence = influence_table(histories, samples, root, config=settings, seed=0)
# The training is kept in the folder: this reads it.
sasrec, course = train_surrogate(
    histories, config=settings, seed=0, checkpoint=root / "surrogate.ckpt"
)
question = histories.question("test")
recalls = {}


def test(name, recommender):
    found = evaluate(recommender, question)["recall@10"]
    recalls[name] = 100 * found.mean().item(), 100 * found.std().item() / len(found) ** 0.5


test("what sells best", popularity_recommender(histories))
test("SASRec", sasrec_recommender(sasrec))

figure, ax = plt.subplots(figsize=(8, 2.6))
ax.plot(course.validation, color=BLUE)
ax.plot(course.best_epoch, course.validation[course.best_epoch], "D", color=BLUE, label="kept")
ax.set(title="The surrogate while it is trained", xlabel="epoch", ylabel="validation NDCG@10")
ax.grid(alpha=0.3)
ax.legend()
plt.show()
for name, (recall, error) in recalls.items():
    print(f"{name:<16} recall@10 {recall:.1f} ± {error:.1f} %")

# %% [markdown]
# ## 3. A language model
#
# A tiny one, made here: it first learns the titles, and no purchases. It reads a history as text
# and goes on writing. What it writes need not be a title, so the nearest titles are looked up, in
# its own embedding.

# %%
language = load_language("scratch:tiny", histories)
prompts = language.prompts
texts = prompts.samples(samples)
test("language model, untrained", language_recommender(language.model, prompts))

print(language.tokenizer.decode(texts.input_ids[3], skip_special_tokens=True).strip())


def says(user):
    written = generate(language.model, prompts, question.take(torch.tensor([user])), max_tokens=24)
    return language.tokenizer.decode(written[0], skip_special_tokens=True).strip()


print("it would write:", says(3) or "nothing")

# %% [markdown]
# ## 4. Two scores, one choice
#
# Influence comes from the surrogate, effort from the language model: the length of the gradient
# that each sample would give it. DEALRec adds both, drops the highest tenth, which is mostly noise,
# and covers the range of what is left: it does not simply keep the top.

# %%
effort = effort_table(histories, samples, root, language_model=language, seed=0)
overall = overall_table(influence, effort, weight=0.3)
kept = select_covering(overall, keep=60)
rows = kept.rows(samples)

figure, ax = plt.subplots(figsize=(8, 3.4))
ax.plot(influence.scores, effort.scores, ".", color=GREY, label="all samples")
ax.plot(influence.scores[rows], effort.scores[rows], "o", color=BLUE, fillstyle="none",
        label="kept")
top = overall.scores > overall.scores.quantile(0.9)
ax.plot(influence.scores[top], effort.scores[top], "x", color=ORANGE,
        label="highest tenth: dropped")
ax.set(title="Every sample's two scores", xlabel="influence on the surrogate",
       ylabel="effort of the language model")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# ## 5. Fine-tune, and compare
#
# The same language model, fine-tuned on a quarter by DEALRec, on a quarter by chance, and on
# everything, by as many steps.

# %%
start = copy.deepcopy(language.model.state_dict())
chance = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:60]
config = FinetuneConfig(steps=120, batch_size=16, lr=2e-3)
for name, chosen in (("a quarter, by chance", chance), ("a quarter, by DEALRec", rows),
                     ("all samples", None)):
    language.model.load_state_dict(start)
    finetune(language.model, texts, config=config, seed=0, rows=chosen)
    test(f"language model, {name}", language_recommender(language.model, prompts))
bought = histories.titles[int(question.targets[3][0]) - 1]
print(f"now it writes: {says(3)}; what was bought: {bought}")

figure, ax = plt.subplots(figsize=(8, 3))
values, errors = zip(*recalls.values(), strict=True)
colors = [GREY, GREEN, GREY, ORANGE, BLUE, BLUE]
ax.barh(list(recalls), values, xerr=errors, color=colors, ecolor="black", capsize=3)
ax.set(title="Who finds the next purchase?", xlabel="recall@10 ± its standard error, %")
ax.invert_yaxis()
ax.grid(alpha=0.3, axis="x")
plt.show()
home.cleanup()

# %% [markdown]
# A quarter of the samples does about what all of them do. Whether they are chosen or drawn makes no
# difference that 240 users could show; nor should you take such a difference from a toy.
# [simulations/dealrec_games.md](../simulations/dealrec_games.md) has a real data set of games, with
# random choice, all samples, each score alone and classic selectors, and the time of scoring.
#
# ## 6. Where to go next
#
# The same as commands, which go on where they were cut off:
#
# ```bash
# datapruning recommend score bought.csv --model scratch:tiny --out runs/scores
# datapruning recommend select runs/scores/scores.parquet --keep 60 --out kept.parquet
# datapruning recommend finetune bought.csv --subset kept.parquet --model runs/scores/base \
#     --out runs/tuned
# datapruning recommend evaluate bought.csv --model runs/tuned/model
# ```
#
# - `--model` takes any causal language model of transformers; it is adapted by LoRA.
# - [docs/recommend.md](../docs/recommend.md): data, steps, and what they cost.
# - [docs/datapruning.md](../docs/datapruning.md): scores for pictures, texts and tables.
