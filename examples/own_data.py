"""Data of one's own, in memory: a `datasets.Dataset` of images, labels and domains."""

import sys

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow
from sklearn.datasets import load_digits

from fedra_engine import ExperimentConfig, simulate

digits = load_digits()
ink = (digits.images[:600] * 15).astype(np.uint8)
images = [*ink[:300], *(255 - ink[300:])]
data = Dataset.from_dict(
    {
        "image": [Pillow.fromarray(image) for image in images],
        "label": digits.target[:600],
        "domain": ["dark"] * 300 + ["bright"] * 300,
    },
    features=Features({"image": Image(), "label": ClassLabel(names=list("0123456789")), "domain": Value("string")}),
)

config = ExperimentConfig(rounds=12, output_dir=sys.argv[1] if len(sys.argv) > 1 else "runs")
config.data.domains = ["dark", "bright"]  # in the order of the capacities
config.data.clients_per_domain = 3
config.clients.capacities = [12, 6]
result = simulate(config, dataset=data)
print("accuracy by domain:", result.accuracy)
