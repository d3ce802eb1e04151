"""Samples of causal language models: prompts and responses."""

from pathlib import Path

import pytest

from fedra_engine.config import ColumnsConfig
from fedra_engine.runtime.errors import InputError
from tests.data.text_files import load, write

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
            r"data\.prompt: .*a\.jsonl, line 1: found no column 'question', expected one of 'instr",
        ),
        ("{instruction", r"data\.prompt: .*expected column names in braces"),
        ("{instruction!r}", r"data\.prompt: found a format of column 'instruction', expected column names alone"),
        ("{instruction:>10}", r"data\.prompt: found a format of column 'instruction', expected column names alone"),
    ],
)
def test_prompts_that_cannot_be_made_are_reported(tmp_path: Path, prompt: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(write(tmp_path / "a.jsonl", QUESTIONS), "causal_lm", prompt=prompt)
