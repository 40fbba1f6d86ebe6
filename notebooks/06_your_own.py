# %% [markdown]
# # Your own model, data, method and score
#
# Wherever a name stands in fedprune and datapruning, something of yours may stand: a folder, a
# network, a function. At the end of this notebook you will have brought four things of your own,
# each in a few lines:
#
# - **data**: a folder of pictures, some of which lie in the wrong class;
# - **a model**: a network as you write it anyway;
# - **a score** of samples, which finds those pictures;
# - **a federated method**, with a half for clients and a half for the server.
#
# You know PyTorch; [01_tiny_federated_model.ipynb](01_tiny_federated_model.ipynb) and
# [03_prune_your_data.ipynb](03_prune_your_data.ipynb) have the first words.
#
# Everything runs on one CPU core in half a minute. Nothing is downloaded, nothing stays behind. It
# needs `pip install 'fedprune[notebooks]'`.

# %%
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

import datapruning
import fedprune
from fedprune.methods import train, train_request

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
# ## 1. Your own data
#
# Somebody has drawn shapes and sorted them into folders, a folder for each class, and did not look
# closely every time: a quarter of the training pictures lie in a wrong folder. Yours are
# `pictures/train/CLASS/NAME.png` (or `.jpg`); without a side `test`, a fifth is set aside for it.

# %%
SHAPES = ["circle", "cross", "square", "triangle"]
draw = np.random.default_rng(0)


def picture(shape):
    """A shape somewhere, of some size and shade, on noise."""
    image = Image.fromarray(draw.integers(0, 150, (16, 16), dtype=np.uint8))
    pen, shade = ImageDraw.Draw(image), int(draw.integers(160, 255))
    size = int(draw.integers(5, 10))
    x, y = draw.integers(0, 16 - size, 2).tolist()
    if shape == "circle":
        pen.ellipse((x, y, x + size, y + size), fill=shade)
    elif shape == "square":
        pen.rectangle((x, y, x + size, y + size), fill=shade)
    elif shape == "triangle":
        pen.polygon([(x, y + size), (x + size, y + size), (x + size / 2, y)], fill=shade)
    else:
        pen.line((x, y, x + size, y + size), fill=shade, width=2)
        pen.line((x, y + size, x + size, y), fill=shade, width=2)
    return image


home = tempfile.TemporaryDirectory(prefix="fedprune-")
folder = Path(home.name) / "pictures"
wrong = set()  # what nobody knows: files in a wrong folder
for side, count in (("train", 150), ("test", 75)):
    for shape in SHAPES:
        for number in range(count):
            put = shape
            if side == "train" and number % 4 == 0:
                put = str(draw.choice([other for other in SHAPES if other != shape]))
            path = folder / side / put / f"{side}-{draw.integers(10**9)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(shape).save(path)
            if put != shape:
                wrong.add(path)

figure, axes = plt.subplots(2, 8, figsize=(9, 2.6))
for column, shape in zip(axes.T.reshape(4, 4), SHAPES, strict=True):
    for ax, path in zip(column, sorted((folder / "train" / shape).iterdir())[20:], strict=False):
        ax.imshow(Image.open(path), cmap="gray")
        ax.set_title(shape, fontsize=9)
        ax.axis("off")
figure.suptitle("Four pictures of each folder")
plt.show()

# %% [markdown]
# ## 2. Your own model
#
# Any `nn.Module`. A function or class without arguments is called to build it; one with parameters
# `num_classes` and `input_shape` gets what the data have.


# %%
class Net(nn.Module):
    def __init__(self, num_classes, input_shape):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(input_shape[0], 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.AdaptiveMaxPool2d(1), nn.Flatten(),
        )
        self.head = nn.Linear(32, num_classes)

    def forward(self, images):
        return self.head(self.features(images))


training = datapruning.TrainingConfig(epochs=12, batch_size=32, lr=0.05)
model = datapruning.train(folder / "train", model=Net, training=training)
accuracies = {"all pictures": datapruning.evaluate(model, folder / "test").accuracy}
print(f"trained on all pictures: right on {accuracies['all pictures']:.1%} of the test pictures")

# %% [markdown]
# ## 3. Your own score
#
# A score is a function of the network's outputs and the labels. High means keep. This one is the
# probability that the network gives to the label: where it is low, one of the two is wrong.
#
# A network that has trained for long has learned wrong labels by heart. So we score with one that
# has trained for a few epochs only.


# %%
def trust(logits, labels):
    return logits.softmax(1).gather(1, labels[:, None])[:, 0]


short = datapruning.TrainingConfig(epochs=4, batch_size=32, lr=0.05)
table = datapruning.score(folder / "train", model=Net, method=trust, training=short)

# Rows of the table are files in the order of their folders and names.
files = [path for shape in SHAPES for path in sorted((folder / "train" / shape).iterdir())]
is_wrong = torch.tensor([path in wrong for path in files])

figure, ax = plt.subplots(figsize=(8, 2.6))
bins = torch.linspace(0, 1, 31)
scores = table.scores.float()
ax.hist([scores[~is_wrong], scores[is_wrong]], bins=bins, stacked=True, color=[BLUE, ORANGE],
        label=["right folder", "wrong folder"])
ax.set(title="Our score, with what we alone know", xlabel="trust", ylabel="pictures")
ax.legend()
plt.show()

figure, axes = plt.subplots(1, 12, figsize=(10, 1.3))
for ax, row in zip(axes, table.scores.argsort().tolist(), strict=False):
    ax.imshow(Image.open(files[row]), cmap="gray")
    ax.set_title(SHAPES[table.labels[row]], fontsize=9, color=ORANGE if is_wrong[row] else "black")
    ax.axis("off")
figure.suptitle("The least trusted, under the names of their folders")
plt.show()

# %% [markdown]
# Now keep the three quarters that are trusted most, and train on them. As many at random stand
# beside them: a score that does not beat chance is none.

# %%
kept = table.select(keep=0.75, policy="hardest")
chance = datapruning.score(folder / "train", method="random").select(keep=0.75)
for name, subset in (("75 % by chance", chance), ("75 % by trust", kept)):
    chosen = datapruning.train(subset.of(folder / "train"), model=Net, training=training)
    accuracies[name] = datapruning.evaluate(chosen, folder / "test").accuracy

dropped = 1 - is_wrong[kept.ids].sum() / is_wrong.sum()
print(f"{dropped:.0%} of the pictures in wrong folders are gone")
for name, accuracy in accuracies.items():
    print(f"{name:<15} right on {accuracy:.1%} of the test pictures")

# %% [markdown]
# (`policy="hardest"` keeps the highest scores. It is named after scores of hardness; yours may mean
# something else.)
#
# ## 4. Your own federated method
#
# A method is a dataclass of its settings. It has a client half, functions that answer questions,
# and a server half, which asks and makes a new state of the answers. What you do not write is
# inherited: here everything about the mask, from `Magnitude`.
#
# Ours: while clients train, they also draw every weight a little towards zero (an L1 penalty), so
# that few large weights do the work; and the server goes only a part of the way to the mean of what
# they send.


# %%
def train_with_l1(request, local):
    """The client half."""

    def add_penalty(values, gradients):
        for name, gradient in gradients.items():
            gradient[...] += request.fields["l1"] * np.sign(values[name])

    return train(request, local, correction=add_penalty)


@dataclass(frozen=True)
class Careful(fedprune.Magnitude):
    """The server half."""

    name: ClassVar[str] = "careful"
    actions: ClassVar[dict] = {"train": train_with_l1}
    l1: float = 0.003
    step: float = 0.9

    def request(self, state):
        return train_request(state, fields={"l1": self.l1})

    def update(self, state, pooled):
        mean, old = pooled.model, state.model.values
        moved = {name: w + self.step * (mean.values[name] - w) for name, w in old.items()}
        return super().update(state, pooled.with_model(mean.replace(moved)))


results = {
    method.name: fedprune.run(
        model=Net, data=folder, method=method, clients=4, rounds=6, seed=0,
        settings={"training.lr": 0.05, "training.local_epochs": 2},
        folder=Path(home.name) / method.name,
    )
    for method in (fedprune.Magnitude(density=0.3), Careful(density=0.3))
}

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
for (name, result), color in zip(results.items(), (GREY, BLUE), strict=True):
    found = [100 * line["test_accuracy"] for line in result.metrics[1:]]
    left.plot(range(1, 7), found, "o-", color=color, label=name)
    weights = np.abs(np.concatenate([result.state.values[n] for n in result.state.patterns]))
    right.plot(np.linspace(0, 100, len(weights)), np.sort(weights), color=color, label=name)
left.set(title="Test accuracy, %", xlabel="round", xticks=range(1, 7))
right.set(title="Active weights, sorted", xlabel="% of the weights", ylabel="|w|")
for ax in (left, right):
    ax.grid(alpha=0.3)
    ax.legend()
plt.show()

home.cleanup()

# %% [markdown]
# The penalty shows in the weights: nearly all are smaller. Accuracies differ by less than another
# seed would make of them. (The clients train on all pictures, wrong folders and all.)
#
# A seed ranks nothing: [docs/comparing.md](../docs/comparing.md) sets your method against others.
#
# ## 5. Where to go next
#
# - [examples/](../examples): the same ideas as scripts, among them a
#   [table](../examples/table_regression.py), a [network by name](../examples/timm_network.py) and
#   [texts](../examples/text_trainer.py).
# - [docs/tasks.md](../docs/tasks.md): your own loss and metric.
# - [docs/pruning.md](../docs/pruning.md): your own criterion, which scores weights in place of
#   samples, in six lines.
# - [docs/runs.md](../docs/runs.md): what data may look like, and your own division among clients.
# - [fedprune/methods/fedprox.py](../fedprune/methods/fedprox.py): a published method in 60 lines.
# - `fedprune new my-app` writes an app of Flower's with your network, data and method in it.
# - [05_from_simulation_to_a_fleet.ipynb](05_from_simulation_to_a_fleet.ipynb): from one process to
#   real nodes.
