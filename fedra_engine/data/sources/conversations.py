"""Conversations as samples of a causal language model: the messages before the last answer, and that answer."""

from __future__ import annotations

import json
from typing import Any

from fedra_engine.data.domain_data import SampleSource, is_missing
from fedra_engine.runtime.errors import InputError, shown


def conversation(messages: Any, column: str, source: SampleSource, given_as: str) -> list[str]:
    """The messages before the last, as JSON, and the last one, an answer of the assistant.

    Args:
        messages: of a row: a list of mappings with the texts `role` and `content`.
        column: where they stand.
        source: the row.
        given_as: the option or argument that named the samples, for messages.

    Raises:
        InputError: they are no conversation that ends with an answer.
    """
    place = f"{given_as}: {source}"
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{place}: found {shown(messages)} in column {column!r}, expected a list of messages")
    plain = list[dict[str, str]]()
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise InputError(
                f"{place}: found {shown(message)} in column {column!r}, expected a message with the texts role and "
                "content"
            )
        plain.append({"role": role, "content": content})
    *before, answer = plain
    if answer["role"] != "assistant" or is_missing(answer["content"]):
        raise InputError(
            f"{place}: found {shown(answer)} at the end of column {column!r}, expected an answer of the assistant"
        )
    return [json.dumps(before, ensure_ascii=False), answer["content"]]
