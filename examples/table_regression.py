"""A table with a number to predict, trained across clients: python examples/table_regression.py

Nothing is scaled for you: a mean over everybody's rows would be data that leave a client.
"""

import numpy as np
import pandas as pd
from torch import nn

import fedprune

random = np.random.default_rng(0)
homes = pd.DataFrame({"size": random.uniform(20, 200, 2000), "rooms": random.integers(1, 8, 2000)})
homes["price"] = 3 * homes["size"] / 100 + 0.2 * homes["rooms"] + random.normal(0, 0.1, 2000)
homes["size"] /= 100  # in units that everybody shares
homes.to_csv("homes.csv", index=False)


def network():
    return nn.Sequential(
        nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )


result = fedprune.run(
    model=network,
    data="homes.csv",
    method=fedprune.Magnitude(density=0.3),
    partition="iid",
    clients=4,
    rounds=5,
    settings={"data.columns": "label=price", "training.lr": 0.02},
)
last = result.metrics[-1]
print(f"half the squared error {last['test_loss']:.4f} (that of the noise alone: 0.005)")
