"""Clients prune a network of timm together, on pictures drawn here.

python examples/timm_network.py   (needs timm: pip install '.[embeddings]')

"torchvision/NAME" and "hf/FOLDER" name those of torchvision and transformers in the same way. The
seed draws their weights; for pre-trained ones give a function that loads them.
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
    model="timm/test_convnext",
    data={"train": pictures(160, seed=0), "test": pictures(40, seed=1)},
    method=fedprune.Magnitude(density=0.1),
    rounds=2,
    clients=3,
    optimizer="adamw",
    settings={"training.lr": 0.003, "training.batch_size": 16},
)
summary = result.summary
print(f"test accuracy {summary['test_accuracy']:.2f} at density {summary['density']:.2f}")
print(f"a client sent {summary['bytes_up_steady_round']:,} bytes a round")
