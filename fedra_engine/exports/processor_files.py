"""Save what turns images or texts into the inputs of the tuned model, as transformers loads it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from fedra_engine.data.preprocessing import Preprocessing
from fedra_engine.data.tokenization import Tokenization


def save_processor(folder: Path, processing: Preprocessing | Tokenization) -> None:
    """Write the image processor or tokenizer into `folder`, with the run's image size or length of texts."""
    if isinstance(processing, Tokenization):
        # Chat templates would go into a folder.
        _tokenizer(processing).save_pretrained(folder, save_jinja_files=False)
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


def _tokenizer(tokenization: Tokenization) -> Any:
    """A copy of the run's tokenizer, with its padding token and, of texts to classify, its length."""
    tokenizer = copy.deepcopy(tokenization.tokenizer)
    tokenizer.model_max_length = tokenization.max_length
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(tokenization.padding)
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        # What the last call set would be saved.
        backend.no_truncation()
        backend.no_padding()
    return tokenizer
