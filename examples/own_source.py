"""A source of one's own: images, labels and domains in a file of NumPy."""

import sys
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_digits

from fedra_engine import ExperimentConfig, register_source, simulate
from fedra_engine.data.sources import dataset_source


@register_source("npz")
def npz(config, seed):
    """The samples in the file `config.root`; as it has no test set, one is drawn from the seed."""
    arrays = np.load(config.root)
    images = [Image.fromarray(image) for image in arrays["images"]]
    columns = {"image": images, "label": arrays["labels"].tolist(), "domain": arrays["domains"].tolist()}
    return dataset_source(Dataset.from_dict(columns), config, seed)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    folder.mkdir(parents=True, exist_ok=True)
    digits, domains = load_digits(), np.repeat(["first", "second"], 300)
    ink = (digits.images[:600] * 15).astype(np.uint8)
    np.savez(folder / "digits.npz", images=ink, labels=digits.target[:600], domains=domains)

    config = ExperimentConfig(rounds=4, output_dir=str(folder))
    config.data.source, config.data.root = "npz", str(folder / "digits.npz")
    config.clients.capacities = [12, 6]
    result = simulate(config)
    print("accuracy by domain:", result.accuracy)
