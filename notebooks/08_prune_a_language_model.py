# %% [markdown]
# # Prune a language model, alone and across clients
#
# A language model has far more weights than a small device has room for. Many of them can go. Which
# ones shows in texts, and texts are what people do not want to give away.
#
# At the end of this notebook you will have trained a small language model, pruned it by three
# criteria, mended it, and seen what it still knows. Then three clients, each with texts of its own,
# will prune it together without showing them, and arrive at the very mask that all texts in one
# place would give.
#
# You know PyTorch, and what a transformer is. Three words come first:
#
# - **Mask**: which weights of a model exist; **density**: the share of those that do.
# - **Criterion**: gives each weight a score; high means keep.
# - **Calibration**: a look at what flows through the layers while the model reads some text.
#
# Everything runs on one CPU core in half a minute. Nothing is downloaded, nothing stays behind. It
# needs `pip install 'fedprune[llm,notebooks]'`.

# %%
import copy
import math
import random
import tempfile

import matplotlib.pyplot as plt
import pandas
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import datapruning
import fedprune
import sparsemodel
from fedprune.methods import PERP, Wanda
from prunelab.data.given import as_sample_set
from sparsemodel.pipeline.running import Pipeline
from sparsemodel.pipeline.stages import Perp, Weights

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
# ## 1. A small language, and a model of it
#
# Three places, eight beings in each, and every being has a habit: what it does, and where. A text
# tells of a place and three of its beings. Who reads enough of them knows all habits, and that is
# what a model has to keep.

# %%
BEINGS = {
    "zoo": "lion tiger bear wolf seal crane otter camel".split(),
    "kitchen": "cook baker guest waiter butler maid grocer dishwasher".split(),
    "harbour": "sailor pilot captain gull diver porter fisher smuggler".split(),
}
DOES = "sleeps runs eats waits plays sings works dreams reads counts".split()
WHERE = "rock tree pond door lamp fire wall boat bench well".split()

draw = random.Random(0)
habits = {
    being: f"{draw.choice(DOES)} by the {draw.choice(WHERE)}"
    for beings in BEINGS.values() for being in beings
}


def write(place):
    told = [f"the {being} {habits[being]} ." for being in draw.sample(BEINGS[place], 3)]
    return f"in the {place} . {' '.join(told)}"


texts = {place: [write(place) for _ in range(200)] for place in BEINGS}
vocabulary = {word for of in texts.values() for text in of for word in text.split()}
words = {word: number for number, word in enumerate(sorted(vocabulary))}


def tokenizer(text):
    return [words[word] for word in text.split()]


def samples(some):
    return datapruning.tokenized([{"text": text} for text in some], tokenizer)


own = {place: samples(of[:160]) for place, of in texts.items()}
test = {place: samples(of[160:]).input_ids for place, of in texts.items()}
everything = samples([text for of in texts.values() for text in of[:160]])
print(texts["zoo"][0])

# %%
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(words), hidden_size=64, intermediate_size=160, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=64,
)
training = datapruning.TrainingConfig(epochs=10, batch_size=32, lr=0.004, optimizer="adamw")
model = datapruning.train(everything, model=LlamaForCausalLM(config), training=training)

HABITS = [6, 9, 13, 16, 20, 23]  # where a text says what a being does, and where


@torch.no_grad()
def known(model, place):
    """Share of habits in the test texts that the model says by itself."""
    said = model(input_ids=test[place]).logits.argmax(-1)
    return (said[:, [n - 1 for n in HABITS]] == test[place][:, HABITS]).float().mean().item()


@torch.no_grad()
def perplexity(model, place):
    return math.exp(model(input_ids=test[place], labels=test[place]).loss)


for place in BEINGS:
    print(f"{place:<8} perplexity {perplexity(model, place):.2f}, "
          f"knows {known(model, place):.0%} of the habits")

# %% [markdown]
# Perplexity is how many words the model hesitates between on average; which being comes next,
# nobody can know.
#
# In large language models features differ much in size: a few are tens of times larger than the
# rest. A model as small as ours has no such features. So we write it in other numbers: the output
# of each norm is multiplied by powers of two, and the weights that read it are divided by the same.
# It still computes the same bits. This step makes the difference below: without it, magnitude does
# better than Wanda on so small a model.

# %%
before = model(input_ids=test["zoo"]).logits
sizes = torch.Generator().manual_seed(0)
with torch.no_grad():
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            scale = 2.0 ** torch.randint(-3, 4, (64,), generator=sizes)
            norm.weight *= scale
            for reader in readers:
                reader.weight /= scale
print("the same bits:", torch.equal(before, model(input_ids=test["zoo"]).logits))

# %% [markdown]
# ## 2. Which weights matter?
#
# The size of a weight alone says little: a small weight on a large feature matters. *Wanda* (Sun et
# al., ICLR 2024) multiplies both, |w| · ‖x‖, with x the layer's input on some calibration text. It
# needs no gradient and no training. Magnitude and chance stand beside it, as always.
#
# One layer, and what either would keep of it:

# %%
# The linear layers of all blocks.
LAYERS = [name for name, _ in model.named_parameters() if "proj" in name]


def mask_of(criterion, density, samples):
    return sparsemodel.prune(
        model, density, criterion=criterion, names=LAYERS, data={"input_ids": samples.input_ids}
    )


NAME = "model.layers.0.mlp.gate_proj.weight"
figure, axes = plt.subplots(1, 3, figsize=(10, 3.4))
axes[0].imshow(model.get_parameter(NAME).detach().abs().T.log(), cmap="cividis", aspect="auto")
axes[0].set_title("log |w|")
for ax, criterion in zip(axes[1:], ("magnitude", "wanda"), strict=True):
    kept = mask_of(criterion, 0.3, everything)[NAME]
    ax.imshow(kept.T, cmap="Greys", aspect="auto", interpolation="nearest")
    ax.set_title(f"30 % kept by {criterion}")
for ax in axes:
    ax.set(xlabel="output")
axes[0].set_ylabel("input feature")
plt.show()

# %% [markdown]
# Magnitude keeps whole features and drops others, by nothing but the numbers that they happen to be
# written in. How much does each still know?


# %%
def under(mask):
    pruned = copy.deepcopy(model)
    mask.apply(pruned)
    return pruned


def mean_known(model):
    return 100 * sum(known(model, place) for place in BEINGS) / len(BEINGS)


DENSITIES = [0.7, 0.5, 0.4, 0.3, 0.2, 0.1]
figure, ax = plt.subplots(figsize=(8, 3.2))
for criterion, color in (("wanda", BLUE), ("magnitude", ORANGE), ("random", GREY)):
    shares = [mean_known(under(mask_of(criterion, d, everything))) for d in DENSITIES]
    ax.plot(DENSITIES, shares, "o-", color=color, label=criterion)
ax.set(title="What is left of the habits", xlabel="density", ylabel="known, %", ylim=(0, 105))
ax.invert_xaxis()
ax.grid(alpha=0.3)
ax.legend()
plt.show()

# %% [markdown]
# ## 3. Mend it
#
# At a fifth of the weights much is lost. A pruned model can be mended without training it as a
# whole: *PERP* (Zimmer et al., 2023) trains few parameters under the mask, here so that each block
# gives what the dense one gave. The stages of such a treatment follow each other in a `Pipeline`.

# %%
DENSITY = 0.2
batches = [{"input_ids": part} for part in everything.input_ids.split(32)]
shares = {"dense": mean_known(model)}
for criterion in ("magnitude", "wanda"):
    pruned = copy.deepcopy(model)
    pipeline = Pipeline(pruned, [Weights(DENSITY, criterion, within="layer"), Perp()], batches)
    pipeline.advance()
    shares[criterion] = mean_known(pruned)
    pipeline.advance()
    shares[f"{criterion}, then PERP"] = mean_known(pruned)

figure, ax = plt.subplots(figsize=(8, 2.2))
colors = [GREY] + [ORANGE, BLUE] * 2
bars = ax.barh(list(shares), list(shares.values()), color=colors)
ax.bar_label(bars, fmt=" %.0f")
ax.set(title=f"At density {DENSITY:g}, pruned and mended", xlabel="known, %", xlim=(0, 110))
ax.invert_yaxis()
plt.show()

# %% [markdown]
# PERP mends a good mask. It does not mend a bad one, and here even loses more.
#
# So far all texts were in one place. Now they are not.
#
# ## 4. What one client's texts say
#
# Three clients: the zoo, the kitchen and the harbour. Each could prune the model by its own texts.
# How many of the weights that it would keep are those that all texts together would keep? And with
# sums of the three? Wanda looks at a single number of each feature, the sum of x² over all tokens.
# Sums add up: so clients send sums, and no text.

# %%
from_all = mask_of("wanda", DENSITY, everything)


def agreement(mask):
    """Share of the weights kept by all texts that a mask keeps as well, %."""
    return 100 * sum(int((mask[n] & from_all[n]).sum()) for n in LAYERS) / from_all.num_active


def rows(which):
    """A table of texts, and whose each is."""
    pairs = [(place, text) for place, of in texts.items() for text in of[which]]
    return pandas.DataFrame(pairs, columns=["client", "text"])


data = as_sample_set(
    {"train": rows(slice(160)), "test": rows(slice(160, None))},
    tokenizer=tokenizer,
)


def network():
    """The trained model; what is frozen, the output layer, is neither pruned nor sent."""
    start = copy.deepcopy(model)
    start.lm_head.requires_grad_(False)
    return start


folder = tempfile.TemporaryDirectory(prefix="fedprune-")


def run(method, lr=0.002):
    settings = {
        "data.partition": "natural", "training.lr": lr, "training.batch_size": 16,
        "training.local_epochs": 1, "server.pretrain_epochs": 0, "server.per_class": 1,
    }
    return fedprune.run(
        model=network, data=data, method=method, clients=3, rounds=3, seed=0, optimizer="adamw",
        settings=settings, folder=f"{folder.name}/{method.name}",
    )


results = {"wanda": run(Wanda(density=DENSITY, within="layer"))}
together = sparsemodel.Mask.from_csr(results["wanda"].state.patterns)

found = {f"the {place} alone": agreement(mask_of("wanda", DENSITY, own[place])) for place in own}
found["three clients' sums"] = agreement(together)
figure, ax = plt.subplots(figsize=(8, 2.2))
bars = ax.barh(list(found), list(found.values()), color=[ORANGE] * 3 + [BLUE])
ax.bar_label(bars, fmt=" %.1f")
ax.set(title="The mask of all texts in one place: how much of it is found", xlabel="%",
       xlim=(80, 102))
ax.invert_yaxis()
plt.show()

sent = results["wanda"].metrics[0]["bytes_up"]
print(f"the three clients sent {sent / 1000:.0f} kB for it, "
      f"{sum(p.nbytes for p in model.parameters()) / 1000:.0f} kB is the model")

# %% [markdown]
# What is missing are texts that clients set aside: a tenth for decisions, and a few that the server
# holds. The sums themselves are added without loss, in any order, and with
# `privacy.secure_aggregation` under masks, so that the server sees no client's sums
# ([docs/security.md](../docs/security.md)).
#
# ## 5. Prune, then train on
#
# After the mask, the clients train what is left, by federated averaging. Beside Wanda's mask stand
# the largest weights, and `perp`, which freezes everything but norms and biases, and sends no more
# than these.

# %%
results["magnitude"] = run(fedprune.Magnitude(density=DENSITY))
results["perp"] = run(PERP(density=DENSITY, within="layer"), lr=0.02)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), width_ratios=[3, 2])
colors = {"wanda": BLUE, "magnitude": ORANGE, "perp": GREEN}
for name, result in results.items():
    pruned = under(sparsemodel.Mask.from_csr(result.state.patterns))
    start = sum(math.log(perplexity(pruned, place)) for place in BEINGS) / 3
    losses = [start] + [line["test_loss"] for line in result.metrics[1:]]
    left.plot([math.exp(loss) for loss in losses], "o-", color=colors[name], label=name)
dense = math.exp(sum(math.log(perplexity(model, place)) for place in BEINGS) / 3)
left.axhline(dense, color=GREY, linestyle="--", label="dense")
left.set(title="Perplexity on test texts", xlabel="round (0: pruned, not yet trained)",
         xticks=range(4))
left.grid(alpha=0.3)
left.legend()
sizes = [result.metrics[1]["bytes_up"] / 3000 for result in results.values()]
bars = right.bar(list(results), sizes, color=colors.values())
right.bar_label(bars, fmt="%.1f kB")
right.set(title="A client's message of a round", ylabel="kB", yscale="log")
plt.show()

for name, result in results.items():
    print(f"{name:<10} knows {mean_known(result.model):.0f} % of the habits")
folder.cleanup()

# %% [markdown]
# One small language and one seed: such figures rank nothing. On a real text with real roles, and
# over several seeds: [simulations/federated_language.md](../simulations/federated_language.md).
#
# ## 6. Where to go next
#
# A model of your own, one command, and a page with what each block lost:
#
# ```bash
# fedprune prune MODEL --data text.txt --criterion wanda --density 0.5 --recover perp --out pruned
# ```
#
# `MODEL` is a folder of transformers, a `.gguf` file or a name of the hub; plain transformers reads
# `pruned`.
#
# - [docs/language_models.md](../docs/language_models.md): units, recovery, clients, and what
#   perplexity hides.
# - [docs/pruning.md](../docs/pruning.md): all criteria, and one of your own in six lines.
# - [simulations/prune_language_model.md](../simulations/prune_language_model.md): all of them
#   beside each other on a small model of real stories.
# - [examples/federated_lora.py](../examples/federated_lora.py): clients adapt a model by LoRA.
