"""Texts from files of every kind, in every layout, with what can be wrong in them."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from fedra_engine.config import ColumnsConfig, DataConfig
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.row_cache import cache_folder
from fedra_engine.data.sources import load_source
from fedra_engine.data.tokenization import token_rows, tokenization_for
from fedra_engine.errors import InputError
from tests.data.tokenizers import save_encoder_tokenizer

ROWS = [
    {"text": f'It said "{letter}", then\tnothing', "label": label, "domain": domain}
    for domain in ("books", "films")
    for label in ("bad", "good")
    for letter in "abcde"
]


def write(file: Path, rows: list[dict] = ROWS, end: str = "\n") -> Path:
    """`rows` as whatever kind of file `file` says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = Dataset.from_list(rows)
    if file.suffix == ".csv":
        file.write_text(data.to_pandas().to_csv(index=False), newline=end)
    elif file.suffix == ".tsv":
        lines = [list(rows[0]), *(row.values() for row in rows)]
        text = "".join("\t".join(str(value).replace("\t", " ") for value in line) + "\n" for line in lines)
        file.write_text(text, newline=end)
    elif file.suffix == ".jsonl":
        file.write_text(data.to_pandas().to_json(orient="records", lines=True), newline=end)
    else:
        data.to_parquet(file)
    return file


def load(root: Path, source: str = "text_classification", seed: int = 0, **settings: object) -> DomainData:
    return load_source(DataConfig(source, str(root), **settings), seed)


def texts(data: DomainData) -> list[str]:
    return list(data.content["text"])


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_any_kind_of_file_gives_the_same_samples(tmp_path: Path, suffix: str, end: str) -> None:
    data = load(write(tmp_path / f"reviews.{suffix}", end=end))
    expected = [row["text"] for row in ROWS]
    assert texts(data) == [text.replace("\t", " ") if suffix == "tsv" else text for text in expected]
    assert [data.classes[label] for label in data.labels] == [row["label"] for row in ROWS]
    assert [data.domains[domain] for domain in data.domain_of] == [row["domain"] for row in ROWS]
    assert np.bincount(data.test.domain_of * 2 + data.test.labels).tolist() == [1, 1, 1, 1]


def test_a_byte_order_mark_and_quoted_line_breaks_are_read_as_they_are_meant(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b'\xef\xbb\xbftext,label\r\n"two\r\nlines, one text",x\r\nb,y\r\nc,x\r\nd,y\r\n')
    data = load(file)
    assert texts(data)[0] == "two\r\nlines, one text"
    assert list(map(str, data.origins)) == [f"{file}, line {number}" for number in (2, 4, 5, 6)]
    assert data.domains == ["all"]


def test_blank_lines_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("\n\ntext,label\na,x\n\nb,x\nc,y\nd,y\n")
    data = load(file)
    assert texts(data) == list("abcd")
    assert [origin.number for origin in data.origins] == [4, 6, 7, 8]
    file.write_text("\ntext,label\na\n")
    with pytest.raises(InputError, match=r"a\.csv, line 3: found 1 values, expected 2 as in line 2"):
        load(file)


def test_one_file_a_domain(tmp_path: Path) -> None:
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


def test_numbers_are_classes_in_their_order_and_columns_can_be_named(tmp_path: Path) -> None:
    rows = [{"body": "a b", "stars": stars, "by": f"user {stars}"} for stars in (10, 9, 2) for _ in range(2)]
    columns = ColumnsConfig(input="body", label="stars", client="by")
    data = load(write(tmp_path / "a.jsonl", rows), columns=columns)
    assert data.classes == ["2", "9", "10"]
    assert data.labels.tolist() == [2, 2, 1, 1, 0, 0]
    assert data.clients.tolist() == [row["by"] for row in rows]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label\na,x\nb\n", r"a\.csv, line 3: found 1 values, expected 2 as in line 1"),
        ("a.csv", b"text,label\na,x\n,y\n", r"a\.csv, line 3: found no text, expected some, or data\.unreadable skip"),
        ("a.csv", b"text,label\na,x\nb,\n", r"a\.csv, line 3: found '', expected a name or a whole number"),
        ("a.csv", b'text,label\n"a"b,x\n', r"a\.csv, line 2: .*expected separated values"),
        ("a.csv", b"text,label\n\xff,x\n", r"a\.csv, line 2: .*expected UTF-8 text"),
        ("a.csv", b"body,label\nb,x\n", r"a\.csv, line 2: found no column 'text', expected one of body, label"),
        ("a.csv", b"text,stars\nb,x\n", r"a\.csv, line 2: found no column 'label'"),
        ("a.csv", b"text,label\n", r"found no samples in"),
        ("a.csv", b"text,label,text\na,b,c\n", r"a\.csv, line 1: found several columns 'text', expected one"),
        ("a.jsonl", b'{"text": ["a"], "label": 1}\n', r"a\.jsonl, line 1: found a list in column 'text'"),
        ("a.jsonl", b'{"text": {"a": 1}, "label": 1}\n', r"a\.jsonl, line 1: found a dict in column 'text'"),
        ("a.jsonl", b'{"text": true, "label": 1}\n', r"a\.jsonl, line 1: found a bool in column 'text'"),
        ("a.jsonl", b'{"text": "a", "label": 1, "domain": {}}\n', r"a\.jsonl, line 1: found {}, expected a name"),
        ("a.jsonl", b'{"text": "a", "label": 1, "client": []}\n', r"a\.jsonl, line 1: found \[\], expected a name"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "b"\n', r"a\.jsonl, line 2: .*expected a JSON object"),
        ("a.jsonl", b'{"text": "\\ud800", "label": 1}\n', r"a\.jsonl, line 1: .*surrogates"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: .*expected a JSON object"),
        ("a.jsonl", b"{}\n", r"a\.jsonl, line 1: found no column 'text'"),
        (
            "a.jsonl",
            b'{"text": "a", "label": 1, "domain": "x"}\n{"text": "b", "label": 1}\n',
            r"a\.jsonl, line 2: found no domain, .*expected one in every line or in none",
        ),
        (
            "a.jsonl",
            b'{"text": "a", "label": 1}\n{"text": "b", "label": 1, "domain": "x"}\n',
            r"a\.jsonl, line 2: found a domain, .*expected one in every line or in none",
        ),
        ("a.jsonl", b"3\n", r"a\.jsonl, line 1: found 3, expected a JSON object"),
        ("a.jsonl", b'{"text": "a", "label": 1.5}\n', r"a\.jsonl, line 1: found 1\.5, expected a name"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "a", "label": null}\n', r"a\.jsonl, line 2: found no label"),
        ("a.parquet", b"PAR1", r"a\.parquet.*expected a parquet file"),
        ("a.doc", b"", r"a\.doc', expected a file that ends in one of \.csv \.tsv \.jsonl \.parquet \.txt"),
    ],
)
def test_lines_that_cannot_be_used_are_told(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"^data\.(root|columns\.\w+): .*{message}"):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("column", "wrong"),
    [
        ("text", pa.array([b"a", b"b", b"caf\xe9"]).view(pa.string())),
        ("when", pa.array([0, 1, 2**62], pa.timestamp("us"))),
    ],
    ids=["no UTF-8", "no date"],
)
def test_values_of_a_parquet_file_that_are_none_are_told(tmp_path: Path, column: str, wrong: pa.Array) -> None:
    columns = {"text": ["a", "b", "c"], "label": [0, 1, 0]} | {column: wrong}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"^data\.root: .*a\.parquet, row 3: .*; expected UTF-8 texts and dates"):
        load(tmp_path / "a.parquet")


def test_texts_without_content_are_skipped_on_demand(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [*ROWS[:10], {"text": " ", "label": "bad", "domain": "books"}])
    data = load(file, unreadable="skip")
    assert len(data) == 10
    assert data.notes[0] == f"{file}, line 11: skipped, it has no text"


def test_repeated_texts_are_told(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "label": number % 2} for number in range(8)]
    assert load(write(tmp_path / "once.csv", rows)).notes == []
    (note,) = load(write(tmp_path / "twice.csv", rows + rows[:3])).notes
    assert note.startswith("texts: 3 repeat another, so the test set that is drawn")
    write(tmp_path / "split" / "train.csv", rows[:6] + rows[:2])
    write(tmp_path / "split" / "test.csv", rows[4:])
    assert load(tmp_path / "split").notes == ["texts: 2 of the test set are in the training set, too"]


def test_blanks_around_names_do_not_make_other_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label,domain,client\na,0,x,u\nb, 0 , x,u \nc,1,x ,v\nd, 1,x, v\n")
    data = load(tmp_path / "a.csv")
    assert (data.classes, data.labels.tolist(), data.domains) == (["0", "1"], [0, 0, 1, 1], ["x"])
    assert data.clients.tolist() == ["u", "u", "v", "v"]


def test_texts_are_read_from_a_file_that_leaves_nothing_behind(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "label": number % 2} for number in range(2500)]
    data = load(write(tmp_path / "a.jsonl", rows))
    assert texts(data) == [row["text"] for row in rows]
    assert list(cache_folder().iterdir()) == []


def test_a_cache_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(InputError, match=r"data: cannot write into .*HF_DATASETS_CACHE names it"):
        load(write(tmp_path / "a.csv"))


def test_folders_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"data\.root: found no \.csv .* files in '.*empty', expected one a domain"):
        load(tmp_path / "empty")
    write(tmp_path / "two" / "a.csv")
    write(tmp_path / "two" / "a.jsonl")
    with pytest.raises(InputError, match=r"data\.root: found several files .*a\.\*, expected one a domain"):
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


def test_a_folder_that_may_not_be_listed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> None:
        # The tests may run as a user whom no permission binds.
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", deny)
    with pytest.raises(InputError, match=r"data\.root: cannot list .*: Permission denied; expected a readable folder"):
        load(tmp_path)


def test_samples_of_a_domain_stand_together_and_are_cached_together(tmp_path: Path) -> None:
    rows = [{"text": f"a {i}", "label": i // 2 % 2, "domain": ["films", "books"][i % 2]} for i in range(40)]
    data = load(write(tmp_path / "a.jsonl", rows))
    assert data.domain_of.tolist() == [0] * 20 + [1] * 20
    assert texts(data) == [f"a {i}" for i in [*range(1, 40, 2), *range(0, 40, 2)]]
    assert str(data.origins[0]) == f"{tmp_path / 'a.jsonl'}, line 2"
    path = save_encoder_tokenizer(tmp_path / "model")
    token_rows(data, tokenization_for(path, SimpleNamespace(model_type="bert")), skip=False)
    assert len(list(cache_folder().glob("*.arrow"))) == 2


QUESTIONS = [
    {"instruction": f"say {letter}", "context": None if letter == "a" else "now", "response": letter, "category": "x"}
    for letter in "abcd"
]


def test_instructions_become_prompts_and_responses(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", QUESTIONS)
    data = load(file, "causal_lm", prompt="Q {instruction} ({context}) A ", columns=ColumnsConfig(label="category"))
    assert data.task == "causal_lm"
    assert list(data.content["prompt"]) == ["Q say a () A ", *(f"Q say {letter} (now) A " for letter in "bcd")]
    assert list(data.content["response"]) == list("abcd")
    assert data.classes == ["x"]
    plain = load(file, "causal_lm", columns=ColumnsConfig(input="instruction"))
    assert list(plain.content["prompt"]) == [""] * 4
    assert plain.labels is None


def test_lines_of_a_txt_file_are_samples(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"first line\r\n\r\nsecond line\r\n third\n")
    data = load(tmp_path / "a.txt", "causal_lm")
    assert list(data.content["response"]) == ["first line", "second line", "third"]
    assert (len(data.train), len(data.test)) == (2, 1)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            "{question}",
            r"data\.prompt: .*a\.jsonl, line 1: found no column 'question', expected one of instr",
        ),
        ("{instruction", r"data\.prompt: .*expected column names in braces"),
        ("{instruction!r}", r"data\.prompt: found a format of column 'instruction', expected column names alone"),
        ("{instruction:>10}", r"data\.prompt: found a format of column 'instruction', expected column names alone"),
    ],
)
def test_prompts_that_cannot_be_made_are_told(tmp_path: Path, prompt: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(write(tmp_path / "a.jsonl", QUESTIONS), "causal_lm", prompt=prompt)


def test_saved_datasets_are_read_too(tmp_path: Path) -> None:
    DatasetDict(train=Dataset.from_list(ROWS[:15]), test=Dataset.from_list(ROWS[5:])).save_to_disk(tmp_path / "saved")
    data = load(tmp_path / "saved")
    assert (len(data.train), len(data.test)) == (15, 15)
    assert data.classes == ["bad", "good"]


def test_the_classes_of_a_saved_dataset_keep_their_names_and_order(tmp_path: Path) -> None:
    features = Features(text=Value("string"), label=ClassLabel(names=["negative", "good", "bad"]))
    rows = {"text": [f"text {number}" for number in range(8)], "label": [0, 1, 2, 2] * 2}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    data = load(tmp_path / "saved")
    assert data.classes == ["negative", "good", "bad"]
    assert data.labels.tolist() == rows["label"]


def test_images_are_no_texts_to_classify(tmp_path: Path) -> None:
    image = np.zeros((4, 4), dtype=np.uint8)
    rows = {"image": [image] * 4, "label": [0, 0, 1, 1]}
    Dataset.from_dict(rows, features=Features(image=Image(), label=Value("int64"))).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"data\.columns\.input: found images with data\.source text_classification"):
        load(tmp_path / "saved", columns=ColumnsConfig(input="image"))
