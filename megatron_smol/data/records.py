"""One JSON record to the strings of its document, shared by data/reading.py and data/longtext.py."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import orjson

# The strings of one document: one, or several when the input is split into sentences already.
Document = list[str]


def parse(line: bytes) -> Any:
    """One JSON value. Raises ValueError with the reason."""
    with suppress(ValueError):  # stricter than json, e.g. about lone surrogates: then json decides
        return orjson.loads(line)
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not one JSON object ({error.msg} at character {error.pos + 1:,})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start + 1:,})") from None


def texts_of(record: Any, json_key: str) -> Document:
    """The strings under the key. Raises ValueError with the reason."""
    if not isinstance(record, dict):
        raise ValueError(f"expected one JSON object a line, found a {type(record).__name__}")
    if json_key not in record:
        raise ValueError(f"no key '{json_key}'; found: {', '.join(list(record)[:12]) or 'none'}")
    return strings_of(record[json_key], f"key '{json_key}'")


def strings_of(value: Any, where: str) -> Document:
    if isinstance(value, str):
        return [value]
    if value is None:
        return []
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return value
    raise ValueError(f"{where} holds a {type(value).__name__}; expected text, or a list of texts")
