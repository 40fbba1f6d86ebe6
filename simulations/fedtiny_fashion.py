"""FedTiny on Fashion-MNIST: the grid of fedtiny_cifar10 on grey 28×28 images.

python -m simulations.fedtiny_fashion
"""

from __future__ import annotations

from simulations.federated_table import Experiment, main
from simulations.fedtiny_cifar10 import EXPERIMENT as CIFAR10

EXPERIMENT = Experiment(
    name="fedtiny_fashion",
    title="FedTiny on Fashion-MNIST",
    presets={
        preset: {**settings, "data.dataset": "fashion-mnist"}
        for preset, settings in CIFAR10.presets.items()
    },
)

if __name__ == "__main__":
    main(EXPERIMENT)
