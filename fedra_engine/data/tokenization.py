"""Texts as tokens, made once ahead of training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fedra_engine.data.cache import MadeRows, Part, RowMaker, make_rows
from fedra_engine.data.domain_data import DomainData
from fedra_engine.runtime.errors import InputError, one_line
from fedra_engine.runtime.files import content_hash

if TYPE_CHECKING:
    from datasets import Dataset

LONGEST = 512
"""Tokens of a text, unless the configuration or the model sets another length."""
_AT_ONCE = 1000
_BYTES_AT_ONCE = 2**21
"""Most texts and, but for the last of these, bytes that are tokenized at a time; a token takes 100 bytes meanwhile."""
_FORMAT = 2
"""Goes up whenever the same texts would give other rows."""
_WHERE_FROM = ("name_or_path", "is_local", "local_files_only", "vocab_file", "tokenizer_file")
"""Settings of a tokenizer that say where it was found."""
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
    """How texts become rows of tokens.

    Attributes:
        tokenizer: of transformers.
        max_length: most tokens of a text.
        padding: the token that fills up rows; attention never sees it.
        vocabulary: how many tokens the model knows; None if it does not say.
    """

    tokenizer: Any
    max_length: int
    padding: int
    vocabulary: int | None = None


def tokenization_for(
    model_path: str | None, model_config: Any, max_length: int | None = None, tokenizer: Any = None
) -> Tokenization:
    """How texts become tokens of a model.

    Args:
        model_path: directory or hub name; None of a model that was handed over.
        model_config: the model's transformers configuration.
        max_length: longest text in tokens; what the model can take, but at most `LONGEST`, when None.
        tokenizer: of transformers; the one beside the model if not given.

    Raises:
        InputError: there is no tokenizer or one that draws its tokens, or the model cannot take so long a text.
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
    # Texts lose their end, whichever side the tokenizer's own configuration says.
    tokenizer.truncation_side = "right"
    settings = getattr(model_config, "get_text_config", lambda: model_config)()
    limit = _longest(tokenizer, settings)
    if max_length is not None and max_length > limit:
        raise InputError(f"data.max_length: found {max_length}, expected at most the model's {limit} tokens")
    # The model comes first: one that classifies a text by its last token knows it by what follows.
    paddings = (getattr(settings, "pad_token_id", None), tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    vocabulary = getattr(settings, "vocab_size", None)
    known = math.inf if vocabulary is None else vocabulary
    padding = next(token for token in paddings if token is not None and 0 <= token < known)
    return Tokenization(tokenizer, min(limit, LONGEST) if max_length is None else max_length, padding, vocabulary)


def token_rows(data: DomainData, tokenization: Tokenization, *, skip: bool) -> MadeRows:
    """Tokenize every text of `data`, or find it done.

    A text that is too long loses its end, though not the special tokens of a classified one, whatever the tokenizer's
    own configuration says. Of a prompt that takes more than half of the room the end stays, and a response loses what
    does not fit behind its prompt. A response ends with the tokenizer's end token.

    With `skip`, texts without tokens are left empty and noted.

    Returns:
        The columns `ids`, int32 [samples, max_length], filled up on the right; `length`, how many of them are not
        filling; and `prompt`, how many belong to the prompt.

    Raises:
        InputError: there is no room for a word; a text has a token that the model does not know; or, without `skip`, a
            text has no tokens.
    """
    # Of a text that is learnt, the first token is never predicted.
    special = 1 if data.task == "causal_lm" else tokenization.tokenizer.num_special_tokens_to_add()
    if tokenization.max_length <= special:
        raise InputError(
            f"data.max_length: found {tokenization.max_length}, expected at least {special + 1} for a "
            f"{data.task.replace('_', ' ')} sample of this tokenizer"
        )
    rows = make_rows(data, _TokenMaker(data, tokenization), skip=skip)
    known, start = tokenization.vocabulary, 0
    # Beyond the model's vocabulary are tokens of another model's tokenizer.
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
    # Tokenizers without a limit say 10^30.
    limits = [tokenizer.model_max_length, getattr(settings, "max_position_embeddings", None)]
    # RoBERTa and its kin count positions from behind the padding token.
    if settings.model_type in _POSITIONS_BEHIND_PADDING:
        limits[1] -= (settings.pad_token_id or 0) + 1
    return int(min(limit for limit in limits if limit is not None and limit > 0))


class _TokenMaker(RowMaker):
    """Makes rows of tokens."""

    what = "tokenizing texts"
    readable = "a text with words"

    def __init__(self, data: DomainData, tokenization: Tokenization) -> None:
        self._content = cast("Dataset", data.content)
        self._data = data
        self._tokenization = tokenization
        self.shapes: dict[str, tuple[int, ...]] = {"ids": (tokenization.max_length,), "length": (), "prompt": ()}
        self.row_bytes = 4 * (tokenization.max_length + 2)

    def identity(self, start: int, stop: int) -> str | None:
        if self._settings is None:
            return None
        return _digest(self._settings, [_digest(self._content[chunk]) for chunk in self._chunks(start, stop)])

    @cached_property
    def _settings(self) -> str | None:
        """Digest of all that decides the tokens of a text; None where that cannot be known.

        A tokenizer that is written in Python may read any file and use any other package.
        """
        import tokenizers
        import transformers

        tokenization = self._tokenization
        tokenizer = tokenization.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        # Every call sets these two anew; what the last one has set would make another state of the same tokenizer.
        backend.no_truncation()
        backend.no_padding()
        kind = type(tokenizer)
        settings = {name: value for name, value in tokenizer.init_kwargs.items() if name not in _WHERE_FROM}
        state = (
            (transformers.__version__, tokenizers.__version__, kind.__module__, kind.__qualname__),
            (backend.to_str(), tokenizer.special_tokens_map, tokenizer.truncation_side),
            sorted((name, repr(value)) for name, value in settings.items()),
        )
        return _digest(_FORMAT, self._data.task, tokenization.max_length, tokenization.padding, state)

    def make(self, start: int, stop: int, done: Callable[[int], object]) -> Part:
        matrix = np.full((stop - start, self._tokenization.max_length), self._tokenization.padding, dtype=np.int32)
        lengths, prompts = list[int](), list[int]()
        for chunk in self._chunks(start, stop):
            for ids, prompt in self._tokenize(self._content[chunk]):
                matrix[len(lengths), : len(ids)] = ids
                lengths.append(len(ids))
                prompts.append(prompt)
            done(chunk.stop - chunk.start)
        columns = {"ids": matrix, "length": np.array(lengths, np.int32), "prompt": np.array(prompts, np.int32)}
        return Part(columns, ["" if length else "found no text" for length in lengths])

    def _chunks(self, start: int, stop: int) -> Iterator[slice]:
        """Slices of texts that are in memory at a time."""
        import pyarrow.compute as pc

        texts = self._content.with_format("arrow")
        for first in range(start, stop, _AT_ONCE):
            last = min(first + _AT_ONCE, stop)
            sizes = sum(pc.fill_null(pc.binary_length(column), 0).to_numpy() for column in texts[first:last].columns)
            before = np.cumsum(sizes, dtype=np.int64) - sizes
            cuts = first + 1 + np.flatnonzero(np.diff(before // _BYTES_AT_ONCE))
            yield from (slice(*bounds) for bounds in pairwise([first, *cuts.tolist(), last]))

    def _tokenize(self, texts: dict[str, list[str]]) -> list[tuple[list[int], int]]:
        """The tokens of each sample, and how many of them are prompt."""
        tokenizer = self._tokenization.tokenizer
        if self._data.task == "causal_lm":
            prompts, responses = (
                tokenizer(texts[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "response")
            )
            return list(map(self._with_response, prompts, responses))
        words = [text or "" for text in texts["text"]]
        encoded = tokenizer(words, truncation=True, max_length=self._tokenization.max_length)["input_ids"]
        # Special tokens alone are no text.
        return [(ids if text.strip() else [], 0) for ids, text in zip(encoded, words, strict=True)]

    def _with_response(self, prompt: list[int], response: list[int]) -> tuple[list[int], int]:
        """Prompt and response together, cut."""
        tokenizer, longest = self._tokenization.tokenizer, self._tokenization.max_length
        # The start token, if the tokenizer has one, goes before the prompt only, and the end token after the response.
        start, end = ([] if token is None else [token] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))
        response = response + end
        room = max(longest - len(response), longest // 2) - len(start)
        # What begins every text stays.
        prompt = start + prompt[max(len(prompt) - room, 0) :]
        return (prompt + response)[:longest], len(prompt)

    def describe(self, row: int) -> str:
        return self._data.describe(row, "text")


def _digest(*values: object) -> str:
    return content_hash(json.dumps(values, default=repr).encode()).hexdigest()
