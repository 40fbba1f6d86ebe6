# %% [markdown]
# # Ten minutes from nothing to a tiny federated model
#
# Several clients hold handwritten digits that must not leave them. Together they will train one
# classifier in which only a few per cent of the weights are not zero. Round after round, these few
# are all that the clients train and send.
#
# You know PyTorch; federated learning and pruning are explained on the way. Four words come first:
#
# - **Federated averaging** (FedAvg): the server sends a model to the clients, each trains it on
#   its own data, the server averages what they send back. That is one *round*.
# - **Mask**: which weights of the model exist (are *active*). The others are zero and stay zero.
# - **Density**: active weights over all weights that may be pruned (set to zero).
# - **FedTiny** (Huang et al., *Distributed Pruning Towards Tiny Neural Networks in Federated
#   Learning*, ICDCS 2023): the method of this notebook. The server proposes a few masks, the
#   clients choose one by their data, and then improve it while they train.
#
# The notebook trains three models on one CPU core, in half a minute. It downloads nothing and
# leaves nothing behind. It needs `pip install 'fedprune[sim,notebooks]'`.

# %%
import math
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown

import fedprune
from fedprune import RunConfig
from fedprune.config import own_settings
from fedprune.methods.fedtiny.pool import candidate_counts, candidate_pool
from fedprune.reports.results import comparison_table
from fedprune.rounds.workspace import open_workspace
from prunelab.data.tensors import prepare
from prunelab.pages.units import format_bytes
from sparsemodel.masks.mask import prunable_parameters

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
# ## 1. Say what to run
#
# A `RunConfig` holds everything that decides a result: data, model, training, method and the seed.
# What is not named keeps its default, and an unknown name is an error. The same names work on the
# command line and in a TOML file.

# %%
settings = {
    "seed": 0,
    "data.dataset": "digits",  # comes with scikit-learn
    "data.clients": 6,
    "data.alpha": 0.5,  # how unequal the clients are; smaller is more unequal
    "training.rounds": 10,
    "training.local_epochs": 2,
    "method.density": 0.03,
    "method.pool_size": 5,  # candidate masks
    "server.pretrain_epochs": 10,  # on the server's few labelled samples
    "method.adjust_every": 1,  # move a part of the mask after every round ...
    "method.adjust_until": 7,  # ... before this one
}
config = RunConfig.parse(settings)
workspace = open_workspace(config)
digits = workspace.dataset

# %% [markdown]
# ## 2. The data
#
# Real handwritten digits, 8×8 grey values each. A fixed fifth is set aside for testing and takes
# part in no decision.

# %%
figure, axes = plt.subplots(2, 10, figsize=(8, 2.1))
for digit, column in enumerate(axes.T):
    examples = digits.train.images[digits.train.labels == digit]
    for ax, image in zip(column, examples, strict=False):
        ax.imshow(image[0], cmap="gray_r")
        ax.axis("off")
    column[0].set_title(digit)
figure.suptitle("Two training images of each class")
plt.show()

print(f"{len(digits.train.labels):,} images for training, {len(digits.test.labels):,} for testing")

# %% [markdown]
# ## 3. The federation
#
# Real clients do not hold equal shares: one sees mostly ones, another hardly any. A Dirichlet
# distribution imitates this; its concentration is `data.alpha`. The server keeps a handful of
# labelled images for itself, which no client has.

# %%
names = [str(client) for client in range(config.data.clients)]
held = [digits.train.labels[share] for share in workspace.shares]
shades = plt.colormaps["viridis"].resampled(digits.num_classes)

figure, ax = plt.subplots(figsize=(8, 4))
bottom = [0] * len(held)
for digit in range(digits.num_classes):
    counts = [int((labels == digit).sum()) for labels in held]
    bars = ax.bar(names, counts, bottom=bottom, color=shades(digit), edgecolor="white")
    # The digit stands in its bar, so that nobody has to tell ten colours apart.
    shown = [digit if count >= 12 else "" for count in counts]
    ax.bar_label(
        bars, shown, label_type="center", fontsize=8, color="black" if digit > 3 else "white"
    )
    bottom = [below + count for below, count in zip(bottom, counts, strict=True)]
ax.set(title="Every client has its own mix of digits (0 at the bottom, 9 at the top)",
       xlabel="client", ylabel="images")
plt.show()

print(f"the server itself holds {len(workspace.server_indices)} labelled images")

# %% [markdown]
# ## 4. Candidate masks
#
# Which weights should exist? The server knows almost no data, so it does not decide alone:
#
# 1. It trains the whole (*dense*) network briefly on its few images.
# 2. It draws a density for every layer, around the density asked for, and keeps the weights of
#    largest magnitude in each layer. Other draws give other masks: the *candidate pool*.
#
# The first convolution, biases and batch norm are never pruned. The run in the next section does
# both steps by itself; here we repeat them, with the same seed, to look inside.

# %%
dense = workspace.start_state()  # what every method starts from
prunable = {name: tuple(p.shape) for name, p in prunable_parameters(workspace.model()).items()}
method = config.method
counts = candidate_counts(
    prunable, method.density, num_candidates=method.num_candidates, seed=config.seed
)
pool = candidate_pool(dense, counts)
masks = [pool.candidate(number).patterns for number in range(len(counts))]

for number, mask in enumerate(masks, 1):
    print(f"candidate {number}: {mask.num_active:,} of {mask.num_weights:,} weights active, "
          f"density {mask.density:.4f}")

# %%
layers = [name.removesuffix(".weight") for name in prunable]
grid = torch.tensor([list(mask.densities().values()) for mask in masks])

figure, ax = plt.subplots(figsize=(8, 3.6))
picture = ax.imshow(100 * grid, cmap="cividis", aspect="auto")
for row, column in torch.cartesian_prod(*map(torch.arange, grid.shape)).tolist():
    value = grid[row, column]
    ax.text(column, row, f"{100 * value:.1f}", ha="center", va="center",
            color="black" if value > grid.mean() else "white")
ax.set_xticks(range(len(layers)), layers, rotation=35, ha="right", rotation_mode="anchor")
ax.set_yticks(range(len(masks)), range(1, len(masks) + 1))
ax.set(title="As many weights in all, spread differently over the layers",
       xlabel="layer, from input to output", ylabel="candidate")
ax.spines[:].set_visible(False)
figure.colorbar(picture, label="density, %")
plt.show()

# %% [markdown]
# ## 5. Run FedTiny
#
# `fedprune.run` is what the command of that name calls. The `inline` engine plays server and
# clients in this process; the messages between them are encoded, measured and decoded as on a
# network. A run leaves a folder with its settings, one line of metrics a round, the model and a
# report; ours are temporary. Settings that only another method has are left out for the rivals
# further below.

# %%
runs = tempfile.TemporaryDirectory(prefix="fedprune-")


def run(method):
    config = RunConfig.parse(own_settings({**settings, "method.name": method}))
    return fedprune.run(config, Path(runs.name) / method, engine="inline")


tiny = run("fedtiny")
start, *rounds = tiny.metrics
sorted(path.name for path in tiny.folder.iterdir() if not path.name.startswith("."))

# %% [markdown]
# Before the first round the clients chose among the candidates. A mask changes what flows through
# the network, so the batch-norm statistics of the dense network no longer fit. Each client
# therefore measures them for every candidate on a small part of its own data, the server pools
# them, and only then does each client compute every candidate's loss. All this takes forward
# passes only. The smallest loss, weighted by the clients' sizes, wins.

# %%
losses, winner = start["selection"]["losses"], start["selection"]["winner"]
numbers = [str(number) for number in range(1, len(losses) + 1)]

figure, ax = plt.subplots(figsize=(8, 2.8))
ax.scatter(losses, numbers, s=70, color=GREY, label="candidate")
ax.scatter(losses[winner], numbers[winner], s=130, color=BLUE, marker="D", label="winner")
ax.axvline(math.log(digits.num_classes), color=ORANGE, linestyle="--", label="guessing")
ax.set(title="Candidates on the clients' own data",
       xlabel="weighted loss on development data (smaller is better)", ylabel="candidate")
ax.invert_yaxis()
ax.grid(alpha=0.3)
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

print(f"candidate {winner + 1} wins with a loss of {losses[winner]:.3f}")

# %% [markdown]
# The dashed line is the loss of a model that finds every class equally likely; candidates near it
# know next to nothing. A mask this sparse, made from so few images, is only a place to start.

# %% [markdown]
# ## 6. Accuracy and traffic, round by round
#
# After some rounds the mask is adjusted, one block of layers at a time. In that block the active
# weights closest to zero are pruned, and as many others grow: those where the clients found the
# largest gradients. Clients send only these few gradients, with their positions.

# %%
summary = tiny.summary
dense_round = summary["bytes_dense_round"] * config.clients_per_round
numbers = [line["round"] for line in rounds]
accuracy = [100 * line["test_accuracy"] for line in rounds]
adjusted = [line["round"] for line in rounds if line["adjusted"]]

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
left.plot(numbers, accuracy, color=BLUE, marker=".")
left.plot(adjusted, [accuracy[n - 1] for n in adjusted], "D", color=ORANGE, label="mask adjusted")
left.set(title="Accuracy", xlabel="round", ylabel="test accuracy, %", ylim=(0, 100))

steps = [0, *numbers]
for way, color, marker in (("up", BLUE, "o"), ("down", GREEN, "s")):
    sent = [line[f"bytes_{way}"] for line in (start, *rounds)]
    right.plot(steps, sent, color=color, marker=marker, label=way)
right.axhline(dense_round, color=GREY, linestyle="--", label="dense, each way")
right.set(title="Traffic", xlabel="round (0: candidate selection)",
          ylabel="bytes of all clients", yscale="log")
right.yaxis.set_major_formatter(lambda value, _: format_bytes(value))
for ax in (left, right):
    ax.set_xticks(steps)
    ax.grid(alpha=0.3)
    ax.legend()
plt.show()

steady = summary["bytes_up_steady_round"]
print(f"final accuracy: {accuracy[-1]:.1f} %")
print(f"a client's upload once the mask rests: {format_bytes(steady)} a round, "
      f"{steady / summary['bytes_dense_round']:.1%} of the dense model's")

# %% [markdown]
# The selection costs one sending of the dense weights and the candidates to every client. After
# that a round costs a small part of a dense one, though a larger one than the density: what is
# never pruned is sent whole. While the mask moves, gradients and changes of the mask travel too.

# %% [markdown]
# ## 7. What became of the mask
#
# The mask of round 0 is the winner of our pool, and that of the last round is in the model's file.
# An adjustment prunes and grows the same number of weights in a layer. So densities stay, and
# positions move.

# %%
first, last = masks[winner], tiny.state.patterns
assert first.densities() == start["layer_densities"]  # our pool is the run's own

stayed = {
    name: len(np.intersect1d(first[name].positions(), last[name].positions())) for name in first
}
moved = {name: 1 - stayed[name] / last[name].num_active for name in first}

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
for mask, label, size, fill, edge in (
    (first, "first mask", 110, "none", ORANGE),
    (last, "final mask", 30, BLUE, BLUE),
):
    values = [100 * density for density in mask.densities().values()]
    left.scatter(values, layers, s=size, facecolors=fill, edgecolors=edge, label=label)
left.set(title="Densities stay", xlabel="density, %", ylabel="layer")
left.set_xlim(left=0)
left.grid(alpha=0.3)
left.legend()
right.barh(layers, [100 * share for share in moved.values()], color=BLUE)
right.set(title="Positions move", xlabel="active weights that the first mask did not have, %")
right.invert_yaxis()
plt.show()

print(f"{1 - sum(stayed.values()) / last.num_active:.1%} of the active weights are elsewhere "
      f"than at the start; density {first.density:.4f} before, {last.density:.4f} after")


# %% [markdown]
# Here is one layer up close: the classifier, where every row is a digit.

# %%
def active(pattern):
    kept = np.zeros(pattern.num_weights, dtype=bool)
    kept[pattern.positions()] = True
    return kept.reshape(pattern.shape)


before, after = active(first["fc.weight"]), active(last["fc.weight"])
parts = {
    "stayed": (before & after, GREY, "s"),
    "pruned": (before & ~after, ORANGE, "x"),
    "grown": (~before & after, BLUE, "o"),
}
figure, ax = plt.subplots(figsize=(8, 2.8))
for label, (pattern, color, marker) in parts.items():
    row, column = pattern.nonzero()
    ax.scatter(column, row, color=color, marker=marker, s=34, label=f"{label}: {len(row)}")
ax.set(title="The classifier's mask", xlabel="feature", ylabel="class",
       xlim=(-1, before.shape[1]), yticks=range(digits.num_classes))
ax.invert_yaxis()
ax.grid(alpha=0.3)
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# ## 8. Was it worth it?
#
# Two rivals, with the same seed, clients, rounds and start: `magnitude` prunes the pre-trained
# network once, every layer alike, and never moves the mask; `fedavg` prunes nothing.

# %%
results = {"fedtiny": tiny, "magnitude": run("magnitude"), "fedavg": run("fedavg")}
summaries = {method: result.summary for method, result in results.items()}

header, rows = comparison_table(list(summaries.values()))
table = [row[:-1] for row in [header, ["---"] * len(header), *rows]]  # the last column is time
Markdown("\n".join("| " + " | ".join(row) + " |" for row in table))

# %%
for method, summary in summaries.items():
    total = summary["bytes_up"] + summary["bytes_down"]
    print(f"{method:>9}: {format_bytes(total):>7} in the whole run, all clients, both ways")

# %% [markdown]
# *Up* and *down* are the bytes of one client in a round in which the mask rests. *FLOPs of dense*
# is counted from the shapes and the mask: what kernels that skip zeros compute. *Training state*
# is what a client really holds: the message, the state that it brings, and the model in training,
# of pruned layers the active weights alone, with their gradients, their momentum and their places.
#
# One seed on under two thousand small digits proves nothing about the methods: another seed moves
# these numbers, and a task this easy flatters every method. For comparisons over several seeds,
# with their spread, see [simulations/fedtiny_cifar10.md](../simulations/fedtiny_cifar10.md).

# %% [markdown]
# ## 9. Use the model
#
# A result's `model` is a PyTorch module. Its pruned layers are sparse ones: they hold the active
# weights alone, and compute with them.

# %%
model = tiny.model

shown = slice(0, 12)
with torch.no_grad():
    predicted = model(prepare(digits.test.images[shown])).argmax(1)

figure, axes = plt.subplots(1, len(predicted), figsize=(10, 1.5))
for ax, image, guess, label in zip(
    axes, digits.test.images[shown], predicted, digits.test.labels[shown], strict=True
):
    ax.imshow(image[0], cmap="gray_r")
    right = guess == label
    ax.set_title(f"{guess}" if right else f"{guess}, not {label}",
                 color="black" if right else ORANGE, fontsize=10)
    ax.axis("off")
figure.suptitle("What the tiny model reads in test images")
plt.show()

small, whole = (
    (results[method].folder / "model.safetensors").stat().st_size
    for method in ("fedtiny", "fedavg")
)
print(f"file of the tiny model: {format_bytes(small)}; of the dense model: {format_bytes(whole)} "
      f"({whole / small:.1f} times as much)")

# %%
runs.cleanup()

# %% [markdown]
# ## 10. Where to go next
#
# The same from the command line, through [Flower](https://flower.ai)'s simulation engine, where
# clients work in processes of their own:
#
# ```bash
# fedprune run --help
# fedprune run --engine flower --density 0.03 --out runs/first   # then open runs/first/report.html
# fedprune inspect runs/first/model.safetensors                  # layers, densities, bytes
# fedprune compare --methods fedavg,magnitude,fedtiny --seeds 0,1,2
# ```
#
# - Change a line of `settings` and run the notebook again: a smaller `data.alpha`, another
#   `method.density`, `"method.adjust_until": 1` for a mask that never moves.
# - [02_choose_and_move_a_mask.ipynb](02_choose_and_move_a_mask.ipynb) builds FedTiny by hand, with
#   a picture of every step; [06_your_own.ipynb](06_your_own.ipynb) brings your data and network.
# - [docs/fedtiny.md](../docs/fedtiny.md) describes FedTiny step by step, with what departs from
#   the paper.
# - [README.md](../README.md) lists methods, data sets and models, and says how to use your own
#   data.
