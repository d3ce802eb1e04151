"""RowGroups: checks, caching and the runs of the batched torch path."""

import pytest
import torch

from fedra_kernels import RowGroups
from fedra_kernels._kernels.row_tables import MAX_ROWS

from .helpers import make_groups


def test_runs_join_adjacent_groups_of_equal_size_over_empty_ones():
    runs = make_groups([2, 0, 2, 3, 3, 2], [4, 0, 5, 7, 6, 1]).runs
    assert [(run.rows, run.count, run.size) for run in runs] == [
        (slice(0, 4), 2, 2),
        (slice(4, 10), 2, 3),
        (slice(10, 12), 1, 2),
    ]
    assert runs[0].slots == slice(4, 6)
    assert torch.equal(runs[1].slots, torch.tensor([7, 6]))


def test_groups_without_rows_fill_no_slots():
    groups = RowGroups([0, 0], torch.tensor([3, 1]))
    assert groups.filled_slots == slice(0, 0)
    assert len(groups.compact) == 0


def test_rows_of_the_last_groups_become_first_tokens():
    groups = RowGroups([2, 0, 1, 3], torch.arange(4)).per_token(5)
    assert groups.with_first_tokens(0, 5) is groups.compact
    few = groups.with_first_tokens(2, 5)
    assert few.sizes == (10, 1, 3)
    assert groups.with_first_tokens(2, 5) is few


def test_per_token_multiplies_the_sizes_and_is_cached():
    groups = make_groups([2, 0, 3], [1, 2, 3])
    tokens = groups.per_token(17)
    assert tokens.sizes == (34, 0, 51)
    assert tokens is groups.per_token(17)
    assert groups.per_token(1) is groups
    assert tokens.row_group.tolist() == [0] * 34 + [2] * 51


@pytest.mark.parametrize(
    ("sizes", "slots", "message"),
    [
        ([1, -1], torch.tensor([0, 1]), "sizes: found -1"),
        ([1, 1], torch.tensor([0]), r"slots: found shape \[1\]"),
        ([1, 1], torch.tensor([0, 0]), "slots: found a slot twice"),
        ([1, 1], torch.tensor([0, -2]), "slots: found -2"),
        ([1, 1], torch.tensor([0, 1]).int(), "slots: found dtype"),
    ],
)
def test_bad_tables_are_named(sizes, slots, message):
    with pytest.raises(ValueError, match=f"^{message}.*expected"):
        RowGroups(sizes, slots)


def test_more_rows_than_the_kernels_count_are_named():
    with pytest.raises(ValueError, match=rf"^sizes: found {MAX_ROWS + 1} rows together, expected at most {MAX_ROWS}"):
        RowGroups([MAX_ROWS, 1], torch.tensor([0, 1]))


def test_the_device_of_a_gpu_has_an_index_as_that_of_its_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for given, expected in (("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        assert RowGroups([1], torch.tensor([0]), given).device == torch.device(expected)
