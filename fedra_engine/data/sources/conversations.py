"""Conversations as samples of a causal language model: the messages before the last answer, and that answer."""

from __future__ import annotations

import json
from typing import Any

from fedra_engine.data.domain_data import SampleSource, is_missing
from fedra_engine.runtime.errors import InputError, shown


def conversation(messages: Any, column: str, source: SampleSource, given_as: str) -> list[str]:
    """The messages before the last, as JSON, and the last one, an answer of the assistant.

    Both are empty if there is no such answer or nothing before it.

    Args:
        messages: of a row: a list of mappings with the texts `role` and `content`, or a missing value.
        column: where they stand.
        source: the row.
        given_as: the option or argument that named the samples, for messages.

    Raises:
        InputError: it is no list of such mappings.
    """
    place = f"{given_as}: {source}"
    if is_missing(messages):
        return ["", ""]
    if not isinstance(messages, list):
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
    if len(plain) < 2 or plain[-1]["role"] != "assistant":
        return ["", ""]
    return [json.dumps(plain[:-1], ensure_ascii=False), plain[-1]["content"]]
