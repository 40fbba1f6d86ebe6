"""A network of your own on a folder of pictures, a folder a class, trained and pruned by clients.

Run: python examples/own_cnn_federated.py
"""

from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import fedprune

folder = Path("pictures")  # yours is pictures/CLASS/NAME.png, or .jpg
digits = load_digits()
for row, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
    place = folder / f"digit {label}"
    place.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 15.9).astype("uint8")).save(place / f"{row}.png")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(32 * 16, 10)

    def forward(self, images):
        return self.head(self.features(images))


method = fedprune.FedTiny(density=0.1, pool_size=4)
result = fedprune.run(model=Net, data=folder, method=method, clients=4, rounds=2)
kept = result.summary["density"]
print(f"test accuracy {result.summary['test_accuracy']:.3f} at {kept:.0%} of the weights")
