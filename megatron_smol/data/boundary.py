"""Where a text may be cut without changing its ids: how data/encode.py tokenizes documents of any length.

A tokenizer splits text with a regular expression before it merges bytes, so ids never reach across such a
split. A cut is exact where (1) no match of the expression can hold both characters, and (2) the match on the
left ends there whatever follows. The expressions below look ahead only at the end of white space and never
look back; so both hold, in all of them,

- before a space that follows a character that is no white space, and
- between a letter and a digit or punctuation mark (the apostrophe, which begins contractions, is left alone);
- with a Digits(individual) splitter, also between two digits.

Tokenizers with another expression, a normalizer, or added tokens that such a cut could split are not cut.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

# Letters of scripts that are written without spaces, besides ASCII's.
_LETTER = r"[A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3]"
_PUNCTUATION = r"[0-9!\"#$%&()*+,\-./:;<=>?@\[\\\]^_`{|}~\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f]"
_BEFORE_SPACE = r"(?<=[!-~])(?= )|(?<=[\u4e00-\u9fff])(?= )"
_AFTER_LETTER = rf"(?<={_LETTER})(?={_PUNCTUATION})"
_BETWEEN_DIGITS = r"(?<=[0-9])(?=[0-9])"
_TAIL = 1 << 14  # characters at the end of a text that are searched first

# GPT-2's (SmolLM2's), in its two spellings, then Llama 3's and Qwen 2's.
_EXPRESSIONS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@dataclass(frozen=True)
class Cuts:
    """Places to cut a text, as a pattern of empty matches."""

    pattern: re.Pattern[str]

    def last(self, text: str, start: int = 0) -> int:
        """The last place from `start` on where `text` may be cut, or 0."""
        tail = max(start, len(text) - _TAIL)
        return self._last(text, tail) or (self._last(text, start) if tail > start else 0)

    def _last(self, text: str, start: int) -> int:
        place = 0
        for match in self.pattern.finditer(text, start):
            place = match.start()
        return place

    def all(self, text: str) -> list[int]:
        return [match.start() for match in self.pattern.finditer(text)]


def cuts_of(tokenizer: dict[str, Any]) -> Cuts | None:
    """The cuts of a tokenizer.json, or None when none are known to be exact."""
    splitters = tokenizer.get("pre_tokenizer") or {}
    parts = splitters.get("pretokenizers", []) if splitters.get("type") == "Sequence" else [splitters]
    if tokenizer.get("normalizer") is not None or not all(map(_is_known, parts)):
        return None
    if not any(map(_has_expression, parts)):
        return None
    digits = any(part["type"] == "Digits" and part.get("individual_digits") for part in parts)
    # Special tokens are text in raw data; the others are looked for before the expression is.
    added = [token for token in tokenizer.get("added_tokens", []) if not token.get("special")]
    if any(map(_reaches_out, added)):
        return None
    for places in ([_BEFORE_SPACE, _AFTER_LETTER, *([_BETWEEN_DIGITS] if digits else [])], [_BEFORE_SPACE]):
        cuts = Cuts(re.compile("|".join(places)))
        if not any(cuts.all(token["content"]) for token in added):
            return cuts
    return None


def _is_known(part: dict[str, Any]) -> bool:
    if part.get("type") == "ByteLevel":
        return not part.get("add_prefix_space")
    return part.get("type") == "Digits" or (part.get("type") == "Split" and _has_expression(part))


def _has_expression(part: dict[str, Any]) -> bool:
    if part.get("type") == "Split":
        isolated = part.get("behavior") == "Isolated" and not part.get("invert")
        return isolated and part.get("pattern", {}).get("Regex") in _EXPRESSIONS
    return part.get("type") == "ByteLevel" and part.get("use_regex", True) is True


def _reaches_out(token: dict[str, Any]) -> bool:
    return any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word"))
