"""Score by a function of your own, keep what it finds hard, and see what that is.

python examples/own_score.py
"""

import torch

import datapruning


def doubt(logits, labels):
    """One minus the gap between the two largest probabilities; high: keep."""
    top = logits.softmax(1).topk(2).values
    return 1 - (top[:, 0] - top[:, 1])


table = datapruning.score("digits", method=doubt, training=datapruning.TrainingConfig(epochs=3))
print(f"{len(table)} scores by {table.method}, from {table.scores.min():.3f} "
      f"to {table.scores.max():.3f}")  # fmt: skip

kept = table.select(keep=0.2, policy="hardest", class_balanced=True)
before, after = (torch.bincount(labels, minlength=10) for labels in (table.labels, kept.labels))
for digit in range(10):
    print(f"digit {digit}: {after[digit]} of {before[digit]} kept")
picture, label = kept.of("digits")[0]
print(f"the first kept sample is a {label}, {tuple(picture.shape)}")
