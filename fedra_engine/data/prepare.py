"""From a source to samples that a model can take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import DomainData, check_domains
from fedra_engine.data.images import image_rows
from fedra_engine.data.preprocessing import Augmentation, Preprocessing, make_augmentation, preprocessing_for
from fedra_engine.data.samples import Samples, SampleStore, TokenSamples
from fedra_engine.data.tokenization import token_rows, tokenization_for
from fedra_engine.runtime.errors import InputError


@dataclass(frozen=True)
class PreparedData:
    """Training and test samples of a model.

    Attributes:
        data: what they are made of, without what could not be read.
        train: the samples to train on.
        test: those that are held out.
        newly_cached: how many samples were decoded or tokenized now; None where nothing is kept of that in a cache.
    """

    data: DomainData
    train: Samples
    test: Samples
    newly_cached: int | None


def prepare(
    data: DomainData,
    config: DataConfig,
    model_path: str | None,
    model_config: Any,
    processor: Any = None,
    preprocessing: Preprocessing | None = None,
    *,
    cut_texts: bool = True,
) -> PreparedData:
    """Decode or tokenize all samples once for a model, or find that done in the cache.

    All of them, so that another split or seed has nothing to do.

    Args:
        data: of a source.
        config: size of images, length of texts, and what to do about those that cannot be read.
        model_path: directory or hub name; None of a model that was handed over.
        model_config: the model's transformers configuration; learns what texts are padded with.
        processor: the model's image processor or tokenizer; the one at `model_path` if not given.
        preprocessing: what is known already of how images become inputs.
        cut_texts: whether batches of texts are cut to the longest of them; see `TokenSamples`.

    Raises:
        InputError: the model does not describe its inputs, a sample cannot be read, or a domain has none left.
    """
    skip = config.unreadable == "skip"
    _check_options(data, config)
    if data.task == "image_classification":
        assert data.labels is not None
        if preprocessing is None:
            preprocessing = preprocessing_for(model_path, model_config, config.image_size, processor)
        pixels, found = image_rows(data, preprocessing, skip=skip)
        of_class = torch.from_numpy(data.labels)

        def samples(rows: Tensor, augmentation: Augmentation | None) -> Samples:
            return SampleStore(pixels, of_class[rows], domain_of[rows], preprocessing, rows, augmentation)

    else:
        tokenization = tokenization_for(model_path, model_config, config.max_length, processor)
        tokens, found = token_rows(data, tokenization, skip=skip)
        # Models that classify a text by its last token look for the one before the padding.
        model_config.pad_token_id = tokenization.padding
        labels = None if data.task == "causal_lm" or data.labels is None else torch.from_numpy(data.labels)

        def samples(rows: Tensor, augmentation: Augmentation | None) -> Samples:
            classes = None if labels is None else labels[rows]
            return TokenSamples(tokens, domain_of[rows], rows, classes, cut=cut_texts)

    domain_of = torch.from_numpy(data.domain_of)
    readable = np.delete(np.arange(len(data)), list(found.skipped))
    train, test = (torch.from_numpy(readable[data.is_test[readable] == held_out]) for held_out in (False, True))
    rest = data
    if found.skipped:
        rest = replace(data.select(readable), notes=[*data.notes, *found.skipped.values()])
        check_domains(rest)
    return PreparedData(rest, samples(train, make_augmentation(config)), samples(test, None), found.newly_cached)


def _check_options(data: DomainData, config: DataConfig) -> None:
    """Raise InputError where an option is given that does nothing with samples of this kind."""
    images = data.task == "image_classification"
    for name in ("max_length",) if images else ("image_size", "augmentation"):
        value, usual = getattr(config, name), getattr(DataConfig(), name)
        if value != usual:
            raise InputError(
                f"data.{name}: found {value} with {'images' if images else 'texts'}, expected {usual or 'null'}"
            )
