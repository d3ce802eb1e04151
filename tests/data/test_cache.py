"""Rows on disk: there whole or not at all, made once, and memory-mapped."""

import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset

from fedra_engine.data.cache import Part, as_tensor, cache_folder, cached_parts
from fedra_engine.data.samples import StoredRows
from fedra_engine.runtime.errors import InputError

SHAPES: dict[str, tuple[int, ...]] = {"pixels": (3, 2), "length": ()}


def make(index: int) -> Part:
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 3, 2) + index
    return Part({"pixels": pixels, "length": np.arange(4, dtype=np.int32)}, ["", "", "broken", ""])


def read(keys: list[str], maker=make) -> list[Part]:
    return list(cached_parts(keys, maker, SHAPES))


def never(index: int) -> Part:
    pytest.fail("made again")


def files(pattern: str = "*.arrow") -> list[str]:
    return sorted(path.stem for path in cache_folder().glob(pattern))


def test_what_was_made_is_read_again() -> None:
    read(["a", "b"])
    for index, part in enumerate(read(["a", "b"], never)):
        expected = make(index)
        np.testing.assert_array_equal(part.columns["pixels"], expected.columns["pixels"])
        np.testing.assert_array_equal(part.columns["length"], expected.columns["length"])
        assert part.errors == expected.errors
        assert not part.columns["pixels"].flags.writeable


def test_parts_open_with_the_datasets_library() -> None:
    read(["a"])
    data = Dataset.from_file(str(cache_folder() / "a.arrow"))
    assert data[1]["pixels"] == list(range(6, 12))


def test_an_interrupted_run_goes_on_where_it_was() -> None:
    def interrupted(index: int) -> Part:
        if index == 2:
            raise KeyboardInterrupt
        return make(index)

    with pytest.raises(KeyboardInterrupt):
        read(["a", "b", "c"], interrupted)
    assert files() == ["a", "b"]
    made = []
    read(["a", "b", "c"], lambda index: made.append(index) or make(index))
    assert made == [2]


def test_what_is_refused_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(index: int) -> Part:
        raise InputError("broken")

    with pytest.raises(InputError, match="broken"):
        read(["a"], refuse)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"data: cannot write .*a\.arrow: No space left on device; expected room"):
        read(["a"])
    assert [path.name for path in cache_folder().iterdir()] == ["lock"]


def test_a_part_gets_its_name_when_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may be killed at any time; what it was writing must not have the name of a part."""
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append((files(), files("*.tmp"))))
    read(["a"])
    # The file, then the folder with its name.
    assert seen == [([], [".a.arrow"]), (["a"], [])]
    assert (files(), files("*.tmp")) == (["a"], [])


def test_a_cache_that_cannot_be_written_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(InputError, match=r"data: cannot write .*HF_DATASETS_CACHE names it"):
        read(["a"])


def test_remains_of_a_killed_process_go_away_and_damaged_parts_are_made_again() -> None:
    read(["a"])
    (cache_folder() / ".dead.tmp").write_text("half")
    damaged = cache_folder() / "a.arrow"
    whole = damaged.read_bytes()
    for length in range(0, len(whole), 8):
        damaged.write_bytes(whole[:length])
        (part,) = read(["a"])
        np.testing.assert_array_equal(part.columns["pixels"], make(0).columns["pixels"])
        assert damaged.read_bytes()[:length] == whole[:length]
    assert files("*.tmp") == []


@pytest.mark.parametrize(
    "columns",
    [
        {"pixels": [b"123456"] * 4, "error": [""] * 4},
        {"pixels": [b"123456"] * 4, "length": [1] * 4, "error": [""] * 4},
        {"length": [[1]] * 4, "pixels": [[None] * 6] * 4, "error": [""] * 4},
    ],
    ids=["a column is missing", "a column is of another type", "values are missing"],
)
def test_parts_with_other_columns_are_made_again(columns: dict[str, list]) -> None:
    read(["a"])
    table = pa.table(columns)
    with pa.OSFile(str(cache_folder() / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (part,) = read(["a"])
    np.testing.assert_array_equal(part.columns["pixels"], make(0).columns["pixels"])


def damage(path: Path, content: np.ndarray) -> None:
    """Flip a bit in the middle of `content` where it is in the file, in place: also in what is mapped already."""
    whole = path.read_bytes()
    at = whole.index(content.tobytes()) + content.nbytes // 2
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([whole[at] ^ 1]))


@pytest.mark.parametrize("column", ["pixels", "length"])
@pytest.mark.parametrize("when", ["before it is opened", "after it was opened"])
def test_a_flipped_bit_changes_nothing(column: str, when: str, caplog: pytest.LogCaptureFixture) -> None:
    path = cache_folder() / "a.arrow"
    whole = StoredRows([as_tensor(make(index).columns["pixels"]) for index in range(2)])
    rows = torch.tensor([6, 1, 2, 1])
    parts = read(["a", "b"])
    if when == "before it is opened":
        damage(path, make(0).columns[column])
        parts = read(["a", "b"])
        assert (column == "length") == ("made again what was damaged in the cache: " in caplog.text)
    stored = StoredRows.of_parts(parts, "pixels")
    if when == "after it was opened":
        damage(path, make(0).columns[column])
    assert torch.equal(stored.gather(rows, torch.device("cpu")), whole.gather(rows, torch.device("cpu")))
    assert parts[0].columns["length"].tolist() == [0, 1, 2, 3]
    read(["a", "b"])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(path) in caplog.text
    assert path.read_bytes() == _written(path)


def _written(path: Path) -> bytes:
    path.unlink()
    read([path.stem])
    return path.read_bytes()


def test_a_flipped_bit_does_not_reach_an_accelerator() -> None:
    stored = StoredRows.of_parts(read(["a", "b"]), "pixels")
    damage(cache_folder() / "b.arrow", make(1).columns["pixels"])
    whole = stored._copy(torch.device("cpu"))
    expected = np.concatenate([make(index).columns["pixels"] for index in range(2)])
    np.testing.assert_array_equal(whole, expected)


def test_no_flipped_byte_is_taken_over(caplog: pytest.LogCaptureFixture) -> None:
    read(["a"])
    path = cache_folder() / "a.arrow"
    whole = path.read_bytes()
    rows = torch.arange(4)
    # Every byte would take ten seconds; a step of seven meets every place in an aligned word.
    for at in range(0, len(whole), 7):
        path.unlink()
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        (part,) = read(["a"])
        pixels = StoredRows.of_parts([part], "pixels").gather(rows, torch.device("cpu"))
        np.testing.assert_array_equal(pixels, make(0).columns["pixels"])
        assert part.columns["length"].tolist() == [0, 1, 2, 3]
        assert part.errors == make(0).errors
    assert len(caplog.records) > len(whole) / 7 / 2


def test_a_part_is_made_again_as_often_as_it_is_damaged() -> None:
    stored, rows = StoredRows.of_parts(read(["a"]), "pixels"), torch.arange(4)
    whole = make(0).columns["pixels"]
    for _ in range(3):
        damage(cache_folder() / "a.arrow", whole)
        np.testing.assert_array_equal(stored.gather(rows, torch.device("cpu")), whole)


def test_rows_in_memory_have_a_digest_where_the_library_of_the_cache_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "xxhash", None)
    rows = torch.arange(60, dtype=torch.uint8).reshape(10, 3, 2)
    assert (
        StoredRows([rows]).digest() == StoredRows([rows[:4], rows[4:]]).digest() != StoredRows([rows.flip(0)]).digest()
    )


def test_exchanged_files_are_made_again(caplog: pytest.LogCaptureFixture) -> None:
    read(["a", "b"])
    one, other = (cache_folder() / f"{key}.arrow" for key in "ab")
    one.rename(cache_folder() / "c")
    other.rename(one)
    (cache_folder() / "c").rename(other)
    for index, part in enumerate(read(["a", "b"])):
        np.testing.assert_array_equal(part.columns["pixels"], make(index).columns["pixels"])
    assert "a.arrow and 1 other" in caplog.text


def test_damaged_rows_that_cannot_be_made_as_they_were_are_an_error() -> None:
    made = iter([make(0), make(1)])
    stored = StoredRows.of_parts(read(["a"], lambda _: next(made)), "pixels")
    damage(cache_folder() / "a.arrow", make(0).columns["pixels"])
    with pytest.raises(InputError, match=r"data: found rows in .*a\.arrow that were damaged and cannot be made as"):
        stored.gather(torch.arange(4), torch.device("cpu"))


def test_the_digest_of_rows_is_of_their_content_and_order() -> None:
    whole = torch.arange(60, dtype=torch.uint8).reshape(10, 3, 2)
    digest = StoredRows([whole]).digest()
    assert StoredRows([whole[:4], whole[4:]]).digest() == digest
    assert StoredRows([whole[:1], whole]).digest(torch.arange(1, 11)) == digest
    changed = whole.clone()
    changed[7, 2, 1] ^= 1
    for other in (changed, whole.flip(0), whole[:9], whole.view(torch.int8), whole.reshape(10, 2, 3)):
        assert StoredRows([other]).digest() != digest


def test_rows_of_the_cache_have_the_digest_of_rows_in_memory() -> None:
    read(["a", "b"])
    cached = StoredRows.of_parts(read(["a", "b"], never), "pixels")
    for index in range(2):
        # Nothing is read for it.
        damage(cache_folder() / f"{'ab'[index]}.arrow", make(index).columns["pixels"])
    in_memory = StoredRows([as_tensor(make(index).columns["pixels"]) for index in range(2)])
    rows = torch.tensor([6, 1, 1, 3])
    assert cached.digest() == in_memory.digest()
    assert cached.digest(rows) == in_memory.digest(rows)


def _make_slowly(cache: Path, made: Path) -> None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = cache

    def slow(index: int) -> Part:
        time.sleep(0.1)
        (made / f"{index}-{os.getpid()}").touch()
        return make(index)

    read([f"part{index}" for index in range(5)], slow)


def test_processes_at_the_same_time_make_every_part_once(tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_make_slowly, args=(tmp_path / "shared", made)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert sorted(path.name.partition("-")[0] for path in made.iterdir()) == ["0", "1", "2", "3", "4"]


def test_rows_are_gathered_across_parts() -> None:
    whole = torch.arange(60, dtype=torch.uint8).reshape(10, 3, 2)
    rows = torch.tensor([9, 0, 4, 4, 3, 7])
    for parts in ([whole], [whole[:4], whole[4:5], whole[5:]]):
        stored = StoredRows(parts)
        assert len(stored) == 10
        assert torch.equal(stored.gather(rows, torch.device("cpu")), whole[rows])


def private_bytes() -> int:
    """Resident memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_100_000_images_need_no_more_memory_than_5_000() -> None:
    shape, rows_of_part = (3, 32, 32), 5_000

    def images(index: int) -> Part:
        pixels = np.full((rows_of_part, *shape), index, dtype=np.uint8)
        return Part({"pixels": pixels}, [""] * rows_of_part)

    def used(parts: int) -> int:
        """Private memory that `parts` parts take, gathered through once."""
        before = private_bytes()
        found = list(cached_parts([f"part{n}" for n in range(parts)], never, {"pixels": shape}))
        stored = StoredRows([as_tensor(part.columns["pixels"]) for part in found])
        for rows in torch.randperm(len(stored))[:20_000].split(1000):
            stored.gather(rows, torch.device("cpu"))
        return private_bytes() - before

    list(cached_parts([f"part{n}" for n in range(20)], images, {"pixels": shape}))
    used(1)
    # All pixels are 307 MB.
    assert used(20) - used(1) < 20e6
