# %% [markdown]
# # Prune your data: score, look, select, train with a teacher
#
# Not every sample of a training set teaches a network as much as the next one. Some repeat what
# others say, some are mislabelled, some are the rare hard cases that decide the last per cent of
# accuracy. This notebook scores the samples of a small data set in several ways, looks at what the
# scores say, keeps a part of the samples and trains on it, alone and with the help of a teacher.
#
# You know PyTorch. Three words come first:
#
# - **Score**: a number for each training sample. High always means *keep*.
# - **Policy**: how a subset is chosen by the scores; keeping the highest is only one way.
# - **Distillation**: a student network learns from the answers of a teacher, beside the labels.
#
# Everything runs on one CPU core in about a minute. Nothing is downloaded, nothing stays behind. It
# needs `pip install 'fedprune[notebooks]'`.

# %%
import time

import matplotlib.pyplot as plt
import torch

import datapruning
from datapruning import ImageClassification, ImageSamples, TrainingConfig
from datapruning.selection.agreement import agreement
from datapruning.students.distill import choose_alpha, kd_objective, teacher_logits
from prunelab.data.datasets import load_dataset
from prunelab.networks import build_model
from prunelab.training.loop import train

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
# ## 1. The data
#
# scikit-learn's handwritten digits, 8×8 grey values each. A fixed fifth is set aside for testing.
# It takes part in no score, no selection and no other choice; we read it at the very end of each
# training run.
#
# `ImageSamples` gives every training sample an *id* that stays with it in every table.

# %%
digits = load_dataset("digits")
train_side = ImageSamples.of(digits)
test_side = ImageSamples(digits.test_images, digits.test_labels)
task = ImageClassification()

print(f"{len(train_side):,} samples to score, {len(test_side):,} for testing")

# %% [markdown]
# ## 2. Score
#
# Five scores of four kinds, in one call. Those that need a trained network share it.
#
# - `el2n`: how far the network's answer is from the label, early in training.
# - `forgetting`: how often a sample was learned and forgotten again.
# - `grand`: the norm of the sample's gradient for all weights.
# - `prototypes-supervised`: the distance to the mean of its class, as the network sees it.
# - `random`: the control that every score has to beat.

# %%
METHODS = ["el2n", "forgetting", "grand", "prototypes-supervised", "random"]
config = TrainingConfig(epochs=12, batch_size=64, lr=0.1)

EARLY = 5  # epochs after which scores "early in training" look

tables = datapruning.score(
    train_side, method=METHODS, model="resnet8", training=config, early=EARLY, seed=0
)
print(f"{len(tables)} tables of {len(train_side):,} scores")

# %% [markdown]
# ## 3. Look before you prune
#
# The samples with the lowest and the highest EL2N scores. Low ones are typical; among high ones
# are odd hands, cut strokes, and perhaps a wrong label. Before such samples are kept as
# "informative", somebody should have looked at them.

# %%
order = tables["el2n"].scores.argsort()
figure, axes = plt.subplots(2, 12, figsize=(10, 2.3))
for row, (name, chosen) in enumerate([("lowest", order[:12]), ("highest", order.flip(0)[:12])]):
    for ax, sample in zip(axes[row], chosen.tolist(), strict=True):
        ax.imshow(train_side.images[sample, 0], cmap="gray_r")
        ax.set_title(int(train_side.labels[sample]), fontsize=9)
        ax.axis("off")
    axes[row, 0].text(-0.35, 0.5, name, transform=axes[row, 0].transAxes, rotation=90, va="center")
figure.suptitle("EL2N, with the label above each image")
plt.show()

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2))
scores = tables["el2n"].scores
axes[0].hist(scores, bins=40, color=BLUE)
axes[0].set(title="Most samples are easy", xlabel="EL2N", ylabel="samples", yscale="log")

grid = [[agreement(tables[a], tables[b]).spearman for b in METHODS] for a in METHODS]
picture = axes[1].imshow(grid, cmap="cividis", vmin=0, vmax=1)
for row, values in enumerate(grid):
    for column, value in enumerate(values):
        axes[1].text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8,
                     color="black" if value > 0.5 else "white")
axes[1].set_xticks(range(len(METHODS)), METHODS, rotation=30, ha="right")
axes[1].set_yticks(range(len(METHODS)), METHODS)
axes[1].set_title("Rank correlation of the scores")
axes[1].spines[:].set_visible(False)
plt.show()

# %% [markdown]
# EL2N and the gradient's norm say nearly the same of a network; distances to prototypes say
# something else, and forgetting, which watches the whole training, something else again.
#
# ## 4. Select
#
# `select` keeps exactly as many samples as asked for. The hardest of all samples may come from a
# few classes only, so we ask for balance: every class keeps at least half of its fair share.

# %%
KEEP = 0.2
subsets = {
    "el2n, hardest": tables["el2n"].select(keep=KEEP, class_balanced=True),
    "el2n, easiest": tables["el2n"].select(
        keep=KEEP, policy="easiest", class_balanced=True
    ),
    "el2n, strata (ccs)": tables["el2n"].select(keep=KEEP, policy="ccs"),
    "forgetting, hardest": tables["forgetting"].select(
        keep=KEEP, class_balanced=True
    ),
    "random": tables["random"].select(keep=KEEP, policy="random"),
}
for name, subset in subsets.items():
    counts = torch.bincount(train_side.labels[subset.rows(train_side)], minlength=10).tolist()
    print(f"{name:<20} {len(subset)} samples, by class {counts}")

# %% [markdown]
# ## 5. Train on what is kept
#
# Same network, same start, same learning rate, and as many optimiser steps for each as the whole
# data would take in the given epochs: with equal epochs a fifth of the data would also get a fifth
# of the training. One seed here; the tables in [simulations/](../simulations) have several, with
# their spread.

# %%
STEPS = 120


def fit(rows=None, objective=None, seed=1, width=None):
    model = build_model(
        "resnet8", num_classes=10, input_shape=digits.input_shape, seed=seed, width=width
    )
    steps = TrainingConfig(batch_size=64, lr=0.1, steps=STEPS)
    train(
        model, train_side, task, config=steps, seed=seed, rows=rows, objective=objective
    )
    return model


def accuracy(model):
    return 100 * datapruning.evaluate(model, test_side, task).accuracy


teacher = fit()
results = {"all samples": accuracy(teacher)}
results |= {name: accuracy(fit(subset.rows(train_side))) for name, subset in subsets.items()}

figure, ax = plt.subplots(figsize=(8, 2.8))
colors = [GREY if name in ("all samples", "random") else BLUE for name in results]
bars = ax.barh(list(results), list(results.values()), color=colors)
ax.bar_label(bars, fmt=" %.1f")
ax.set(title=f"Trained on {KEEP:.0%} of the samples", xlabel="test accuracy, %", xlim=(60, 104))
ax.invert_yaxis()
plt.show()

# %% [markdown]
# One per cent is four test images, so a single seed ranks nothing; the easiest samples alone are
# visibly too few of the rare shapes. The less is kept, the harder random samples are to beat:
# `policy="auto"` keeps the hardest samples where many of a class are left, the easiest where few
# are.
#
# ## 6. A teacher for the small set
#
# The network that was trained on all samples can teach one that sees a fifth of them. Its answers
# are computed once and stored in half precision. The loss is (1 − α) of the label's cross-entropy
# and α of the distance to the teacher's softened answer. α is chosen on a part of the *training*
# side that is held out for it.

# %%
rows = subsets["random"].rows(train_side)
answers = teacher_logits(teacher.eval(), train_side, task)


def student(seed):
    return build_model("resnet8", num_classes=10, input_shape=digits.input_shape, seed=seed)


choice = choose_alpha(
    student, train_side, task, rows=rows, seed=1,
    objective=lambda alpha: kd_objective(alpha=alpha, cached=answers),
    config=TrainingConfig(batch_size=64, lr=0.1, steps=STEPS),
)
taught = accuracy(fit(rows, objective=kd_objective(alpha=choice.alpha, cached=answers)))

figure, ax = plt.subplots(figsize=(8, 2.8))
ax.plot([p.alpha for p in choice.curve], [100 * p.accuracy for p in choice.curve], "o-", color=BLUE)
ax.axvline(choice.alpha, color=ORANGE, linestyle="--", label=f"chosen: {choice.alpha:g}")
ax.set(title="How much to listen to the teacher", xlabel="α (0: labels alone, 1: teacher alone)",
       ylabel="held-out accuracy, %")
ax.legend()
plt.show()

print(f"test accuracy, {KEEP:.0%} random: {results['random']:.1f} % alone, {taught:.1f} % taught; "
      f"all samples: {results['all samples']:.1f} %")


# %% [markdown]
# ## 7. Scores from a sparse network
#
# Scoring costs the training of a network. A *sparse proxy* keeps a twentieth of the weights and
# trains on kernels that never touch the rest. Does it rank the samples as the dense network does?
# The yardstick is a second dense network with another seed: more agreement than that is not to be
# had.

# %%
# Measured on one machine: the seconds.
def scored(**changes):
    start = time.process_time()
    table = datapruning.score(train_side, method="el2n", training=config, early=EARLY, **changes)
    return table, time.process_time() - start


dense, _ = scored(seed=0)
other, dense_seconds = scored(seed=1)
sparse, sparse_seconds = scored(seed=1, density=0.05)
for name, table, seconds in (("another dense network", other, dense_seconds),
                             ("a sparse proxy, 5 %", sparse, sparse_seconds)):
    found = agreement(dense, table)
    print(f"{name:<22} rank correlation {found.spearman:.2f}, {seconds:.1f} s of processor time")

# %% [markdown]
# ## 8. Where to go next
#
# The same from the command line, with a report page at every step:
#
# ```bash
# datapruning score digits --method el2n,forgetting --out scores.parquet
# datapruning select scores-el2n.parquet --keep 0.5 --out kept.parquet
# datapruning train digits --subset kept.parquet
# datapruning --help
# ```
#
# - A folder of parquet files with columns `img` and `label` in place of `digits` uses your
#   pictures.
# - Your own model or loss: subclass `datapruning.Task` and give `score` a function from a seed to
#   an untrained model. Texts: `TokenSamples` with `TextClassification` or `CausalLM`.
# - [docs/datapruning.md](../docs/datapruning.md) lists scores and policies with their sources.
# - [simulations/ten_metrics.md](../simulations/ten_metrics.md) ranks the scores over several
#   seeds, [simulations/kd_fractions.md](../simulations/kd_fractions.md) does the same for
#   distillation.
