"""Every test runs offline, on one thread and with the same random examples each time."""

import os

# Read when the libraries are imported, so they come before any of the imports below.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import hypothesis
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile("fedra", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fedra")
