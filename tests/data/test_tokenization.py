"""Texts become the model's tokens, once; only responses are to be learnt."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.launches import counted_launches
from fedra_engine.config import DataConfig
from fedra_engine.data import tokenization as tokenization_module
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.samples import StoredRows, prepare
from fedra_engine.data.tokenization import token_rows, tokenization_for
from fedra_engine.runtime.errors import InputError
from tests.data.tokenizers import WORDS, save_byte_tokenizer, save_decoder_tokenizer, save_encoder_tokenizer

CPU = torch.device("cpu")
MODEL = SimpleNamespace(model_type="bert", max_position_embeddings=32)


@pytest.fixture(autouse=True)
def _own_padding() -> Iterator[None]:
    """The padding token that `prepare` gives the model is not to stay."""
    yield
    vars(MODEL).pop("pad_token_id", None)


def tokens(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def make_data(task: str, content: dict[str, list[str]]) -> DomainData:
    count = len(next(iter(content.values())))
    return DomainData(
        task=task,
        content=Dataset.from_dict(content),
        domain_of=np.zeros(count, dtype=np.int64),
        domains=["all"],
        labels=np.arange(count) % 2,
        classes=["x", "y"],
        is_test=np.arange(count) == count - 1,
    )


def test_classified_texts_are_cut_and_filled_up_on_the_right(tmp_path: Path) -> None:
    data = make_data("text_classification", {"text": ["a b c", "d", "e f g h i j", "a"]})
    found = prepare(data, DataConfig(max_length=6), save_encoder_tokenizer(tmp_path / "model"), MODEL)
    inputs, labels, _ = found.train.batch(torch.tensor([1, 0]), CPU, torch.float32)
    assert inputs["input_ids"].tolist() == [tokens("[CLS] d [SEP] [PAD] [PAD]"), tokens("[CLS] a b c [SEP]")]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert labels.tolist() == [1, 0]
    longest, alone = torch.tensor([2]), [tokens("[CLS] e f g h [SEP]")]
    assert found.train.inputs(longest, CPU, torch.float32)["input_ids"].tolist() == alone
    # Decoders wait for the GPU to see that a mask masks nothing.
    assert {name: ids.tolist() for name, ids in found.train.batch(longest, CPU, torch.float32).inputs.items()} == {
        "input_ids": alone
    }
    assert found.test.labels.tolist() == [1]
    # Models that classify by the last token have to know what comes behind it.
    assert [MODEL.pad_token_id] == tokens("[PAD]")


@pytest.mark.parametrize(
    ("prompt", "response", "expected", "learnt"),
    [
        ("a b", "c d", "<s> a b c d </s>", "c d </s>"),
        ("", "c d", "<s> c d </s>", "c d </s>"),
        # Too long: the response keeps what the prompt leaves, and the prompt at least half, with the start token.
        ("a b", "c d e f g h", "<s> a b c d e f g", "c d e f g"),
        ("a b c d e f g h", "x y", "<s> e f g h x y </s>", "x y </s>"),
        ("a b c d e f g h", "t u v w x y", "<s> f g h t u v w", "t u v w"),
    ],
)
def test_only_the_response_is_learnt(tmp_path: Path, prompt: str, response: str, expected: str, learnt: str) -> None:
    data = make_data("causal_lm", {"prompt": [prompt, "a", "a"], "response": [response, "b", "b"]})
    found = prepare(data, DataConfig(max_length=8), save_decoder_tokenizer(tmp_path / "model"), MODEL)
    inputs, labels, _ = found.train.batch(torch.tensor([0]), CPU, torch.float32)
    assert inputs["input_ids"].tolist() == [tokens(expected)]
    assert [label for label in labels[0].tolist() if label != -100] == tokens(learnt)
    assert labels[0, labels[0] != -100].tolist() == inputs["input_ids"][0, labels[0] != -100].tolist()
    both = torch.tensor([0, 1])
    _, padded, learnt_tokens = found.train.batch(both, CPU, torch.float32)
    assert found.train.inputs(both, CPU, torch.float32)["attention_mask"][1].tolist() == [1] * 4 + [0] * (
        padded.shape[1] - 4
    )
    assert padded[1].tolist() == [-100, -100, *tokens("b </s>")] + [-100] * (padded.shape[1] - 4)
    assert torch.equal(found.train.labels[:, : padded.shape[1]], padded)
    assert (found.train.labels[:, padded.shape[1] :] == -100).all()
    assert learnt_tokens is not None
    marked = np.argwhere(padded[:, 1:].numpy() != -100) + np.array([0, 1])
    assert np.array_equal(np.stack(learnt_tokens, axis=1), marked)


@pytest.mark.parametrize("task", ["text_classification", "causal_lm"])
def test_the_host_does_not_wait_for_a_batch(tmp_path: Path, task: str) -> None:
    columns = {"prompt": ["a b", "a", "a"], "response": ["c", "d e", "c"]}
    if task == "text_classification":
        columns = {"text": ["a b", "c", "d"]}
    path = save_decoder_tokenizer(tmp_path / "model")
    found = prepare(make_data(task, columns), DataConfig(max_length=8), path, MODEL)
    with counted_launches() as counts:
        found.train.batch(torch.tensor([1, 0]), torch.device("meta"), torch.float32)
    assert counts.copies.total() >= 3
    assert not counts.blocking


def test_texts_are_tokenized_once_until_text_or_tokenizer_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def rows(texts: list[str], folder: str = "a", max_length: int = 6) -> None:
        tokenization = tokenization_for(str(tmp_path / folder), MODEL, max_length)
        monkeypatch.setattr(
            type(tokenization.tokenizer), "__call__", lambda *a, **k: calls.append(1) or call(*a, **k), raising=True
        )
        token_rows(make_data("text_classification", {"text": texts}), tokenization, skip=False)

    save_encoder_tokenizer(tmp_path / "a")
    save_decoder_tokenizer(tmp_path / "b")
    call = type(tokenization_for(str(tmp_path / "a"), MODEL).tokenizer).__call__
    for count, arguments in enumerate([(["a"],), (["b"],), (["b"], "b"), (["b"], "b", 5)], start=1):
        rows(*arguments)
        rows(*arguments)
        assert len(calls) == count


def test_texts_go_through_the_tokenizer_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tokenizer returns takes many times the memory of the tokens that are kept."""
    tokenization = tokenization_for(save_encoder_tokenizer(tmp_path / "a"), MODEL, 6)
    kind, sizes = type(tokenization.tokenizer), list[int]()
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, some, **k: sizes.append(len(some)) or call(self, some, **k))
    texts = ["a", "b c", "d"] * 1000
    found = token_rows(make_data("text_classification", {"text": texts}), tokenization, skip=False)
    assert max(sizes) <= 1000
    assert sum(sizes) == len(found.numbers("length")) == 3000
    assert found.numbers("length").tolist() == [3, 4, 3] * 1000


def test_long_texts_go_through_the_tokenizer_by_their_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization_module, "_BYTES_AT_ONCE", 10)
    tokenization = tokenization_for(save_encoder_tokenizer(tmp_path / "a"), MODEL, 9)
    kind, seen = type(tokenization.tokenizer), list[list[str]]()
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, some, **k: seen.append(some) or call(self, some, **k))
    texts = ["a " * 50, "b", "c " * 3, "d", "e " * 4, "f", "g " * 30, "h"]
    found = token_rows(make_data("text_classification", {"text": texts}), tokenization, skip=False)
    assert [text for some in seen for text in some] == texts
    assert all(sum(map(len, some[:-1])) <= 10 for some in seen)
    assert len(seen) < len(texts)
    assert found.numbers("length").tolist() == [9, 3, 5, 3, 6, 3, 9, 3]


def test_the_digest_is_of_tokens_and_what_is_prompt_of_them(tmp_path: Path) -> None:
    path, config = save_decoder_tokenizer(tmp_path / "model"), DataConfig(max_length=8)

    def digest(prompts: list[str], responses: list[str]) -> str:
        data = make_data("causal_lm", {"prompt": prompts, "response": responses})
        return prepare(data, config, path, MODEL).train.digest()

    found = digest(["a b", "c", "x"], ["d", "e f", "y"])
    for prompts, responses in (
        (["c", "a b", "x"], ["e f", "d", "y"]),
        (["a", "c", "x"], ["b d", "e f", "y"]),
        (["a b", "c", "x"], ["d", "e g", "y"]),
    ):
        assert digest(prompts, responses) != found
    # What is held out is no part of the training samples.
    assert digest(["a b", "c", "x"], ["d", "e f", "z"]) == found


def test_another_padding_token_is_another_row(tmp_path: Path) -> None:
    path = save_encoder_tokenizer(tmp_path / "a")
    for padding in (0, 3):
        tokenization = replace(tokenization_for(path, MODEL, 6), padding=padding)
        found = token_rows(make_data("text_classification", {"text": ["a", "b"]}), tokenization, skip=False)
        assert StoredRows.of_parts(found.parts, "ids").gather(torch.tensor([0]), CPU)[0, 3:].tolist() == [padding] * 3


def test_rows_are_filled_up_with_a_token_that_the_model_knows(tmp_path: Path) -> None:
    path = save_decoder_tokenizer(tmp_path / "a")
    # What ends GPT-2's texts stands in the configuration of a smaller one, too.
    model = SimpleNamespace(model_type="gpt2", pad_token_id=50256, vocab_size=len(WORDS))
    assert tokenization_for(path, model).padding == WORDS.index("</s>")
    assert tokenization_for(path, SimpleNamespace(model_type="gpt2", pad_token_id=50256)).padding == 50256
    assert tokenization_for(path, SimpleNamespace(model_type="gpt2", pad_token_id=None, vocab_size=3)).padding == 0


def test_tokens_that_the_model_does_not_know_are_named(tmp_path: Path) -> None:
    model = SimpleNamespace(model_type="bert", vocab_size=WORDS.index("c"))
    tokenization = tokenization_for(save_encoder_tokenizer(tmp_path / "a"), model, 6)
    token_rows(make_data("text_classification", {"text": ["a", "b", "a b"]}), tokenization, skip=False)
    with pytest.raises(InputError, match=rf"^model\.path: text 1: .* makes token {WORDS.index('c')} of it"):
        token_rows(make_data("text_classification", {"text": ["a", "b c", "a"]}), tokenization, skip=False)


def test_the_model_and_its_tokenizer_limit_the_length(tmp_path: Path) -> None:
    path = save_encoder_tokenizer(tmp_path / "model", max_length=20)
    assert tokenization_for(path, MODEL).max_length == 20
    assert tokenization_for(path, MODEL, 7).max_length == 7
    assert tokenization_for(path, SimpleNamespace(model_type="bert", max_position_embeddings=16)).max_length == 16
    roberta = SimpleNamespace(model_type="roberta", max_position_embeddings=18, pad_token_id=1)
    assert tokenization_for(path, roberta).max_length == 16
    with pytest.raises(InputError, match=r"data\.max_length: found 21, expected at most the model's 20 tokens"):
        tokenization_for(path, MODEL, 21)
    unlimited = save_encoder_tokenizer(tmp_path / "unlimited", max_length=10**30)
    assert tokenization_for(unlimited, SimpleNamespace(model_type="llama")).max_length == 512


def test_a_model_without_a_tokenizer_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.path: found no tokenizer beside '.*empty': .*; expected one"):
        tokenization_for(str(tmp_path / "empty"), MODEL)


def test_texts_of_which_no_token_is_left_are_named_or_skipped(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.normalizer = normalizers.Replace("\u200b", "")
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(tmp_path)
    data = make_data("text_classification", {"text": ["a b", "\u200b", "a", "b"]})
    with pytest.raises(InputError, match=r"data\.root: cannot read text 1: found no text; expected a text with"):
        prepare(data, DataConfig(), str(tmp_path), MODEL)
    prepared = prepare(data, DataConfig(unreadable="skip"), str(tmp_path), MODEL)
    assert len(prepared.data) == 3
    inputs = prepared.train.inputs(torch.arange(len(prepared.train.domains)), CPU, torch.float32)
    assert inputs["attention_mask"].sum(1).min() > 0


@pytest.mark.parametrize(
    ("task", "save", "least"),
    [("text_classification", save_encoder_tokenizer, 3), ("causal_lm", save_decoder_tokenizer, 2)],
)
def test_there_must_be_room_for_a_word(tmp_path: Path, task: str, save: Callable[[Path], str], least: int) -> None:
    column = {"text": ["a b"] * 3} if task == "text_classification" else {"prompt": ["a"] * 3, "response": ["b"] * 3}
    path = save(tmp_path / "model")
    for length in range(1, least):
        with pytest.raises(InputError, match=rf"data\.max_length: found {length}, expected at least {least} for a "):
            prepare(make_data(task, column), DataConfig(max_length=length), path, MODEL)
    inputs, *_ = prepare(make_data(task, column), DataConfig(max_length=least), path, MODEL).train.batch(
        torch.tensor([0]), CPU, torch.float32
    )
    assert inputs["input_ids"].shape == (1, least)


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("task", ["text_classification", "causal_lm"])
def test_texts_lose_their_end_whatever_side_the_tokenizer_would_cut(tmp_path: Path, task: str) -> None:
    save = save_encoder_tokenizer if task == "text_classification" else save_decoder_tokenizer
    path = save(tmp_path / "model")
    edit_json(tmp_path / "model" / "tokenizer_config.json", truncation_side="left", padding_side="left")
    content = {"text": ["a b c d e f g", "a", "b"]}
    expected = "[CLS] a b c d [SEP]"
    if task == "causal_lm":
        content, expected = {"prompt": [""] * 3, "response": content["text"]}, "<s> a b c d e"
    found = token_rows(make_data(task, content), tokenization_for(path, MODEL, 6), skip=False)
    assert StoredRows.of_parts(found.parts, "ids").gather(torch.tensor([0]), CPU)[0].tolist() == tokens(expected)


def test_whatever_changes_the_tokens_makes_other_rows(tmp_path: Path) -> None:
    """Each change alone; the cache has the rows of those before it."""
    data = make_data("text_classification", {"text": ["A b", "c", "d"]})
    folder = tmp_path / "model"

    def first_row() -> list[int]:
        rows = token_rows(data, tokenization_for(str(folder), MODEL, 6), skip=False)
        assert rows.newly_cached == 3
        again = token_rows(data, tokenization_for(str(folder), MODEL, 6), skip=False)
        assert again.newly_cached == 0
        assert torch.equal(again.numbers("length"), rows.numbers("length"))
        return StoredRows.of_parts(rows.parts, "ids").gather(torch.tensor([0]), CPU)[0].tolist()

    save_encoder_tokenizer(folder)
    assert first_row() == tokens("[CLS] [UNK] b [SEP] [PAD] [PAD]")
    edit_json(folder / "tokenizer.json", normalizer={"type": "Lowercase"})
    assert first_row() == tokens("[CLS] a b [SEP] [PAD] [PAD]")
    edit_json(folder / "tokenizer.json", post_processor=None)
    assert first_row() == tokens("a b [PAD] [PAD] [PAD] [PAD]")
    # May matter or not: nothing can know what a class does with it.
    edit_json(folder / "tokenizer_config.json", some_setting=True)
    assert first_row() == tokens("a b [PAD] [PAD] [PAD] [PAD]")


def test_the_same_tokenizer_elsewhere_makes_nothing_anew(tmp_path: Path) -> None:
    data = make_data("text_classification", {"text": ["a b", "c", "d"]})
    paths = [save_encoder_tokenizer(tmp_path / name) for name in ("one", "other")]
    tokenizations = [tokenization_for(path, MODEL, 6) for path in paths]
    tokenizations[1].tokenizer(["a b c d"], truncation=True, max_length=3, padding="max_length")
    made = [token_rows(data, tokenization, skip=False).newly_cached for tokenization in tokenizations]
    assert made == [3, 0]


def test_rows_of_a_tokenizer_written_in_python_are_not_kept(tmp_path: Path) -> None:
    """Its merges, or whatever else it reads, may have changed without a trace."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({"<unk>": 0, "a@@": 1, "b": 2, "ab": 3, "c": 4}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CTRLTokenizer"}))
    data = make_data("text_classification", {"text": ["ab", "c", "c"]})

    def first_row(merges: str) -> list[int]:
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
        rows = token_rows(data, tokenization_for(str(folder), MODEL, 4), skip=False)
        assert rows.newly_cached is None
        return (
            StoredRows.of_parts(rows.parts, "ids")
            .gather(torch.tensor([0]), CPU)[0, : rows.numbers("length")[0]]
            .tolist()
        )

    assert first_row("a b</w>") == [3]
    assert first_row("a c</w>") == [1, 2]


def test_a_tokenizer_that_draws_its_tokens_is_refused(tmp_path: Path) -> None:
    path = save_byte_tokenizer(tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    edit_json(tmp_path / "tokenizer.json", model=stored["model"] | {"dropout": 0.1})
    with pytest.raises(InputError, match=r"^model\.path: found a tokenizer with a dropout of 0\.1 beside .*; expected"):
        tokenization_for(path, MODEL)
