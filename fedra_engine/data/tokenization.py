"""Tokenization of all texts ahead of training."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from itertools import pairwise
from operator import eq
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from fedra_engine.data.cache import MadeRows, Part, RowMaker, make_rows
from fedra_engine.data.domain_data import DomainData
from fedra_engine.runtime.errors import InputError, one_line, shown
from fedra_engine.runtime.files import content_hash

if TYPE_CHECKING:
    from datasets import Dataset

LONGEST = 512
"""Default length of texts in tokens, unless the model takes less."""
_AT_ONCE = 1000
_BYTES_AT_ONCE = 2**21
"""A chunk to tokenize ends after this many texts or bytes; a token takes 100 bytes meanwhile."""
_FORMAT = 3
"""Version of the tokenization, part of every cache key; to be raised when the same texts give other rows."""
_WHERE_FROM = ("name_or_path", "is_local", "local_files_only", "vocab_file", "tokenizer_file")
"""Settings of a tokenizer that say where it was loaded from."""
_TODAY = date(2024, 7, 26)
"""The date for chat templates that write today's; Llama's templates write this one where there is no clock."""
_WRITES_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_POSITIONS_BEHIND_PADDING = (
    "camembert",
    "data2vec-text",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


@dataclass(frozen=True)
class Tokenization:
    """A tokenizer and its settings.

    Attributes:
        tokenizer: of transformers.
        max_length: maximum tokens of a text.
        padding: the padding token, which attention masks.
        vocabulary: size of the model's vocabulary; None if unknown.
    """

    tokenizer: Any
    max_length: int
    padding: int
    vocabulary: int | None = None


def tokenization_for(
    model_path: str | None, model_config: Any, max_length: int | None = None, tokenizer: Any = None
) -> Tokenization:
    """The tokenization for a model.

    Args:
        model_path: directory or hub name; None for a model in memory.
        model_config: the model's transformers configuration.
        max_length: default: the model's limit, but at most `LONGEST`.
        tokenizer: of transformers; default: the one at `model_path`.

    Raises:
        InputError: there is no tokenizer, it is random (BPE dropout), or `max_length` is above the model's limit.
    """
    if tokenizer is None and model_path is None:
        raise InputError("processor: found none beside a model in memory, expected its tokenizer")
    if tokenizer is None:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(model_path)
        except Exception as error:  # Whatever a file can make transformers raise.
            raise InputError(
                f"model.path: found no tokenizer beside {model_path!r}: {one_line(error)}; expected one"
            ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if dropout := getattr(getattr(backend, "model", None), "dropout", None):
        raise InputError(
            f"model.path: found a tokenizer with a dropout of {dropout:g} beside {model_path!r}, which makes other "
            "tokens of a text each time; expected one without"
        )
    # Whatever the tokenizer's own configuration says.
    tokenizer.truncation_side = "right"
    settings = getattr(model_config, "get_text_config", lambda: model_config)()
    limit = _longest(tokenizer, settings)
    if max_length is not None and max_length > limit:
        raise InputError(f"data.max_length: found {max_length}, expected at most the model's {limit} tokens")
    # The model's comes first: if it classifies a text by its last token, it finds that by its own padding token.
    paddings = (getattr(settings, "pad_token_id", None), tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    vocabulary = getattr(settings, "vocab_size", None)
    known = math.inf if vocabulary is None else vocabulary
    padding = next(token for token in paddings if token is not None and 0 <= token < known)
    return Tokenization(tokenizer, min(limit, LONGEST) if max_length is None else max_length, padding, vocabulary)


def token_rows(data: DomainData, tokenization: Tokenization, *, skip: bool) -> MadeRows:
    """Tokenize every text of `data`, or read its tokens from the cache.

    Long texts to classify are truncated on the right, but keep the special tokens. For causal language models a row is
    the prompt, the response and the end token, or a conversation in the tokenizer's chat template. If they are too
    long, the prompt loses its beginning (but not a start token) down to half of `max_length`, then the response its
    end.

    With `skip`, texts without tokens, and conversations that the template refuses, are left empty and noted in
    `skipped`.

    Returns:
        The columns `ids`, int32 [samples, max_length], padded on the right; `length`, the number of tokens without
        padding; and `prompt`, the number of tokens of the prompt.

    Raises:
        InputError: `max_length` has no room for a word, a text has a token outside the model's vocabulary, the
            tokenizer has no chat template for conversations or one that cannot be used, or, without `skip`, a text has
            no tokens or a conversation is refused.
    """
    # A causal language model does not predict the first token.
    special = 1 if data.task == "causal_lm" else tokenization.tokenizer.num_special_tokens_to_add()
    if tokenization.max_length <= special:
        raise InputError(
            f"data.max_length: found {tokenization.max_length}, expected at least {special + 1} for a "
            f"{data.task.replace('_', ' ')} sample of this tokenizer"
        )
    if _is_chat(data) and not getattr(tokenization.tokenizer, "chat_template", None):
        raise InputError(
            "model.path: found a tokenizer without a chat template with data.columns.messages, expected one with it"
        )
    rows = make_rows(data, _TokenMaker(data, tokenization), skip=skip)
    known, start = tokenization.vocabulary, 0
    # The tokenizer may belong to another model.
    if known is not None and max(tokenization.tokenizer.get_vocab().values()) >= known:
        for part in rows.parts:
            ids = part.columns["ids"]
            if len(unknown := np.flatnonzero((ids >= known).any(axis=1))):
                raise InputError(
                    f"model.path: {data.describe(start + unknown[0], 'text')}: the tokenizer beside the model makes "
                    f"token {ids[unknown[0]].max()} of it, expected tokens below {known}, the model's vocabulary"
                )
            start += len(ids)
    return rows


def _longest(tokenizer: Any, settings: Any) -> int:
    # 10^30 for tokenizers without a limit.
    limits = [tokenizer.model_max_length, getattr(settings, "max_position_embeddings", None)]
    # RoBERTa and related models count positions from the padding token on.
    if settings.model_type in _POSITIONS_BEHIND_PADDING:
        limits[1] -= (settings.pad_token_id or 0) + 1
    return int(min(limit for limit in limits if limit is not None and limit > 0))


def _dated_template(tokenizer: Any) -> str:
    """The tokenizer's chat template with a fixed date in place of today's, so that it writes the same every day.

    Raises:
        InputError: it has several templates and no default, or one that asks for the time in a way not known here.
    """
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise InputError(
            f"model.path: found several chat templates and no default ({one_line(error)}), expected a default"
        ) from error
    # transformers has no option for the time that a template is told.
    dated = _WRITES_TODAY.sub(lambda call: call[1] + _TODAY.strftime(call[2]) + call[1], template)
    if asks := re.search(r"strftime_now\s*\([^)]{,40}\)?", dated):
        raise InputError(
            f"model.path: found {shown(asks[0])} in the tokenizer's chat template, which would write other texts "
            "tomorrow; expected a format in quotes there"
        )
    return dated


class _Row(NamedTuple):
    """Tokens of a sample, number of those of its prompt, and why there are none, where that is known."""

    ids: list[int]
    prompt: int = 0
    error: str = ""


class _TokenMaker(RowMaker):
    what = "tokenizing texts"

    def __init__(self, data: DomainData, tokenization: Tokenization) -> None:
        self._content = cast("Dataset", data.content)
        self._data = data
        self._tokenization = tokenization
        self._template = _dated_template(tokenization.tokenizer) if _is_chat(data) else None
        self.readable = (
            "a text with words" if self._template is None else "a conversation that the chat template can write"
        )
        self.shapes: dict[str, tuple[int, ...]] = {"ids": (tokenization.max_length,), "length": (), "prompt": ()}
        self.row_bytes = 4 * (tokenization.max_length + 2)

    def identity(self, start: int, stop: int) -> str | None:
        if self._settings is None:
            return None
        return _digest(self._settings, [_digest(self._content[chunk]) for chunk in self._chunks(start, stop)])

    @cached_property
    def _settings(self) -> str | None:
        """Digest of everything that determines the tokens of a text.

        None for a tokenizer written in Python, which may depend on any file or package.
        """
        import tokenizers
        import transformers

        tokenization = self._tokenization
        tokenizer = tokenization.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        # Every call sets these two, so what the last call set must not be part of the digest.
        backend.no_truncation()
        backend.no_padding()
        kind = type(tokenizer)
        settings = {name: value for name, value in tokenizer.init_kwargs.items() if name not in _WHERE_FROM}
        state = (
            (transformers.__version__, tokenizers.__version__, kind.__module__, kind.__qualname__),
            (backend.to_str(), tokenizer.special_tokens_map, tokenizer.truncation_side),
            sorted((name, repr(value)) for name, value in settings.items()),
            self._template,
        )
        return _digest(_FORMAT, self._data.task, tokenization.max_length, tokenization.padding, state)

    def make(self, start: int, stop: int, done: Callable[[int], object]) -> Part:
        matrix = np.full((stop - start, self._tokenization.max_length), self._tokenization.padding, dtype=np.int32)
        lengths, prompts, errors = list[int](), list[int](), list[str]()
        for chunk in self._chunks(start, stop):
            for row in self._tokenize(self._content[chunk]):
                matrix[len(lengths), : len(row.ids)] = row.ids
                lengths.append(len(row.ids))
                prompts.append(row.prompt)
                errors.append(row.error or ("" if row.ids else "found no text"))
            done(chunk.stop - chunk.start)
        columns = {"ids": matrix, "length": np.array(lengths, np.int32), "prompt": np.array(prompts, np.int32)}
        return Part(columns, errors)

    def _chunks(self, start: int, stop: int) -> Iterator[slice]:
        """The rows start…stop-1 in chunks of bounded size."""
        import pyarrow.compute as pc

        texts = self._content.with_format("arrow")
        for first in range(start, stop, _AT_ONCE):
            last = min(first + _AT_ONCE, stop)
            sizes = sum(pc.fill_null(pc.binary_length(column), 0).to_numpy() for column in texts[first:last].columns)
            before = np.cumsum(sizes, dtype=np.int64) - sizes
            cuts = first + 1 + np.flatnonzero(np.diff(before // _BYTES_AT_ONCE))
            yield from (slice(*bounds) for bounds in pairwise([first, *cuts.tolist(), last]))

    def _tokenize(self, texts: dict[str, list[str]]) -> list[_Row]:
        tokenizer = self._tokenization.tokenizer
        if _is_chat(self._data):
            return self._conversations(texts)
        if self._data.task == "causal_lm":
            parts = (texts["prompt"], texts["response"])
            prompts, responses = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
            tokens = (tokenizer.bos_token_id, tokenizer.eos_token_id)
            start, end = ([] if token is None else [token] for token in tokens)
            return [
                self._with_response(start + one, other + end, len(start))
                for one, other in zip(prompts, responses, strict=True)
            ]
        words = [text or "" for text in texts["text"]]
        encoded = tokenizer(words, truncation=True, max_length=self._tokenization.max_length)["input_ids"]
        # Special tokens alone are no text.
        return [_Row(ids if text.strip() else []) for ids, text in zip(encoded, words, strict=True)]

    def _conversations(self, texts: dict[str, list[str]]) -> list[_Row]:
        """Of each conversation; what is before its last answer is the prompt."""
        tokenizer = self._tokenization.tokenizer
        written = [self._in_template(*pair) for pair in zip(texts["messages"], texts["response"], strict=True)]
        *parts, errors = (list(part) for part in zip(*written, strict=True))
        prompts, wholes = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
        start, rows = [tokenizer.bos_token_id], []
        for prompt, ids, error in zip(prompts, wholes, errors, strict=True):
            # An answer's first token depends on what is before it, and may even begin there: then all of it is learnt.
            begin = [*map(eq, prompt, ids), False].index(False)
            row = self._with_response(ids[:begin], ids[begin:], kept=int(ids[:1] == start))
            rows.append(row._replace(error=error))
        return rows

    def _in_template(self, messages: str, response: str) -> tuple[str, str, str]:
        """A conversation up to its last answer, and all of it, as the chat template writes them; or why it does not."""
        from jinja2 import TemplateSyntaxError

        before, answer = json.loads(messages), {"role": "assistant", "content": response}
        write = partial(self._tokenization.tokenizer.apply_chat_template, chat_template=self._template, tokenize=False)
        try:
            prompt: str = write(before, add_generation_prompt=True)
            whole: str = write([*before, answer])
        except (ImportError, TemplateSyntaxError) as error:
            raise InputError(
                f"model.path: cannot use the tokenizer's chat template: {one_line(error)}; expected one that works"
            ) from error
        except Exception as error:  # Whatever a template can raise.
            return "", "", f"the tokenizer's chat template refuses it ({one_line(error)})"
        if not whole.startswith(prompt):
            return "", "", "the tokenizer's chat template writes its answer otherwise than it begins one"
        return prompt, whole, ""

    def _with_response(self, prompt: list[int], response: list[int], kept: int) -> _Row:
        """Prompt and response as one truncated row; the first tokens of the prompt are `kept`."""
        longest = self._tokenization.max_length
        room = max(longest - len(response), longest // 2) - kept
        prompt = prompt[:kept] + prompt[max(len(prompt) - room, kept) :]
        return _Row((prompt + response)[:longest], len(prompt))

    def describe(self, row: int) -> str:
        return self._data.describe(row, "text")


def _is_chat(data: DomainData) -> bool:
    return data.task == "causal_lm" and "messages" in cast("Dataset", data.content).column_names


def _digest(*values: object) -> str:
    return content_hash(json.dumps(values, default=repr).encode()).hexdigest()
