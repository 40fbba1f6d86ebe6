# %% [markdown]
# # From simulation to a fleet on your machine
#
# A federated run is first tried in one process, where it is quick to change. Later it has to work
# between machines that fail. In fedprune both are the same run: same settings, same messages, and
# the same bits of the model.
#
# At the end of this notebook you will have run a federation in this very process, then on a server
# and three nodes that are processes of their own, with TLS and a key for each node; you will have
# killed a node in the middle; and you will have compared the models, and what the processes take.
#
# Everything runs on two CPU cores in less than a minute. Nothing is downloaded, nothing stays
# behind. It needs `pip install 'fedprune[sim,notebooks]'`. The devices of a real fleet need less:
# `pip install 'fedprune[device]'`, without torch.

# %%
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt

import fedprune
from fedprune.fleet.local import fleet_up

# Colours that stay apart for colour-blind readers (Okabe and Ito).
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
plt.rcParams.update({
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
})

home = tempfile.TemporaryDirectory(prefix="fedprune-")
root = Path(home.name)
os.environ["FLWR_HOME"] = str(root / "flower")  # else connections go into ~/.flwr

# %% [markdown]
# ## 1. In one process
#
# Three clients with skewed shares of scikit-learn's digits choose a mask and train a twentieth of a
# small residual network. The *inline* engine plays server and clients here; every message is
# encoded, measured and decoded as on a network.

# %%
ROUNDS = 6
simulated = fedprune.run(
    model="resnet8", data="digits", method=fedprune.FedTiny(density=0.05, pool_size=2),
    clients=3, rounds=ROUNDS, seed=0,
    settings={"training.local_epochs": 2, "server.pretrain_epochs": 3},
    folder=root / "simulated",
)
print(sorted(path.name for path in simulated.folder.glob("[!.]*")))

# %% [markdown]
# The folder has everything that the run was. `config.toml` is the part to take along: all its
# settings, under the names that the command line knows.

# %%
some = {"[method]", "density", "pool_size", "[data]", "dataset", "clients", "[training]", "rounds"}
for line in (simulated.folder / "config.toml").read_text(encoding="utf-8").splitlines():
    if line.split(" =")[0] in some:
        print(line)

# %% [markdown]
# ## 2. Who is who
#
# - The **SuperLink** is Flower's server process. It holds messages until somebody fetches them.
# - The **nodes** are on the devices, beside the data. They connect to the SuperLink, prove their
#   keys, and ask for work. Nothing connects to them.
# - The **ServerApp** is the round loop. The SuperLink starts it when a run is submitted.
# - **You** submit runs from the server machine.

# %%
figure, ax = plt.subplots(figsize=(9, 3))
boxes = {
    "you:\nfedprune run": (0, 1, ORANGE), "SuperLink": (1, 1, BLUE),
    "ServerApp:\nrounds": (1, 0, BLUE),
    "node 0": (2.2, 1.7, GREEN), "node 1": (2.2, 1, GREEN), "node 2": (2.2, 0.3, GREEN),
}
for text, (x, y, color) in boxes.items():
    ax.text(x, y, text, ha="center", va="center", color="white", fontsize=11,
            bbox={"boxstyle": "round,pad=0.5", "facecolor": color, "edgecolor": "none"})
for begin, end, text, gap in (
    ("you:\nfedprune run", "SuperLink", "submits", 46),
    ("ServerApp:\nrounds", "SuperLink", "asks", 22),
    ("node 0", "SuperLink", "", 32), ("node 1", "SuperLink", "TLS, key", 32),
    ("node 2", "SuperLink", "", 32),
):
    shrink = {"shrinkA": gap, "shrinkB": min(gap, 36)}
    arrow = {"arrowstyle": "->", "color": GREY, "linewidth": 1.5, **shrink}
    (x0, y0, _), (x1, y1, _) = boxes[begin], boxes[end]
    ax.annotate("", (x1, y1), (x0, y0), arrowprops=arrow)
    aside = 0.12 if x0 == x1 else 0.03
    ax.text((x0 + x1) / 2 + aside, (y0 + y1) / 2 + 0.06, text, ha="center", fontsize=9)
ax.add_patch(plt.Rectangle((-0.35, -0.4), 1.72, 2.4, fill=False, edgecolor=GREY, linestyle=":"))
ax.text(-0.32, -0.33, "server machine", color=GREY)
ax.text(2.2, -0.33, "devices", color=GREY, ha="center")
ax.set(xlim=(-0.4, 2.7), ylim=(-0.45, 2.05))
ax.axis("off")
plt.show()

# %% [markdown]
# ## 3. The fleet
#
# `fleet_up` starts a SuperLink and nodes on this machine, with certificates and keys in a folder of
# their own, as `fedprune fleet up --nodes 3` does on the command line. Then the run is submitted,
# by the very command that you would type on a server.
#
# As soon as the first round is over, node 1 is killed with `kill -9`, and started again, as systemd
# would do it.

# %%
command = [
    sys.executable, "-m", "fedprune", "run", "--config", str(simulated.folder / "config.toml"),
    "--superlink", "classroom", "--out", str(root / "real"),
]


def memory(process):
    """MiB of a process, memory that it shares counted in part (Linux's proportional set size)."""
    rollup = Path(f"/proc/{process}/smaps_rollup")
    lines = rollup.read_text().splitlines() if rollup.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


with fleet_up(root / "fleet", nodes=3, name="classroom") as fleet:
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    metrics = root / "real" / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and '"round": 1' in metrics.read_text()):
        time.sleep(0.05)
    victim = fleet.nodes[1].kept
    victim.kill()
    print("node 1 runs:", victim.is_running())
    victim.start()
    print("node 1 runs:", victim.is_running())
    print("the run ended with status", run.wait())
    held = {f"node {number}": memory(node.kept.process.pid)
            for number, node in enumerate(fleet.nodes)}
held["this notebook"] = memory("self")

# %% [markdown]
# ## 4. The same model?
#
# `resume=True` on a finished run computes nothing and gives its result.

# %%
real = fedprune.run(folder=root / "real", resume=True)
files = [(result.folder / "model.safetensors").read_bytes() for result in (simulated, real)]
print(f"model.safetensors: {len(files[0]):,} bytes here, {len(files[1]):,} from the fleet; "
      f"the same bytes: {files[0] == files[1]}")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
for name, result, style, size, color in (
    ("one process", simulated, "-", 9, GREY), ("fleet", real, ":", 5, BLUE),
):
    lines = [line for line in result.metrics if "round" in line]
    rounds = [line["round"] for line in lines]
    left.plot(rounds, [100 * line["test_accuracy"] for line in lines], f"o{style}",
              markersize=size, color=color, label=name)
    right.plot(rounds, [line["bytes_up"] / 1000 for line in lines], f"o{style}",
               markersize=size, color=color, label=name)
left.set(title="Test accuracy, %", xlabel="round")
right.set(title="All clients' messages, kB", xlabel="round", ylim=(0, None))
for ax in (left, right):
    ax.grid(alpha=0.3)
    ax.legend()
plt.show()

# %% [markdown]
# The same bytes, though one node was killed: every random choice comes from the seed, sums are
# added in one order, and a node that comes back goes on with the message that it had.
#
# ## 5. What a node takes
#
# Nodes had no torch to load: the server sends the network as a *program*, a list of operations, and
# the runtime trains its active weights by native kernels. **The picture is of one machine.**

# %%
# Measured on one machine.
figure, ax = plt.subplots(figsize=(8, 2.2))
bars = ax.barh(list(held), list(held.values()), color=[GREEN] * 3 + [ORANGE])
ax.bar_label(bars, fmt=" %.0f MiB")
ax.set(title="Memory of the processes, at the end of the run", xlabel="MiB")
ax.margins(x=0.15)
ax.invert_yaxis()
plt.show()
home.cleanup()

# %% [markdown]
# ## 6. Where to go next
#
# On several machines nothing but names changes:
#
# ```bash
# fedprune server init server --host fleet.example.org     # on the server machine
# fedprune server start server
# fedprune device init --client 0 --data /srv/samples --budget 256MB     # on each device
# fedprune server register server node.pub --name kitchen  # on the server, once for each device
# fedprune device join fleet.example.org:8000 --root-certificates ca.crt # on the device
# fedprune run --superlink server --dataset digits --rounds 20 --out runs/one
# ```
#
# - [docs/deploy.md](../docs/deploy.md): these steps with all that can go wrong, and units for
#   systemd in [examples/deploy](../examples/deploy).
# - [docs/devices.md](../docs/devices.md): what a device can train in its memory, and training
#   alone: `fedprune device run-local`.
# - [docs/faults.md](../docs/faults.md): nodes that fail or lie, servers that are killed.
# - [docs/security.md](../docs/security.md): who sees what, secure sums, differential privacy.
# - [docs/scale.md](../docs/scale.md): thousands of clients in a simulation.
