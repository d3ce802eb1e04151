"""The group `data` of an experiment: where samples come from and how clients share them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedra_engine.config import options as allowed
from fedra_engine.config.options import SOMETHING, Choice, group, option
from fedra_engine.runtime.errors import InputError

SOURCE_NAMES = Choice(
    "data.source", "digits", "image_folder", "domainnet", "nicopp", "hf_dataset", "text_classification", "causal_lm"
)
PARTITION_NAMES = Choice("data.partition", "domain", "iid", "dirichlet", "shards", "quantity", "natural", "bootstrap")

HeldOut = Literal["test", "validation"]
"""The sets of samples that evaluations can be on."""

_TABLES = ("hf_dataset", "text_classification", "causal_lm")
_FILES = ("image_folder", "domainnet", "nicopp", *_TABLES)
_IMAGES = ("digits", "image_folder", "domainnet", "nicopp", "hf_dataset")
_DRAWN_TEST = ("image_folder", *_TABLES)
_DIVIDED = ("iid", "dirichlet", "shards", "quantity", "bootstrap")
"""Sources and partitions that share options."""
DIGITS_DOMAINS = 6
"""Domains of the embedded digits."""


@dataclass
class ColumnsConfig:
    """What the columns of a table or data set are called (docs/data.md).

    Args:
        input: the image or text of a sample; `image` or `text` when null.
        response: the text that a causal language model learns to write after `data.prompt`; `response` when null.
        messages: conversations, whose last answer a causal language model learns to write; lists of mappings with
            `role` and `content`, which the tokenizer's chat template turns into text. None when null.
        label: the class; `label` when null, if there is such a column.
        domain: the domain; `domain` when null, if there is such a column.
        client: who owns a sample under the `natural` partition; `client` when null, if there is such a column.
    """

    input: str | None = option(
        None,
        allowed.TEXT,
        needs=[
            {"data.source": _TABLES},
            {"data.source": ("hf_dataset", "text_classification"), "data.prompt": (None,)},
            {"messages": (None,)},
        ],
    )
    response: str | None = option(
        None, allowed.TEXT, needs=[{"data.source": ("causal_lm",)}, {"data.prompt": (SOMETHING,)}]
    )
    messages: str | None = option(None, allowed.TEXT, needs=[{"data.source": ("causal_lm",)}, {"data.prompt": (None,)}])
    label: str | None = option(None, allowed.TEXT, needs=[{"data.source": _TABLES}])
    domain: str | None = option(None, allowed.TEXT, needs=[{"data.source": _TABLES}])
    client: str | None = option(None, allowed.TEXT, needs=[{"data.source": _TABLES}, {"data.partition": ("natural",)}])


@dataclass
class DataConfig:
    """Where the samples come from and how they are divided among the clients (docs/data.md).

    Args:
        source: `digits` (embedded, six domains), `image_folder` (`<root>/<domain>/<class>/*`), `domainnet` and
            `nicopp` (lists of paths and labels), `text_classification` and `causal_lm` (files or a data set),
            or `hf_dataset` (labelled images or texts).
        root: folder or file of the source; for the last three sources also the name of a data set on the hub.
        subset: configuration of a data set on the hub; its only one when null.
        encoding: encoding of csv, tsv, jsonl and txt files, by Python's name (such as `cp1252`); a byte order mark in a
            file goes before it.
        domains: domains to use, in the order that client capacities follow; all, sorted, when empty.
        classes: use only the first N classes, where there are more; all when null.
        prompt: the text before the response of `causal_lm`, with columns in braces (`{instruction}`); plain text
            when null.
        image_size: side in pixels to which images are resized (bicubic); the model's own size when null.
        max_length: longest text in tokens (longer ones are cut); when null, the model's limit, at most 512.
        unreadable: treat an image that cannot be decoded, or a text without words, as an `error`, or `skip` it.
        augmentation: random changes to the training images, drawn anew in every step: `none`, `flip` (left to right
            with probability 1/2), or `crop_flip` (also a crop of random place, area and shape, resized back).
        crop_scale: smallest fraction of an image's area that `crop_flip` keeps.
        test_fraction: fraction of each domain's and class's samples held out if the source has no test set.
        split_seed: seed of the draws of test and validation samples; the experiment's when null.
        validation_fraction: fraction of each domain's and class's training samples that is taken out of training and
            evaluated in the place of the test set, which is then not used; 0 for none.
        partition: `domain` (each domain is one client), `iid`, `dirichlet` (label skew), `shards` (few classes per
            client), `quantity` (log-normal skew of the sample counts), `natural` (a column names the client) or
            `bootstrap` (each client draws samples of one domain with replacement; nothing is stored).
        clients_per_domain: number of clients that share each domain's training samples.
        clients: number of clients that share all training samples, whatever their domain; null keeps every client
            to one domain. Under `bootstrap`, the number of clients, to which domains are assigned in turn.
        dirichlet_alpha: concentration of the per-class Dirichlet draws of `dirichlet`; smaller is more skewed.
        balanced: `dirichlet` gives no more to clients that already have the average number of samples.
        shards_per_client: shards (mostly of one label) that `shards` gives each client.
        quantity_sigma: standard deviation of the logarithm of the sample counts under `quantity`.
        samples_per_client: samples that a client draws under `bootstrap`.
        min_samples: fewest training samples a client may have; the split is redrawn until all have them.
    """

    source: str = option("digits", SOURCE_NAMES)
    root: str | None = option(None, allowed.PATH, needs=[{"source": _FILES}])
    subset: str | None = option(None, allowed.TEXT, needs=[{"source": _TABLES}])
    encoding: str = option("utf-8", allowed.TEXT, needs=[{"source": ("text_classification", "causal_lm")}])
    columns: ColumnsConfig = group(ColumnsConfig)
    domains: list[str] = option([], allowed.TEXT)
    classes: int | None = option(None, allowed.COUNT)
    prompt: str | None = option(None, allowed.LINES, needs=[{"source": ("causal_lm",)}])
    image_size: int | None = option(None, allowed.PIXELS, needs=[{"source": _IMAGES}])
    max_length: int | None = option(None, allowed.whole(1, 10**6), needs=[{"source": _TABLES}])
    unreadable: Literal["error", "skip"] = option("error", needs=[{"source": _FILES}])
    augmentation: Literal["none", "flip", "crop_flip"] = option("none", needs=[{"source": _IMAGES}])
    crop_scale: float = option(0.08, allowed.ABOVE_ZERO_TO_ONE, needs=[{"augmentation": ("crop_flip",)}])
    test_fraction: float = option(0.2, allowed.FRACTION, needs=[{"source": _DRAWN_TEST}])
    split_seed: int | None = option(None, allowed.NATURAL)
    validation_fraction: float = option(0.0, allowed.BELOW_ONE)
    partition: str = option("dirichlet", PARTITION_NAMES)
    clients_per_domain: int = option(5, allowed.CLIENTS, needs=[{"partition": _DIVIDED}, {"clients": (None,)}])
    clients: int | None = option(None, allowed.CLIENTS, needs=[{"partition": _DIVIDED}])
    dirichlet_alpha: float = option(0.5, allowed.number(1e-4, 1e6), needs=[{"partition": ("dirichlet",)}])
    balanced: bool = option(True, needs=[{"partition": ("dirichlet",)}])
    shards_per_client: int = option(2, allowed.SAMPLES, needs=[{"partition": ("shards",)}])
    quantity_sigma: float = option(1.0, allowed.SPREAD, needs=[{"partition": ("quantity",)}])
    samples_per_client: int = option(100, allowed.SAMPLES, needs=[{"partition": ("bootstrap",)}])
    min_samples: int = option(
        10, allowed.SAMPLES, needs=[{"partition": ("domain", "iid", "dirichlet", "shards", "quantity", "natural")}]
    )

    @property
    def held_out(self) -> HeldOut:
        """Which samples are evaluated: those of the `test` set, or of the `validation` set that takes its place."""
        return "validation" if self.validation_fraction else "test"

    def check(self) -> None:
        """Raise InputError if a source of files has no `root`, or a domain is named twice."""
        if self.source in _FILES and self.root is None:
            raise InputError(f"data.root: found none with data.source {self.source}, expected where its samples are")
        repeated = [domain for domain in self.domains if self.domains.count(domain) > 1]
        if repeated:
            raise InputError(f"data.domains: found {repeated[0]!r} more than once, expected every domain once")
