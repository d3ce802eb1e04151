"""A first run: thirty clients tune the embedded model on the embedded digits."""

import sys

from fedra_engine import ExperimentConfig, simulate

folder = sys.argv[1] if len(sys.argv) > 1 else "runs"
result = simulate(ExperimentConfig(rounds=10, evaluate_every=5, output_dir=folder))
print("accuracy by domain:", result.accuracy)
print(result.history[["loss", "participants", "seconds"]])
result.save_adapter(result.folder / "my_adapter")
