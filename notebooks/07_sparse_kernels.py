# %% [markdown]
# # Sparse kernels: from counted to measured
#
# A network pruned to 5 % needs a twentieth of the multiplications. So papers count. Most programs
# then multiply all the zeros, and take as long as before.
#
# At the end of this notebook you will have trained one network three ways, dense, under a mask and
# truly sparse, and will know of each what it computes, what it holds in memory and how long a step
# takes on your machine. You will have three pictures: what a sparse layer stores, how much faster
# one layer is, and how much faster a whole training step is.
#
# You know PyTorch. Three words come first:
#
# - **Mask**: which weights of a network exist (are *active*). The others are zero and stay zero.
# - **Density**: active weights over all weights that may be pruned.
# - **Kernel**: the inner loops that compute a layer.
#
# Everything runs on one CPU core in half a minute. Nothing is downloaded. It needs
# `pip install 'fedprune[notebooks]'`, and a C++ compiler when that is installed: without one, all
# of it works by slower torch code.

# %%
import copy
import statistics
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import sparsemodel

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
# ## 1. A network, and data for it
#
# Handwritten digits, 8×8 grey values each, and a plain convolutional network.

# %%
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
BATCH = 64


def conv(inputs, outputs):
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]


torch.manual_seed(0)
network = nn.Sequential(
    *conv(1, 64), *conv(64, 128), nn.MaxPool2d(2), *conv(128, 256), *conv(256, 256),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10),
)
print(f"{sum(p.numel() for p in network.parameters()):,} parameters")

# %% [markdown]
# ## 2. Prune
#
# `prune` says which weights stay, here the largest of each layer. It leaves the network as it is.
# The layer that the input reaches first is not pruned, and neither are biases and batch norms:
# they are few, and matter much.

# %%
mask = sparsemodel.prune(network, density=0.05)
for name, kept in mask.counts().items():
    print(f"{name:<10} keeps {kept:>6,} of {mask[name].numel():>7,}")
print(f"density    {mask.density:.4f}")

# %% [markdown]
# ## 3. What a sparse layer stores
#
# `sparsify` gives a copy of the network whose pruned layers hold their active weights and nothing
# else. The weight of a layer is flattened to a table, a row for each output, and of each row the
# active `values` are stored, with the numbers of their columns, `cols`. `row_ptr` says where each
# row begins. That is the old CSR format, compressed sparse rows.
#
# A layer small enough to look at:

# %%
torch.manual_seed(2)
small = nn.Sequential(nn.Linear(16, 6))
# The first layer is pruned only when it is named.
few = sparsemodel.prune(small, density=0.2, names=["0.weight"])
layer = sparsemodel.sparsify(small, few)[0]

figure, ax = plt.subplots(figsize=(9, 3))
kept = few["0.weight"]
reach = float(small[0].weight.detach().abs().max())
weights = small[0].weight.detach().where(kept, torch.nan)
picture = ax.imshow(weights, cmap="PuOr", vmin=-reach, vmax=reach, aspect="auto")
for row, column in (~kept).nonzero().tolist():
    ax.text(column, row, "·", ha="center", va="center", color=GREY)
begin = layer.row_ptr.tolist()
for row in range(6):
    columns = layer.cols[begin[row] : begin[row + 1]].tolist()
    ax.text(16, row, f"cols {columns}", va="center", family="monospace")
ax.set(title="A layer of 16 inputs and 6 outputs, and what is stored of it", xlabel="input",
       ylabel="output", xticks=range(0, 16, 5))
ax.spines[:].set_visible(False)
figure.colorbar(picture, label="value", location="left", shrink=0.8)
plt.show()

print("row_ptr", begin)

# %% [markdown]
# Two decisions make this fast, though the active weights lie anywhere:
#
# - **Batch innermost.** Activations lie in memory as [channels, height, width, batch]. One weight
#   then multiplies a run of neighbouring numbers, those of the whole batch, as fast as a processor
#   can. A dense kernel gets its runs from neighbouring weights, and there are none here.
# - **Sparse everywhere.** The backward pass computes gradients of active weights alone, and the
#   optimiser keeps momentum for these alone.
#
# ## 4. The same training, three ways
#
# - *Dense*: all weights are trained.
# - *Masked*: pruned weights are set to zero after each step of the optimiser. So most papers
#   compute. It is `sparsemodel.HeldMask` in your own training loop.
# - *Sparse*: `TrainingPlan` runs forward pass, loss, backward pass and the optimiser's step of a
#   sparse network in one native call.

# %%
SGD = {"lr": 0.1, "momentum": 0.9}
held = []  # a mask is held as long as somebody keeps it


def torch_step(model, optimizer):
    def step(x, y):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def dense():
    model = copy.deepcopy(network)
    return model, torch_step(model, torch.optim.SGD(model.parameters(), **SGD))


def masked(mask):
    model = copy.deepcopy(network)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    held.append(sparsemodel.HeldMask(model, mask, optimizer))  # from now on zeros stay zero
    return model, torch_step(model, optimizer)


def sparse(mask):
    model = sparsemodel.sparsify(network, mask)
    plan = sparsemodel.TrainingPlan(model, images.shape[1:], batch_size=BATCH)
    optimizer = sparsemodel.SparseSGD(model.parameters(), **SGD)
    return model, lambda x, y: plan.step(x, y, optimizer=optimizer)[0]


ways = {"dense": dense(), "masked": masked(mask), "sparse": sparse(mask)}
STEPS = 20
losses = {name: [] for name in ways}
for number in range(STEPS):
    batch = slice(BATCH * number, BATCH * (number + 1))
    for name, (_, step) in ways.items():
        losses[name].append(step(images[batch], labels[batch]))

for number in (0, 1, 9, 19):
    shown = "  ".join(f"{name} {of[number]:.4f}" for name, of in losses.items())
    print(f"loss of step {number + 1:>2}: {shown}")

# %% [markdown]
# Masked and sparse training are the same computation, up to the order in which numbers are added.
# What differs is what it takes.
#
# ## 5. Counted
#
# A training step multiplies three times for each weight and each place that the weight is applied
# at: forward, for the gradient of the input, for the gradient of the weight. Multiply-adds are
# counted from shapes and mask. Bytes are those of the tensors that the trained networks really
# hold: weights, their gradients and momentum, patterns and statistics.

# %%
PLACES = {"0": 64, "3": 64, "7": 16, "10": 16, "15": 1}  # where each layer's weights are applied


def multiplications(mask=None):
    """Multiply-adds of a training step for one image."""
    layers = {name.removesuffix(".weight"): kept for name, kept in (mask or {}).items()}
    return 3 * sum(
        places * int(layers[name].sum() if name in layers else network[int(name)].weight.numel())
        for name, places in PLACES.items()
    )


def held_bytes(model):
    weights = list(model.parameters())
    # Gradient and momentum are as large as the weights.
    return 3 * sum(w.nbytes for w in weights) + sum(b.nbytes for b in model.buffers())


whole = multiplications()
counted = {"dense": whole, "masked": whole, "sparse": multiplications(mask)}
print("           multiply-adds        ratio     bytes       ratio")
base = held_bytes(ways["dense"][0])
for name, (model, _) in ways.items():
    size = held_bytes(model)
    print(f"{name:<8} {counted[name]:>15,} {whole / counted[name]:>11.1f} {size:>12,} "
          f"{base / size:>8.1f}")

# %% [markdown]
# Neither is twenty times less. The first layer is whole, and with every active weight comes the
# number of its column and its place in an index that the backward pass reads.
#
# ## 6. Measured: one layer
#
# The last convolution, forward and backward, at several densities. Times are of the processor, the
# median of several calls that take turns. The dashed line is what counting promises:
# one over the density.
#
# **These pictures are of one machine.** On yours they will look different; run the cell.

# %%
# Measured on one machine, here by one thread.
def median_seconds(calls, rounds):
    """Name -> processor time of a call; all calls take turns."""
    seconds = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if number:  # the first call only warms up
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(of) for name, of in seconds.items()}


def forward_and_backward(layer, x, dy):
    x = x.clone().requires_grad_()
    return lambda: torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)


def batch_innermost(x):
    """The layout in which one sparse layer leaves its output to the next."""
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


DENSITIES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
x, dy = torch.randn(2, BATCH, 256, 4, 4)
last = nn.Sequential(network[10])
calls = {"dense": forward_and_backward(last, x, dy)}
for density in DENSITIES:
    found = sparsemodel.prune(last, density=density, names=["0.weight"])
    layer = sparsemodel.sparsify(last, found)
    calls[density] = forward_and_backward(layer, batch_innermost(x), batch_innermost(dy))
seconds = median_seconds(calls, rounds=7)

figure, ax = plt.subplots(figsize=(8, 3.6))
ax.plot(DENSITIES, [1 / d for d in DENSITIES], "--", color=GREY, label="counted: 1 / density")
faster = [seconds["dense"] / seconds[d] for d in DENSITIES]
ax.plot(DENSITIES, faster, "o-", color=BLUE, label="measured")
for density, ratio in zip(DENSITIES, faster, strict=True):
    ax.annotate(f"{ratio:.1f}", (density, ratio), (4, 5), textcoords="offset points")
ax.axhline(1, color=ORANGE, linewidth=1, label="dense torch")
ticks = [1, 2, 5, 10, 20, 50, 100]
ax.set(title="A convolution of 256 channels, forward and backward", xscale="log", yscale="log",
       xlabel="density", ylabel="times faster than dense torch", yticks=ticks, yticklabels=ticks,
       xticks=DENSITIES, xticklabels=[f"{d:g}" for d in DENSITIES])
ax.minorticks_off()
ax.grid(alpha=0.3)
ax.legend()
plt.show()

# %% [markdown]
# Below the dashed line lies what counting leaves out. A dense kernel loads a weight once and uses
# it many times from registers. A sparse one multiplies where the weights happen to lie, so that
# each multiplication needs a load of its own. At the lowest densities there is so little to
# multiply that reading and writing the activations takes most of the time.
#
# From some density on, dense kernels are faster. `execution="auto"`, which is the default, predicts
# for each call which kernel wins. The prediction was fitted on another processor than the one of
# this picture. Here it stays with sparse kernels for too long, and loses where half of the weights
# are active; `sparsify(..., execution="dense")` would have been right there.
#
# ## 7. Measured: a whole training step
#
# A step also has batch norms, pools, the whole first layer and the optimiser: nothing of these gets
# less when weights are pruned. Beside dense and masked torch stand a sparse network in a loop of
# torch's (its *modules*), and the plan.

# %%
# Measured on one machine, here by one thread.
def modules(mask):
    model = sparsemodel.sparsify(network, mask)
    return model, torch_step(model, sparsemodel.SparseSGD(model.parameters(), **SGD))


x, y = images[:BATCH], labels[:BATCH]
masks = {d: sparsemodel.prune(network, density=d) for d in (0.01, 0.05, 0.2)}
steps = {("dense", 0): dense()[1]}
for density, found in masks.items():
    for name, way in (("masked", masked), ("modules", modules), ("plan", sparse)):
        steps[name, density] = way(found)[1]
calls = {key: lambda step=step: step(x, y) for key, step in steps.items()}
seconds = median_seconds(calls, rounds=7)

figure, ax = plt.subplots(figsize=(8, 3.6))
shown = {"masked": ORANGE, "modules": GREEN, "plan": BLUE}
for place, density in enumerate(masks):
    promised = whole / multiplications(masks[density])
    line = ax.hlines(promised, place - 0.42, place + 0.42, color=GREY, linestyle="--")
    for shift, (name, color) in zip((-0.27, 0, 0.27), shown.items(), strict=True):
        ratio = seconds["dense", 0] / seconds[name, density]
        bars = ax.bar(place + shift, ratio, 0.25, color=color, label=name if place == 0 else None)
        ax.bar_label(bars, fmt="%.1f")
line.set_label("counted")
ax.set(title="A training step of the network, batch 64", ylabel="times faster than dense torch",
       xticks=range(len(masks)), xticklabels=[f"density {d:g}" for d in masks], yscale="log",
       yticks=ticks, yticklabels=ticks)
ax.minorticks_off()
ax.legend()
plt.show()

# %% [markdown]
# A mask alone buys nothing: torch multiplies its zeros. The modules are fast where a layer is
# large; the plan also spares what lies between the layers. Neither reaches what is counted, so a
# claim of speed should be measured.
#
# ## 8. Keep it
#
# A file holds the active weights and their pattern. `load` fills a freshly built network.

# %%
with tempfile.TemporaryDirectory(prefix="fedprune-") as folder:
    tiny = ways["sparse"][0]
    sparsemodel.save(tiny, Path(folder) / "tiny.safetensors")
    loaded = sparsemodel.load(Path(folder) / "tiny.safetensors", copy.deepcopy(network))
    size = (Path(folder) / "tiny.safetensors").stat().st_size
same = torch.equal(loaded.eval()(x), tiny.eval()(x))
whole_size = sum(t.nbytes for t in network.state_dict().values())
print(f"{size:,} bytes, where the dense network has {whole_size:,}; the same outputs: {same}")

# %% [markdown]
# ## 9. Where to go next
#
# - [docs/sparse.md](../docs/sparse.md): which networks run, what is refused, tables of larger
#   networks with their commands, and what limits the kernels.
# - `python -m benchmarks.sparse_layers --quick` and `python -m benchmarks.sparse_step --quick`, in
#   a checkout, measure your machine with care, beside other sparse libraries.
# - [docs/kernels.md](../docs/kernels.md): the same question on a GPU, where tensor cores are hard
#   to beat.
# - [docs/pruning.md](../docs/pruning.md): better masks than the largest weights.
# - [01_tiny_federated_model.ipynb](01_tiny_federated_model.ipynb): clients that compute in this
#   way, and need no torch.
