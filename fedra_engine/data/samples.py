"""Samples prepared for a model, and batches of them on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.config import DataConfig
from fedra_engine.data.cache import Part, as_tensor, copy_async, row_checksums
from fedra_engine.data.domain_data import DomainData, check_domains
from fedra_engine.data.images import image_rows
from fedra_engine.data.preprocessing import (
    Augmentation,
    Preprocessing,
    make_augmentation,
    precise_dtype,
    preprocessing_for,
    standardize,
)
from fedra_engine.data.tokenization import Tokenization, token_rows, tokenization_for
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.files import content_hash
from fedra_engine.runtime.randomness import SampleDraws

NOT_LEARNT = -100
"""Label of a token without a loss, torch's `ignore_index`."""
RESIDENT_SHARE = 0.25
"""Rows that fit into this fraction of an accelerator's free memory are kept there."""


class LearntTokens(NamedTuple):
    """The tokens of a batch of texts that have a loss, in order, on the host.

    Attributes:
        samples: int64 [learnt], index of the sample in the batch.
        positions: int64 [learnt], position of the token; at least 1, since nothing predicts the first token.
    """

    samples: NDArray[np.int64]
    positions: NDArray[np.int64]


class Batch(NamedTuple):
    """Samples on a device.

    Attributes:
        inputs: the model's keyword arguments.
        labels: int64 [samples]; for causal language models int64 [samples, tokens], where `labels[:, t]` is token t
            itself, or -100 if it has no loss (Hugging Face's convention: the loss shifts by one).
        learnt: for causal language models, the tokens that have a loss.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    learnt: LearntTokens | None = None


class Samples(Protocol):
    """Preprocessed samples, from which batches are gathered by row."""

    @property
    def labels(self) -> Tensor:
        """int64 [samples] or, for causal language models, [samples, tokens], on the CPU."""

    @property
    def domains(self) -> Tensor:
        """int64 [samples], index of each sample's domain, on the CPU."""

    @property
    def lengths(self) -> Tensor | None:
        """int64 [samples], tokens of each sample, on the CPU; None if all have the same length."""

    def digest(self) -> str:
        """Hex digest of the model inputs, sample by sample, without labels and domains.

        It does not depend on where the inputs come from or how they are stored; rows of the cache are not read.
        """

    def inputs(self, rows: Tensor, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's keyword arguments for the samples `rows` (int64, on the CPU), first dimension [rows]."""

    def batch(self, rows: Tensor, device: torch.device, dtype: torch.dtype, draws: SampleDraws | None = None) -> Batch:
        """Inputs and labels of the samples `rows`; copies to a GPU are asynchronous.

        Training passes `draws`, which augmentation uses.
        """


@dataclass(frozen=True)
class PreparedData:
    """Training and test samples of a model.

    Attributes:
        data: their source, without unreadable samples.
        newly_cached: number of samples that were not in the cache yet; None if they cannot be cached.
        processing: how images or texts become the model's inputs.
    """

    data: DomainData
    train: Samples
    test: Samples
    newly_cached: int | None
    processing: Preprocessing | Tokenization


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
    """Decode or tokenize all samples for a model, or read them from the cache.

    Args:
        data: yielded by a source.
        config: image size, text length, and whether to skip unreadable samples.
        model_path: directory or hub name; None for a model in memory.
        model_config: the model's transformers configuration; its `pad_token_id` is set for texts.
        processor: the model's image processor or tokenizer; default: the one at `model_path`.
        preprocessing: of images; default: the model's.
        cut_texts: see `TokenSamples.cut`.

    Raises:
        InputError: the model does not describe its inputs, a sample cannot be read, or a domain has no samples left.
    """
    skip, is_images = config.unreadable == "skip", data.task == "image_classification"
    processing: Preprocessing | Tokenization
    for name in ("max_length",) if is_images else ("image_size", "augmentation"):
        if (value := getattr(config, name)) != (usual := getattr(DataConfig, name)):
            kind = "images" if is_images else "texts"
            raise InputError(f"data.{name}: found {value} with {kind}, expected {usual or 'null'}")
    labels = None if data.labels is None or data.task == "causal_lm" else torch.from_numpy(data.labels)
    domain_of = torch.from_numpy(data.domain_of)
    if is_images:
        if preprocessing is None:
            preprocessing = preprocessing_for(model_path, model_config, config.image_size, processor)
        made, processing = image_rows(data, preprocessing, skip=skip), preprocessing
        pixels = StoredRows.of_parts(made.parts, "pixels")
    else:
        tokenization = tokenization_for(model_path, model_config, config.max_length, processor)
        made, processing = token_rows(data, tokenization, skip=skip), tokenization
        tokens = StoredRows.of_parts(made.parts, "ids")
        counts, prompts = made.numbers("length"), made.numbers("prompt")
        # Models that classify a text by its last token find it by the padding that follows.
        model_config.pad_token_id = tokenization.padding

    def samples(rows: Tensor, augmentation: Augmentation | None) -> Samples:
        of_class = None if labels is None else labels[rows]
        if isinstance(processing, Preprocessing):
            assert of_class is not None
            return ImageSamples(pixels, of_class, domain_of[rows], processing, rows, augmentation)
        return TokenSamples(tokens, rows, counts[rows], prompts[rows], domain_of[rows], of_class, cut=cut_texts)

    has_test = bool(data.is_test.any())
    readable = np.delete(np.arange(len(data)), list(made.skipped))
    train, test = (torch.from_numpy(readable[data.is_test[readable] == held_out]) for held_out in (False, True))
    if made.skipped:
        data = replace(data.select(readable), notes=[*data.notes, *made.skipped.values()])
        check_domains(data, with_test=has_test)
    prepared = samples(train, make_augmentation(config)), samples(test, None)
    return PreparedData(data, *prepared, made.newly_cached, processing)


class StoredRows:
    """A tensor [rows, …] stored in parts [rows of the part, …].

    If it fits, the whole tensor is copied to an accelerator at the first `gather` there. Otherwise rows are gathered
    into page-locked memory, so that the copy is asynchronous. Rows of files are compared with their checksums at every
    read, and a damaged part is made again.
    """

    def __init__(self, parts: Sequence[Tensor], files: Sequence[Part] = (), column: str = "") -> None:
        """Several `parts` must be on the CPU. Parts from the cache are the `column` of `files`."""
        self._parts = list(parts)
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self._resident: dict[torch.device, Tensor | None] = {}
        if self._parts[0].device.type != "cpu":
            (whole,) = self._parts
            self._resident[whole.device] = whole
        self._files = list(files)
        self._column = column
        self._checksums = np.concatenate([part.checksums[column] for part in files]) if files else None

    @classmethod
    def of_parts(cls, parts: Sequence[Part], column: str) -> StoredRows:
        """One column of all parts."""
        in_files = all(part.checksums for part in parts)
        return cls([as_tensor(part.columns[column]) for part in parts], parts if in_files else (), column)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def digest(self, rows: Tensor | None = None) -> str:
        """Hex digest of shape, dtype and `rows` (int64 [n], on the CPU; default: all), without reading files."""
        if self._checksums is None:
            self._checksums = np.concatenate([row_checksums(part.cpu().contiguous().numpy()) for part in self._parts])
        checksums = self._checksums if rows is None else self._checksums[rows.numpy()]
        about = f"{self._parts[0].dtype} {tuple(self._parts[0].shape[1:])} {len(checksums)} "
        return content_hash(about.encode() + checksums.tobytes()).hexdigest()

    def gather(self, rows: Tensor, device: torch.device) -> Tensor:
        """The rows `rows` (int64 [n], on the CPU), in that order, on `device`: [n, …]."""
        whole = None if device.type == "cpu" else self._on_device(device)
        if whole is not None:
            return whole.index_select(0, copy_async(rows, whole.device))
        pinned = device.type == "cuda"
        gathered = self._read(rows, pinned)
        if self._files and self._checksums is not None:
            damaged = rows.numpy()[row_checksums(gathered.numpy()) != self._checksums[rows.numpy()]]
            for part in np.unique(self._part_of(damaged)):
                self._make_again(int(part))
            if len(damaged):
                gathered = self._read(rows, pinned)
        return gathered.to(device, non_blocking=True)

    def _part_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._starts, rows, side="right") - 1

    def _make_again(self, part: int) -> None:
        make_again = self._files[part].make_again
        assert make_again is not None
        self._files[part] = make_again()
        self._parts[part] = as_tensor(self._files[part].columns[self._column])

    def _read(self, rows: Tensor, pinned: bool) -> Tensor:
        first = self._parts[0]
        gathered = torch.empty((len(rows), *first.shape[1:]), dtype=first.dtype, pin_memory=pinned)
        if len(self._parts) == 1:
            return torch.index_select(first, 0, rows, out=gathered)
        # NumPy copies whole rows where torch's index_put_ copies values one by one.
        target, wanted = gathered.numpy(), rows.numpy()
        part_of = self._part_of(wanted)
        for part in np.unique(part_of):
            at = part_of == part
            target[at] = self._parts[part].numpy()[wanted[at] - self._starts[part]]
        return gathered

    def _on_device(self, device: torch.device) -> Tensor | None:
        """All rows on `device`; None if they do not fit."""
        if str(device) == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in self._resident:
            size = sum(part.nbytes for part in self._parts)
            fits = device.type == "cuda" and size <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
            self._resident[device] = self._copy(device) if fits else None
        return self._resident[device]

    def _copy(self, device: torch.device) -> Tensor:
        whole = torch.empty((len(self), *self._parts[0].shape[1:]), dtype=self._parts[0].dtype, device=device)
        for index, target in enumerate(whole.split(np.diff(self._starts).tolist())):
            if self._files:
                sums = self._files[index].checksums[self._column]
                if not np.array_equal(row_checksums(self._parts[index].numpy()), sums):
                    self._make_again(index)
            target.copy_(self._parts[index])
        return whole


@dataclass(eq=False)
class ImageSamples:
    """Preprocessed images.

    Attributes:
        pixels: uint8 rows [stored, channels, height, width].
        labels: int64 [samples].
        domains: int64 [samples].
        preprocessing: mean and standard deviation to normalise by.
        stored: int64 [samples], each sample's row in `pixels`; None if sample i is row i.
        augmentation: applied to batches with `draws`.
    """

    pixels: StoredRows
    labels: Tensor
    domains: Tensor
    preprocessing: Preprocessing
    stored: Tensor | None = None
    augmentation: Augmentation | None = None
    lengths = None

    def __post_init__(self) -> None:
        self._classes = StoredRows([self.labels])

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"ImageSamples({len(self):,})"

    def digest(self) -> str:
        """Hex digest of pixels and preprocessing."""
        content = f"{self.preprocessing} {self.pixels.digest(self.stored)}"
        return content_hash(content.encode()).hexdigest()

    def inputs(self, rows: Tensor, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """`pixel_values` [rows, channels, height, width], normalised on `device`."""
        return self.batch(rows, device, dtype).inputs

    def batch(self, rows: Tensor, device: torch.device, dtype: torch.dtype, draws: SampleDraws | None = None) -> Batch:
        """Normalised `pixel_values`, augmented if there are `draws`, and classes."""
        pixels = self.pixels.gather(rows if self.stored is None else self.stored[rows], device)
        if draws is not None and self.augmentation is not None:
            pixels = self.augmentation(pixels.to(precise_dtype(dtype)), draws)
        inputs = {"pixel_values": standardize(pixels, self.preprocessing, dtype)}
        return Batch(inputs, self._classes.gather(rows, device))


@dataclass(eq=False)
class TokenSamples:
    """Tokenized texts.

    Attributes:
        ids: int32 rows [stored, max_length], padded on the right.
        stored: int64 [samples], each sample's row in `ids`.
        counts: int64 [samples], tokens without padding.
        prompts: int64 [samples], tokens of the prompt.
        domains: int64 [samples].
        classes: int64 [samples]; None for causal language models.
        cut: whether batches are cut to their longest text; not with LoRA dropout, which counts rows: a client's masks
            would depend on the other texts in the batch.
    """

    ids: StoredRows
    stored: Tensor
    counts: Tensor
    prompts: Tensor
    domains: Tensor
    classes: Tensor | None
    cut: bool = True

    def __post_init__(self) -> None:
        self._classes = None if self.classes is None else StoredRows([self.classes])

    def __len__(self) -> int:
        return len(self.domains)

    def __repr__(self) -> str:
        return f"TokenSamples({len(self):,})"

    @property
    def labels(self) -> Tensor:
        """Classes, int64 [samples], or tokens with -100 where they have no loss, int64 [samples, max_length]."""
        if self.classes is not None:
            return self.classes
        rows = torch.arange(len(self))
        return self._learnt(rows, self.ids.gather(self.stored, torch.device("cpu")).long())

    @property
    def lengths(self) -> Tensor | None:
        """int64 [samples], tokens of each text; None if batches are not cut."""
        return self.counts if self.cut else None

    def digest(self) -> str:
        """Hex digest of tokens, `counts` and `prompts`."""
        numbers = (of.numpy().tobytes() for of in (self.counts, self.prompts))
        return content_hash(b"".join([self.ids.digest(self.stored).encode(), *numbers])).hexdigest()

    def inputs(self, rows: Tensor, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` [rows, tokens], both int64."""
        ids = self._ids(rows, device)
        return {"input_ids": ids, "attention_mask": self._mask(rows, ids)}

    def batch(self, rows: Tensor, device: torch.device, dtype: torch.dtype, draws: SampleDraws | None = None) -> Batch:
        """Inputs, without a mask if there is no padding, and classes or tokens to learn; `draws` are not used."""
        counts, ids = self.counts[rows], self._ids(rows, device)
        inputs = {"input_ids": ids}
        if counts.numpy().min() < ids.shape[1]:
            inputs["attention_mask"] = self._mask(rows, ids)
        if self._classes is not None:
            return Batch(inputs, self._classes.gather(rows, device))
        # The tokens that `_learnt` does not mask, except the first token of a text.
        first = self.prompts[rows].clamp(min=1).numpy()
        learnt = np.maximum(counts.numpy() - first, 0)
        samples = np.repeat(np.arange(len(rows)), learnt)
        within = np.arange(len(samples)) - (learnt.cumsum() - learnt)[samples]
        return Batch(inputs, self._learnt(rows, ids), LearntTokens(samples, first[samples] + within))

    def _ids(self, rows: Tensor, device: torch.device) -> Tensor:
        longest = int(self.counts[rows].numpy().max()) if self.cut else None
        return self.ids.gather(self.stored[rows], device)[:, :longest].long()

    def _mask(self, rows: Tensor, ids: Tensor) -> Tensor:
        counts = copy_async(self.counts[rows], ids.device)[:, None]
        return (torch.arange(ids.shape[1], device=ids.device) < counts).long()

    def _learnt(self, rows: Tensor, ids: Tensor) -> Tensor:
        """`ids` [rows, tokens] of the samples `rows`, with `NOT_LEARNT` for prompts and padding."""
        counts, prompts = (copy_async(of[rows], ids.device)[:, None] for of in (self.counts, self.prompts))
        position = torch.arange(ids.shape[1], device=ids.device)
        return ids.masked_fill((position < prompts) | (position >= counts), NOT_LEARNT)
