"""Score and prune data that stay in their files: shards of digits, as parquet.

    python examples/streamed_shards.py

No more than a few batches are in memory, however many shards there are. WebDataset's tar files
(0001.png, 0001.cls, ...) are read in the same way.
"""

import io
from pathlib import Path

import pyarrow
import pyarrow.parquet
from PIL import Image
from sklearn.datasets import load_digits

import datapruning


def png(digit):
    file = io.BytesIO()
    Image.fromarray((digit * 15).astype("uint8")).save(file, "PNG")
    return file.getvalue()


images, labels = load_digits(return_X_y=True)
for number, start in enumerate(range(0, len(images), 600)):
    cells = [png(digit.reshape(8, 8)) for digit in images[start : start + 600]]
    shard = pyarrow.table({"img": cells, "label": labels[start : start + 600]})
    Path("shards").mkdir(exist_ok=True)
    pyarrow.parquet.write_table(shard, f"shards/train-{number:05d}.parquet", row_group_size=100)

samples = datapruning.stream("shards")
short = datapruning.TrainingConfig(epochs=5, lr=0.05)
table = datapruning.score(samples, method="el2n", training=short)
kept = table.select(keep=0.3, class_balanced=True)
model = datapruning.train(kept.of(samples), training=short)
print(f"kept {len(kept)} of {len(table)} streamed samples, the first: {kept.ids[:8].tolist()}")
print(f"accuracy on all: {datapruning.evaluate(model, samples).accuracy:.2f}")
