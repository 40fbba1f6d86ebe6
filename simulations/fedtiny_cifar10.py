"""FedTiny on CIFAR-10: against its ablations, fixed magnitude masks and dense networks.

    python -m simulations.fedtiny_cifar10 --data FOLDER_OF_PARQUET

`small` fits two cores (a subset, resnet8); `full` is the paper's setting and wants a GPU.
"""

from __future__ import annotations

from simulations.federated_table import Experiment, main

EXPERIMENT = Experiment(
    name="fedtiny_cifar10",
    title="FedTiny on CIFAR-10",
    presets={
        "small": {
            "data.dataset": "cifar10",
            "data.num_train": 5000,
            "data.num_test": 2000,
            "data.clients": 10,
            "data.alpha": 0.5,
            "data.augment": True,
            "model.name": "resnet8",
            "training.rounds": 20,
            "training.local_epochs": 1,
            "training.batch_size": 32,
            "method.adjust_every": 2,
            "method.adjust_until": 14,
        },
        "full": {
            "data.dataset": "cifar10",
            "data.clients": 10,
            "data.alpha": 0.5,
            "data.augment": True,
            "model.name": "resnet18",
            "training.rounds": 300,
            "training.local_epochs": 5,
            "training.batch_size": 64,
            "training.device": "cuda",
            "method.adjust_every": 10,
            "method.adjust_until": 100,
        },
    },
)

if __name__ == "__main__":
    main(EXPERIMENT)
