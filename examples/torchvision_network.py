"""Clients prune a network of torchvision together, on pictures drawn here.

Run it: python examples/torchvision_network.py

"timm/NAME" and "hf/FOLDER" name networks of timm and transformers in the same way; weights are
drawn by the seed. For pre-trained ones give a function that loads them.
"""

import torch

import fedprune


def pictures(count, seed):
    """Noise of 32×32 pixels with a bright square: its corner is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = torch.rand(count, 3, 32, 32, generator=generator) * 0.5
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = 16 * (label // 2), 16 * (label % 2)
        image[:, row + 4 : row + 12, column + 4 : column + 12] += 0.5
    return (255 * images).to(torch.uint8), labels


result = fedprune.run(
    model="torchvision/shufflenet_v2_x0_5",
    data={"train": pictures(240, seed=0), "test": pictures(80, seed=1)},
    method=fedprune.Magnitude(density=0.1),
    rounds=2,
    clients=3,
    settings={"server.pretrain_epochs": 2, "training.batch_size": 16},
)
summary = result.summary
print(f"{summary['model']}: accuracy {summary['accuracy']:.2f} at density {summary['density']:.2f}")
print(f"a client sent {summary['bytes_up'] / 1e6:.2f} MB; results in {result.folder}")
