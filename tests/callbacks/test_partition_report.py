"""What a person sees of the division of the samples among the clients."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image

from fedra_engine.callbacks.partition_report import (
    MOST_PLOTTED,
    count_and_print,
    count_partition,
    partition_text,
    plot_partition,
)
from fedra_engine.data.domain_data import DomainData
from fedra_engine.federation.clients import Clients


def make_data(labels: list[int] | None = None) -> DomainData:
    return DomainData(
        task="image_classification",
        content=Dataset.from_dict({"image": [0] * 6}),
        domain_of=np.array([0, 0, 0, 1, 1, 1]),
        domains=["art", "photo"],
        labels=None if labels is None else np.array(labels),
        classes=[] if labels is None else ["cat", "dog", "emu"],
        is_test=np.zeros(6, dtype=np.bool_),
    )


def make_clients(*samples: list[int]) -> Clients:
    count = len(samples)
    rows = [np.array(of_client) for of_client in samples]
    return Clients(rows, np.zeros(count, dtype=np.int64), np.arange(count) + 3)


def test_samples_are_counted_by_class_and_domain() -> None:
    counts = count_partition(make_data([0, 2, 2, 1, 1, 0]), make_clients([0, 1, 2], [3, 5], [4]))
    (labels, classes), (domains, names) = counts["class"], counts["domain"]
    assert (labels.tolist(), classes) == ([[1, 1, 0], [0, 1, 1], [2, 0, 0]], ["cat", "dog", "emu"])
    assert (domains.tolist(), names) == ([[3, 0, 0], [0, 2, 1]], ["art", "photo"])


def test_every_client_has_a_line() -> None:
    counts = count_partition(make_data([0, 2, 2, 1, 1, 0]), make_clients([0, 1, 2], [3, 4, 5]))
    header, *lines = (line.split() for line in partition_text(counts, np.array([3, 4])).splitlines())
    assert header == ["client", "domain", "blocks", "samples", "cat", "dog", "emu"]
    assert lines == [["0", "art", "3", "3", "1", "·", "2"], ["1", "photo", "4", "3", "1", "2", "·"]]


def test_clients_of_several_domains_have_a_column_for_each() -> None:
    counts = count_partition(make_data(), make_clients([0, 1, 5], [2, 3, 4]))
    header, *lines = (line.split() for line in partition_text(counts, np.array([3, 4])).splitlines())
    assert header == ["client", "art", "photo", "blocks", "samples"]
    assert lines == [["0", "2", "1", "3", "3"], ["1", "1", "2", "4", "3"]]


def test_both_matrices_are_plotted(tmp_path: Path) -> None:
    data, clients = make_data([0, 2, 2, 1, 1, 0]), make_clients([0, 1, 2], [3, 4, 5])
    sizes = []
    for labelled in (data, make_data()):
        plot_partition(count_partition(labelled, clients), tmp_path / "plot.png")
        with Image.open(tmp_path / "plot.png") as image:
            sizes.append(image.size)
            assert len(set(image.convert("L").tobytes())) > 10
    assert sizes[0][1] > sizes[1][1]


def test_dollars_in_a_name_are_no_formula(tmp_path: Path) -> None:
    data = replace(make_data([0, 2, 2, 1, 1, 0]), classes=["below $10", "$10_$20_", "above"])
    plot_partition(count_partition(data, make_clients([0, 1, 2], [3, 4, 5])), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").is_file()


def test_only_small_matrices_are_printed() -> None:
    said: list[str] = []
    assert count_and_print(make_data([0] * 6), make_clients([0, 1, 2], [3, 4, 5]), said.append) is not None
    assert len(said) == 1
    assert count_and_print(make_data([0] * 6), make_clients(*[[0]] * 100), said.append) is not None
    assert len(said) == 1


def test_many_clients_are_not_counted() -> None:
    said: list[str] = []
    assert count_and_print(make_data([0] * 6), make_clients(*[[0]] * (MOST_PLOTTED + 1)), said.append) is None
    assert said == []
