# %% [markdown]
# # How clients choose a mask, and move it: FedTiny step by step
#
# A server wants a small network for data that it may not see. Which weights should exist? FedTiny
# (Huang et al., *Distributed Pruning Towards Tiny Neural Networks in Federated Learning*, ICDCS
# 2023) answers in two parts:
#
# - **adaptive batch-norm selection**: the server proposes several masks, and the clients find the
#   one that suits their data, by forward passes alone;
# - **progressive pruning**: while they train, the mask moves, some weights at a time.
#
# At the end of this notebook you will have built both parts by hand, in plain PyTorch, with a
# picture of every step, and will have run the real thing beside them. You know PyTorch and batch
# norm; [01_tiny_federated_model.ipynb](01_tiny_federated_model.ipynb) has the first words of
# federated learning.
#
# Everything runs on one CPU core in half a minute. Nothing is downloaded, nothing stays behind. It
# needs `pip install 'fedprune[notebooks]'`.

# %%
import copy
import math
import tempfile
import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import fedprune
import sparsemodel

torch.set_num_threads(1)
# fedprune says that floats are fed as they are; so they are meant.
warnings.filterwarnings("ignore", message="images are floats")
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
# ## 1. Four clients and a server
#
# Handwritten digits. The server has five labelled images of each. The clients share the rest, each
# with its own mix of digits (drawn from a Dirichlet distribution), and set a tenth of theirs aside
# for decisions: their *development* images, which are never trained on.

# %%
digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
labels = torch.tensor(digits.target)

rng = np.random.default_rng(0)
rows = torch.tensor(rng.permutation(len(labels)))
test, rest = rows[:360], rows[360:]
server = torch.cat([rest[labels[rest] == digit][:5] for digit in range(10)])
rest = rest[~torch.isin(rest, server)]

CLIENTS = 4
parts = [[] for _ in range(CLIENTS)]
for digit in range(10):
    held = rest[labels[rest] == digit]
    cuts = (rng.dirichlet([0.5] * CLIENTS).cumsum() * len(held)).astype(int)[:-1]
    for part, share in zip(parts, held.tensor_split(cuts.tolist()), strict=True):
        part.append(share)
shares = [torch.cat(part)[torch.tensor(rng.permutation(sum(map(len, part))))] for part in parts]
dev = [share[: len(share) // 10] for share in shares]
own = [share[len(share) // 10 :] for share in shares]

for number, share in enumerate(shares):
    counts = labels[share].bincount(minlength=10).tolist()
    print(f"client {number}: {len(share)} images, by digit {counts}")

# %% [markdown]
# ## 2. The server's dense network, and candidates
#
# The server trains a whole network on its fifty images. Every candidate keeps a tenth of the
# weights, the largest of each layer, but each spreads them differently over the layers.


# %%
def conv(inputs, outputs):
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]


def make_net():
    return nn.Sequential(
        *conv(1, 16), *conv(16, 32), nn.MaxPool2d(2), *conv(32, 32), *conv(32, 32),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )


def train(model, rows, *, epochs, seed, mask=None):
    """Stochastic gradient descent, under a mask if there is one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    held = sparsemodel.HeldMask(model, mask, optimizer) if mask else None
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for batch in rows[torch.randperm(len(rows), generator=generator)].split(32):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    if held:
        held.release()
    return model


@torch.no_grad()
def accuracy(model):
    return 100 * (model.eval()(images[test]).argmax(1) == labels[test]).float().mean().item()


torch.manual_seed(0)
dense = train(make_net(), server, epochs=20, seed=0)
masks = [
    sparsemodel.prune(dense, density=0.1, distribution="noise", seed=candidate)
    for candidate in range(6)
]
LAYERS = {"3.weight": "conv 2", "7.weight": "conv 3", "10.weight": "conv 4", "15.weight": "last"}

print(f"the dense network: {accuracy(dense):.0f} % of the test images")
for number, mask in enumerate(masks):
    spread = ", ".join(f"{LAYERS[name]} {100 * d:.0f} %" for name, d in mask.densities().items())
    print(f"candidate {number}: {mask.num_active:,} weights; {spread}")

# %% [markdown]
# ## 3. What pruning does to batch norm
#
# A batch norm subtracts a mean and divides by a standard deviation, which it has stored while the
# dense network was trained. Take nine of ten weights away, and what reaches it is smaller, and
# lies elsewhere. The stored numbers no longer fit.
#
# Here is what reaches one channel of the last batch norm.


# %%
def inputs_of_norms(model, rows):
    """Name of each batch norm -> its input, [images, channels, height, width], in training mode."""
    found, model = {}, copy.deepcopy(model).train()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: found.update({name: inputs[0]})
            )
    with torch.no_grad():
        model(images[rows])
    return found


def pruned(mask):
    model = copy.deepcopy(dense)
    mask.apply(model)
    return model


NORM, CHANNEL = "11", 5
everybody = torch.cat(dev)
before = inputs_of_norms(dense, everybody)[NORM][:, CHANNEL].flatten()
after = inputs_of_norms(pruned(masks[0]), everybody)[NORM][:, CHANNEL].flatten()
norm = dense[int(NORM)]
stored = norm.running_mean[CHANNEL].item(), norm.running_var[CHANNEL].sqrt().item()

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), sharey=True)
for ax, values, color, title in (
    (left, before, GREY, "dense network"), (right, after, BLUE, "candidate 0"),
):
    ax.hist(values.numpy(), bins=60, color=color, density=True)
    ax.axvline(stored[0], color=ORANGE, label="stored mean")
    ax.axvspan(stored[0] - stored[1], stored[0] + stored[1], color=ORANGE, alpha=0.15,
               label="± stored deviation")
    ax.set(title=title, xlabel=f"input of a channel of batch norm {NORM}")
right.legend()
left.set(ylabel="density of values")
plt.show()

print(f"stored {stored[0]:.2f} ± {stored[1]:.2f}; candidate 0 has "
      f"{after.mean().item():.2f} ± {after.std().item():.2f}")

# %% [markdown]
# ## 4. Adapt: measure, pool, send back
#
# So each client takes a candidate, passes its development images through once, and sends the mean
# and the variance that each batch norm saw. The server pools them, with p the share of a client's
# images:
#
# $$\mu = \sum_k p_k\,\mu_k \qquad \sigma^2 = \sum_k p_k\,(\sigma_k^2 + \mu_k^2) - \mu^2$$
#
# That is exactly the mean and the variance of all these values together, though no value has left
# its client. Only so much has: two numbers a channel.


# %%
def measure(model, rows):
    """What a client answers: batch norm -> mean and variance of each channel."""
    found = inputs_of_norms(model, rows)
    return {n: (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) for n, x in found.items()}


def pooled(answers, weights):
    """What the server makes of the answers."""
    result = {}
    for name in answers[0]:
        mean = sum(p * answer[name][0] for p, answer in zip(weights, answers, strict=True))
        square = sum(p * (answer[name][1] + answer[name][0] ** 2)
                     for p, answer in zip(weights, answers, strict=True))
        result[name] = mean, square - mean**2
    return result


def adapted(model, statistics):
    model = copy.deepcopy(model)
    for name, (mean, variance) in statistics.items():
        norm = model.get_submodule(name)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
    return model


weights = [len(part) / len(everybody) for part in dev]
answers = [measure(pruned(masks[0]), part) for part in dev]
pool = pooled(answers, weights)

FIRST = "1"  # of the first batch norm, of which the sums can be checked by hand
union = measure(pruned(masks[0]), everybody)[FIRST]
gap = max((a - b).abs().max().item() for a, b in zip(pool[FIRST], union, strict=True))
print(f"pooled against all images in one place, first batch norm: they differ by less than 1e-6: "
      f"{gap < 1e-6}")

figure, ax = plt.subplots(figsize=(8, 2.8))
names = [f"client {number}" for number in range(CLIENTS)]
for name, answer, color in [
    *zip(names, answers, [GREY] * CLIENTS, strict=True), ("pooled", pool, BLUE),
]:
    mean, variance = answer[NORM]
    ax.errorbar(mean[CHANNEL], name, xerr=variance[CHANNEL].sqrt(), fmt="o", color=color, capsize=4)
ax.errorbar(stored[0], "stored", xerr=stored[1], fmt="o", color=ORANGE, capsize=4)
ax.set(title="The same channel: what each client saw, what the server makes of it, what was stored",
       xlabel="mean ± deviation")
ax.invert_yaxis()
ax.grid(alpha=0.3, axis="x")
plt.show()

# %% [markdown]
# (Deeper batch norms see what earlier ones have normalised by a client's own statistics. There the
# pooled numbers are those of the values that clients really had, which is what we want.)
#
# ## 5. Select
#
# Now every client computes the loss of every candidate, with the pooled statistics, on its
# development images. The smallest mean loss wins. Had we skipped the adaptation, what would we have
# seen?


# %%
@torch.no_grad()
def dev_loss(model):
    model.eval()
    losses = [functional.cross_entropy(model(images[part]), labels[part]) for part in dev]
    return sum(p * loss.item() for p, loss in zip(weights, losses, strict=True))


candidates = [pruned(mask) for mask in masks]
plain = [dev_loss(model) for model in candidates]
fitting = [
    adapted(model, pooled([measure(model, part) for part in dev], weights)) for model in candidates
]
adjusted = [dev_loss(model) for model in fitting]
winner = min(range(len(masks)), key=adjusted.__getitem__)

figure, ax = plt.subplots(figsize=(8, 3))
places = range(len(masks))
ax.hlines(places, adjusted, plain, color=GREY, linewidth=1)
ax.plot(plain, places, "o", color=ORANGE, label="stored statistics")
ax.plot(adjusted, places, "o", color=BLUE, label="pooled statistics")
ax.plot(adjusted[winner], winner, "D", color=BLUE, markersize=11, label="winner")
ax.axvline(math.log(10), color=GREY, linestyle="--", label="guessing")
ax.set(title="Six candidates on the clients' development images",
       xlabel="loss (smaller is better)", ylabel="candidate", yticks=places)
ax.invert_yaxis()
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# With the stored statistics every candidate is worse than guessing, and their order says nothing.
# With pooled ones all know something, and they can be told apart.
#
# Is the order right? We may ask, because this is a notebook: train every candidate for three rounds
# of federated averaging, and look at the test images.


# %%
def federated_round(model, mask, seed):
    """Clients train, the server averages what they send, by their numbers of images."""
    states = [
        train(copy.deepcopy(model), rows, epochs=1, seed=seed, mask=mask).state_dict()
        for rows in own
    ]
    total = sum(map(len, own))
    mean = {
        name: sum(len(rows) / total * state[name].float()
                  for rows, state in zip(own, states, strict=True)).to(like.dtype)
        for name, like in states[0].items()
    }
    model = copy.deepcopy(model)
    model.load_state_dict(mean)
    return model


trained = []
for start, mask in zip(fitting, masks, strict=True):
    model = start
    for number in range(3):
        model = federated_round(model, mask, seed=number)
    trained.append(accuracy(model))

figure, axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True)
for ax, losses, color, title in zip(
    axes, (plain, adjusted), (ORANGE, BLUE), ("stored statistics", "pooled statistics"), strict=True
):
    ax.plot(losses, trained, "o", color=color)
    for number, point in enumerate(zip(losses, trained, strict=True)):
        ax.annotate(str(number), point, (5, 4), textcoords="offset points")
    ax.set(title=f"By the {title}", xlabel="loss of the candidate before training")
    ax.grid(alpha=0.3)
axes[0].set(ylabel="test accuracy after 3 rounds, %")
plt.show()

print(f"stored statistics would choose candidate {min(places, key=plain.__getitem__)}, "
      f"pooled ones choose candidate {winner}")

# %% [markdown]
# Stored statistics choose the candidate that ends lowest, pooled ones one of those that end
# highest. One seed, six candidates: that is an example, no proof.
# [simulations/LOG.md](../simulations/LOG.md) tells where the selection fails.
#
# ## 6. One adjustment
#
# The winner was made from fifty images. While clients train, it should get better. After a round
# the mask of one block of layers moves:
#
# 1. each client computes the gradient at the weights that do *not* exist, on one mini-batch, and
#    sends the largest few, with their positions;
# 2. the server averages them; what a client did not send counts as zero;
# 3. the active weights closest to zero go, and as many grow where the mean gradient is largest.
#    They begin at zero.
#
# The last layer is small enough to look at: a row for each digit.

# %%
LAST = "15.weight"
model = federated_round(fitting[winner], masks[winner], seed=0)
weight, kept = model[15].weight.detach(), masks[winner][LAST]
COUNT = int(0.3 * kept.sum())  # of how many weights move: 30 % of the active ones

sent = []
for rows in own:
    client = copy.deepcopy(model).train()
    functional.cross_entropy(client(images[rows[:64]]), labels[rows[:64]]).backward()
    gradient = client[15].weight.grad.masked_fill(kept, 0)
    largest = gradient.abs().flatten().topk(COUNT).indices
    sent.append(torch.zeros(gradient.numel()).index_copy(0, largest, gradient.flatten()[largest]))

mean = sum(len(rows) * each for rows, each in zip(own, sent, strict=True)) / sum(map(len, own))
mean = mean.reshape(kept.shape)
goes = weight.abs().masked_fill(~kept, torch.inf).flatten().topk(COUNT, largest=False).indices
grows = mean.abs().flatten().topk(COUNT).indices
moved = kept.flatten().index_fill(0, goes, False).index_fill(0, grows, True).reshape(kept.shape)

figure, axes = plt.subplots(4, 1, figsize=(8, 8.4))
axes[0].imshow(weight.where(kept, torch.nan).abs(), cmap="Blues", vmin=0, aspect="auto")
axes[0].set_title(f"Active weights, by size; × are the {COUNT} closest to zero")
axes[0].plot(goes % 32, goes // 32, "x", color=ORANGE)
for number, (each, marker) in enumerate(zip(sent, "os^d", strict=True)):
    places = each.nonzero().flatten()
    axes[1].plot(places % 32, places // 32, marker, fillstyle="none", markersize=4 + 3 * number,
                 color=GREY if number % 2 else BLUE, label=f"client {number}")
axes[1].set_title("Largest gradients at pruned places, as each client sent them")
axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
axes[2].imshow(mean.abs(), cmap="Greens", aspect="auto")
axes[2].set_title(f"Their mean, by size; ○ are the {COUNT} largest")
axes[2].plot(grows % 32, grows // 32, "o", fillstyle="none", color="black")
for what, color, marker, label in (
    (kept & moved, GREY, "s", "stay"), (kept & ~moved, ORANGE, "x", "go"),
    (~kept & moved, GREEN, "o", "grow"),
):
    row, column = what.nonzero(as_tuple=True)
    axes[3].plot(column, row, marker, color=color, label=f"{label}: {len(row)}")
axes[3].set_title("The new mask")
axes[3].legend(loc="center left", bbox_to_anchor=(1, 0.5))
for ax in axes:
    ax.set(xlim=(-0.7, 31.7), ylim=(9.7, -0.7), ylabel="digit", yticks=range(0, 10, 3))
axes[3].set_xlabel("feature")
plt.show()

# %% [markdown]
# As many weights grow as go: density and bytes stay. A client never holds a dense gradient, only
# that of one layer at a time, and sends a few numbers of it.
#
# ## 7. The real thing
#
# `fedprune.run` does all of this, with messages that are encoded and measured as on a network.
# Blocks take turns, from the output to the input, and a cosine says how many weights move:
# $\frac{\alpha}{2}(1 + \cos\frac{\pi r}{R})$ of the layer's active weights after round $r$. Beside
# it runs `fedtiny-fixed`, the same without progressive pruning.

# %%
training = torch.cat([rest, server])
data = {"train": (images[training], labels[training]), "test": (images[test], labels[test])}
ROUNDS, UNTIL, RATE = 10, 8, 0.3
settings = {
    "method.density": 0.1, "method.pool_size": 6, "server.per_class": 5, "data.alpha": 0.5,
    "server.pretrain_epochs": 20, "training.lr": 0.1, "training.local_epochs": 1,
}
moving = {"method.adjust_every": 1, "method.adjust_until": UNTIL, "method.adjust_rate": RATE}
metrics = {}
with tempfile.TemporaryDirectory(prefix="fedprune-") as folder:
    for method, more in (("fedtiny-fixed", {}), ("fedtiny", moving)):
        result = fedprune.run(
            model=make_net, data=data, method=method, clients=CLIENTS, rounds=ROUNDS, seed=0,
            settings={**settings, **more}, folder=f"{folder}/{method}",
        )
        metrics[method] = result.metrics
        kept = result.state.patterns.counts()

start, *lines = metrics["fedtiny"]
losses, chosen = start["selection"]["losses"], start["selection"]["winner"]
print("losses of the candidates:", ", ".join(f"{loss:.2f}" for loss in losses))
print("the clients chose candidate", chosen)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
shades = dict(zip(kept, (GREY, GREEN, BLUE, ORANGE), strict=True))
for line in lines:
    share = RATE / 2 * (1 + math.cos(math.pi * line["round"] / UNTIL))
    below = 0
    for name in line["adjusted"]:
        count = int(share * kept[name])
        left.bar(line["round"], count, bottom=below, color=shades[name])
        below += count
for name, color in shades.items():
    left.bar(1, 0, color=color, label=LAYERS[name])
left.set(title="Weights that move", xlabel="after round", ylabel="weights",
         xticks=range(1, ROUNDS + 1))
left.legend()
for (method, found), color in zip(metrics.items(), (GREY, BLUE), strict=True):
    accuracies = [100 * line["test_accuracy"] for line in found[1:]]
    right.plot(range(1, ROUNDS + 1), accuracies, "o-", color=color, label=method)
right.set(title="Test accuracy, %", xlabel="round", xticks=range(1, ROUNDS + 1))
right.grid(alpha=0.3)
right.legend()
plt.show()

# %% [markdown]
# Another division of the digits, other initial weights: so the losses are others than ours. On a
# task this easy the mask that never moves does as well; the first rounds even go slower when
# weights come and go. The page of a run, `report.html` in its folder, shows such pictures for your
# own data.
#
# ## 8. Where to go next
#
# - [docs/fedtiny.md](../docs/fedtiny.md): every step again with its file, what departs from the
#   paper, and `fedtiny-plus`, in which clients choose between other kinds of masks.
# - [fedprune/methods/fedtiny/](../fedprune/methods/fedtiny): `pool.py`, `selection.py` and
#   `progressive.py` are the parts of this notebook.
# - `fedprune compare --methods fedtiny,fedtiny-vanilla,fedtiny-fixed --seeds 0,1,2` runs the
#   ablations over several seeds; [docs/comparing.md](../docs/comparing.md) reads such tables.
# - [06_your_own.ipynb](06_your_own.ipynb): a method of your own.
