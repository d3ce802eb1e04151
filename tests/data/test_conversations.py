"""Conversations: the chat template makes a text of them, and the last answer is learnt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from fedra_engine.config import ColumnsConfig, DataConfig
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.samples import prepare
from fedra_engine.data.tokenization import token_rows, tokenization_for
from fedra_engine.runtime.errors import InputError
from tests.data.test_tokenization import tokens
from tests.data.text_files import load
from tests.data.tokenizers import save_decoder_tokenizer, save_metaspace_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ 'q ' if m.role == 'user' else 'r ' }}{{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}r {% endif %}"
)
QUESTION, ANSWER = {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}
LONGER = [QUESTION, ANSWER, {"role": "user", "content": "e"}, {"role": "assistant", "content": "f", "name": "x"}]


def settings() -> SimpleNamespace:
    """Of a model; `prepare` adds the padding token."""
    return SimpleNamespace(model_type="bert", max_position_embeddings=32)


def conversations(folder: Path, messages: object, **config: Any) -> DomainData:
    rows = [{"turns": messages}, *({"turns": [QUESTION, ANSWER]} for _ in range(5))]
    file = folder / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load(file, "causal_lm", columns=ColumnsConfig(messages="turns"), **config)


def model(folder: Path, template: str | None = TEMPLATE, save: Callable[[Path], str] = save_decoder_tokenizer) -> str:
    tokenizer = AutoTokenizer.from_pretrained(save(folder))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("start", "max_length", "expected", "learnt"),
    [
        ("", 16, "q a b </s> r c d </s> q e </s> r f </s>", "f </s>"),
        ("", 6, "q e </s> r f </s>", "f </s>"),
        ("{{ bos_token }} ", 7, "<s> q e </s> r f </s>", "f </s>"),
    ],
)
def test_only_the_last_answer_is_learnt(
    tmp_path: Path, start: str, max_length: int, expected: str, learnt: str
) -> None:
    """A long conversation loses its beginning, but keeps its start token."""
    data = conversations(tmp_path, LONGER)
    found = prepare(data, DataConfig(max_length=max_length), model(tmp_path / "model", start + TEMPLATE), settings())
    texts = {}
    for samples in (found.train, found.test):
        every = torch.arange(len(samples.domains))
        inputs = samples.inputs(every, torch.device("cpu"), torch.float32)
        for ids, mask, own in zip(inputs["input_ids"], inputs["attention_mask"], samples.labels, strict=True):
            texts[tuple(ids[mask.bool()].tolist())] = own[own != -100].tolist()
    assert texts[tuple(tokens(expected))] == tokens(learnt)


@pytest.mark.parametrize(
    ("end", "expected", "before"),
    [("\n", ["▁a", "\n", "b", "\n"], 2), (" ", ["▁a", "▁b", "▁"], 1)],
    ids=["tokens end with the prompt", "one goes on"],
)
def test_the_template_is_tokenized_as_a_whole(tmp_path: Path, end: str, expected: list[str], before: int) -> None:
    template = "{% for m in messages %}{{ m.content ~ '" + end.replace("\n", "\\n") + "' }}{% endfor %}"
    data = conversations(tmp_path, [QUESTION | {"content": "a"}, ANSWER | {"content": "b"}])
    tokenization = tokenization_for(model(tmp_path / "model", template, save_metaspace_tokenizer), settings(), 8)
    rows = token_rows(data, tokenization, skip=False)
    length, prompt = (rows.parts[0].columns[name][0] for name in ("length", "prompt"))
    ids = rows.parts[0].columns["ids"][0, :length]
    assert (tokenization.tokenizer.convert_ids_to_tokens(ids), prompt) == (expected, before)


def test_a_template_that_writes_todays_date_makes_the_same_tokens_every_day(tmp_path: Path) -> None:
    """Llama 3.2 and other chat models have one; a run could not be resumed on another day."""
    template = "{% if strftime_now is defined %}{{ strftime_now('%a %b') | lower }} {% endif %}" + TEMPLATE
    tokenizer = AutoTokenizer.from_pretrained(model(tmp_path / "model", template))
    tokenizer.add_tokens(["fri", "jul"])
    rows = token_rows(
        conversations(tmp_path, [QUESTION, ANSWER]), tokenization_for(None, settings(), 12, tokenizer), skip=False
    )
    assert tokenizer.decode(rows.parts[0].columns["ids"][0]).startswith("fri jul q a b")
    assert tokenizer.chat_template == template


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "found 'hello' in column 'turns', expected a list of messages"),
        ([{"role": "user"}, ANSWER], "expected a message with the texts role and content"),
        ([QUESTION, "c d"], "expected a message with the texts role and content"),
    ],
)
def test_what_is_no_conversation_is_named(tmp_path: Path, messages: object, message: str) -> None:
    with pytest.raises(InputError, match=rf"^data\.root: .*a\.jsonl, line 1: .*{message}"):
        conversations(tmp_path, messages)


@pytest.mark.parametrize(
    "messages",
    [None, [], [QUESTION], [ANSWER], [QUESTION, ANSWER, QUESTION], [QUESTION, ANSWER | {"content": " "}]],
)
def test_a_conversation_without_question_and_answer_is_named_or_skipped(tmp_path: Path, messages: object) -> None:
    lacking = "no question with an answer at the end"
    with pytest.raises(InputError, match=rf"a\.jsonl, line 1: found {lacking} in column 'turns', .*unreadable skip$"):
        conversations(tmp_path, messages)
    data = conversations(tmp_path, messages, unreadable="skip")
    assert data.notes[0].endswith(f"a.jsonl, line 1: skipped, it has {lacking}")
    assert len(data) == 5


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ("{{ raise_exception('no e') }}", r"the tokenizer's chat template refuses it \(no e\)"),
        (
            "{% if not add_generation_prompt %}x {% endif %}",
            "the tokenizer's chat template writes its answer otherwise",
        ),
    ],
)
def test_a_conversation_that_the_template_refuses_is_named_or_skipped(
    tmp_path: Path, refusal: str, message: str
) -> None:
    data = conversations(tmp_path, [QUESTION | {"content": "e"}, ANSWER])
    path = model(tmp_path / "model", "{% if messages[0].content == 'e' %}" + refusal + "{% endif %}" + TEMPLATE)
    with pytest.raises(InputError, match=rf"^data\.root: cannot read .*a\.jsonl, line 1: {message}.*, or data\.unread"):
        prepare(data, DataConfig(), path, settings())
    found = prepare(data, DataConfig(unreadable="skip"), path, settings())
    assert len(found.data) == 5


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "found a tokenizer without a chat template with data.columns.messages"),
        ("{% if %}", "cannot use the tokenizer's chat template: Expected an expression"),
        (
            "{{ strftime_now(format) }}" + TEMPLATE,
            r"found 'strftime_now\(format\)' in the tokenizer's chat template, .* a format in quotes",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_reported(tmp_path: Path, template: str | None, message: str) -> None:
    data = conversations(tmp_path, [QUESTION, ANSWER])
    with pytest.raises(InputError, match=message):
        prepare(data, DataConfig(), model(tmp_path / "model", template), settings())


def test_the_messages_are_kept_as_they_are(tmp_path: Path) -> None:
    content: Any = conversations(tmp_path, LONGER).content
    assert json.loads(content["messages"][0]) == LONGER[:3]
    assert content["response"][0] == "f"
