"""Save what turns images or texts into the inputs of the tuned model, as transformers loads it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from fedra_engine.data.domain_data import DataTask
from fedra_engine.data.preprocessing import Preprocessing
from fedra_engine.data.tokenization import Tokenization


def save_processor(folder: Path, processing: Preprocessing | Tokenization, task: DataTask) -> None:
    """Write the image processor or tokenizer for `task` into `folder`, with the run's image size or length of texts.

    The tokenizer of a causal language model keeps its own length: `data.max_length` is no limit of what it may write.
    """
    if isinstance(processing, Tokenization):
        # Chat templates would go into a folder.
        _tokenizer(processing, task).save_pretrained(folder, save_jinja_files=False)
    else:
        _image_processor(processing).save_pretrained(folder)


def _image_processor(preprocessing: Preprocessing) -> Any:
    """A processor that makes the run's pixels; models have their own, for other sizes and crops."""
    from transformers import ViTImageProcessorPil
    from transformers.image_utils import PILImageResampling

    side = preprocessing.image_size
    return ViTImageProcessorPil(
        size={"height": side, "width": side},
        resample=PILImageResampling.BICUBIC,
        do_convert_rgb=preprocessing.channels == 3,
        image_mean=list(preprocessing.mean),
        image_std=list(preprocessing.std),
    )


def _tokenizer(tokenization: Tokenization, task: DataTask) -> Any:
    """A copy of the run's tokenizer, with a padding token and, of texts to classify, the run's own and its length."""
    tokenizer, classifies = copy.deepcopy(tokenization.tokenizer), task == "text_classification"
    if classifies:
        tokenizer.model_max_length = tokenization.max_length
    # Classifiers may find a text's last token by the run's padding token; to a language model any will do.
    if classifies or tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(tokenization.padding)
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        # What the last call set would be saved.
        backend.no_truncation()
        backend.no_padding()
    return tokenizer
