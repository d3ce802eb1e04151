"""Folders of text files: domains, splits, and what cannot be used."""

import errno
import os
from pathlib import Path

import pytest

from fedra_engine.config import ColumnsConfig
from fedra_engine.runtime.errors import InputError
from tests.data.text_files import ROWS, load, texts, write


def test_a_file_is_a_domain_unless_its_rows_name_one(tmp_path: Path) -> None:
    write(tmp_path / "corpus" / "my books.csv", ROWS[:10])
    write(tmp_path / "corpus" / "films.jsonl", ROWS[10:])
    (tmp_path / "corpus" / "README.md").write_text("no samples")
    (tmp_path / "corpus" / "._films.jsonl").write_bytes(b"\xff")
    data = load(tmp_path / "corpus", columns=ColumnsConfig(domain=None))
    assert data.domains == ["books", "films"]  # named in the files too, which comes first
    rows = [{"text": row["text"], "label": row["label"]} for row in ROWS]
    write(tmp_path / "plain" / "my books.csv", rows[:10])
    write(tmp_path / "plain" / "films.jsonl", rows[10:])
    assert load(tmp_path / "plain").domains == ["films", "my books"]


@pytest.mark.parametrize("layout", ["{split}.csv", "{split}/books.csv"])
def test_train_and_test_files_are_the_split(tmp_path: Path, layout: str) -> None:
    rows = [{"text": row["text"], "label": row["label"]} for row in ROWS]
    write(tmp_path / "corpus" / layout.format(split="train"), rows[:12])
    write(tmp_path / "corpus" / layout.format(split="test"), rows[12:])
    data = load(tmp_path / "corpus")
    assert texts(data.train) == [row["text"] for row in rows[:12]]
    assert texts(data.test) == [row["text"] for row in rows[12:]]
    assert data.domains == ["all" if "/" not in layout else "books"]


@pytest.mark.parametrize("layout", ["{split}.csv", "{split}/books.csv"])
@pytest.mark.parametrize("others", [("dev",), ("validation", "test")])
def test_other_splits_are_not_trained_on(tmp_path: Path, layout: str, others: tuple[str, ...]) -> None:
    rows = [{"text": row["text"], "label": row["label"]} for row in ROWS]
    for split, some in {"train": rows[:8], others[0]: rows[8:12], others[-1]: rows[12:]}.items():
        write(tmp_path / "corpus" / layout.format(split=split), some)
    data = load(tmp_path / "corpus")
    assert texts(data.train) == [row["text"] for row in rows[:8]]
    assert texts(data.test) == [row["text"] for row in rows[12:]]


def test_files_that_are_left_out_are_counted_and_named(tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": row["label"]} for row in ROWS]
    root = tmp_path / "corpus"
    write(root / "a.csv", rows)
    before = load(root).notes
    for name in ("b.csv.gz", "c.json", "deep/d.csv", ".hidden"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("")
    note, *others = load(root).notes
    assert others == before
    assert note.startswith(f"warning: {root}: left out 1 .gz, 1 .json, 1 .csv: b.csv.gz, c.json, deep/d.csv; expected")
    (tmp_path / "link").symlink_to(root)
    assert load(tmp_path / "link").notes == [note.replace(str(root), str(tmp_path / "link")), *others]
    # Nothing is left out of a file.
    assert load(root / "a.csv").notes == before


def test_folders_that_cannot_be_used_are_reported(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"data\.root: found no \.csv .* files in '.*empty', expected one per domain"):
        load(tmp_path / "empty")
    write(tmp_path / "above" / "corpus" / "a.csv")
    with pytest.raises(InputError, match=r"in '.*above', expected one per domain \(did you mean '.*above/corpus'\?\)$"):
        load(tmp_path / "above")
    write(tmp_path / "two" / "a.csv")
    write(tmp_path / "two" / "a.jsonl")
    with pytest.raises(InputError, match=r"data\.root: found several files .*a\.\*, expected one per domain"):
        load(tmp_path / "two")
    for name in ("train", "test", "unlabelled"):
        write(tmp_path / "splits" / f"{name}.csv")
    with pytest.raises(
        InputError, match=r"data\.root: found 'unlabelled\.csv' beside 'test\.csv' in '.*splits', expected"
    ):
        load(tmp_path / "splits")
    write(tmp_path / "domains" / "films.csv")
    (tmp_path / "domains" / "books.csv").write_text("text,label\n")
    with pytest.raises(InputError, match=r"data\.root: found no samples in '.*books\.csv', expected some"):
        load(tmp_path / "domains")
    with pytest.raises(
        InputError, match=r"data\.root: found no .*nowhere, expected a csv, .*the name of a data set on the hub"
    ):
        load(tmp_path / "nowhere")


def test_a_folder_that_may_not_be_listed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> None:
        # The tests may run as a user whom no permission binds.
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", deny)
    with pytest.raises(InputError, match=r"data\.root: cannot list .*: Permission denied; expected a readable folder"):
        load(tmp_path)
