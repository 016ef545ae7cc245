"""Filters that datatrove does not have, or not so that they work without a download."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.filters.url_filter import URLFilter
from datatrove.pipeline.formatters.base import BaseFormatter

from megatron_smol.curate.kept import FewDropped
from megatron_smol.errors import UserError

# Of SmolLM2's tokenizer: bytes without a token, and planes whose first byte has none (none of them is assigned).
_NO_TOKEN = re.compile("[\x04\x06\x13\x14\x16\x1d\U00040000-\U000bffff]")
_FEW_CHARACTERS = 20_000  # of a document are enough to tell its language


class UrlAllowed(URLFilter):
    """datatrove's, with the list of public suffixes that its package brings: no network, the same everywhere."""

    def __init__(self, lists: bool, extra_domains: tuple[str, ...], few: FewDropped) -> None:
        from tldextract import TLDExtract

        super().__init__(extra_domains=extra_domains, use_integrated_lists=lists, exclusion_writer=few)
        self.tldextractor = TLDExtract(suffix_list_urls=(), cache_dir=None)

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        return super().filter(document) if document.metadata.get("url") else (False, "no_url")


class LanguageOf(BaseFilter):
    """Writes `language` and `language_score`, keeps the languages asked for."""

    type, name = "filter", "language"

    def __init__(
        self, keep: tuple[str, ...], threshold: float, detector: str, model: Path | None, few: FewDropped
    ) -> None:
        super().__init__(exclusion_writer=few)
        if model is not None and not model.is_file():
            raise UserError(
                f"no language model at {model}; give lid.176.bin or lid.176.ftz, or leave `model` out"
            )
        self.keep, self.threshold, self.detector, self.model = keep, threshold, detector, model
        self._detect: Callable[[str], tuple[str, float]] | None = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self._detect is None:
            self._detect = _py3langid() if self.detector == "py3langid" else _fasttext(self.model)
        language, score = self._detect(doc.text[:_FEW_CHARACTERS])
        doc.metadata |= {"language": language, "language_score": round(score, 4)}
        if language not in self.keep:
            return False, f"language_{language}"
        return score >= self.threshold or (False, "language_unsure")


def _fasttext(model: Path | None) -> Callable[[str], tuple[str, float]]:
    """lid.176 by the file given, else as datatrove downloads it."""
    from datatrove.utils.lid import FT176LID
    from fasttext.FastText import _FastText

    loaded = _FastText(str(model)) if model is not None else FT176LID().model

    def detect(text: str) -> tuple[str, float]:
        labels, scores = loaded.predict(text.replace("\n", " "), k=1)
        return labels[0].removeprefix("__label__"), float(scores[0])

    return detect


def _py3langid() -> Callable[[str], tuple[str, float]]:
    from py3langid.langid import MODEL_DIR, MODEL_FILE, LanguageIdentifier

    loaded = LanguageIdentifier.from_model_file(MODEL_DIR / MODEL_FILE, norm_probs=True)

    def detect(text: str) -> tuple[str, float]:
        language, score = loaded.classify(text)
        return language, float(score)

    return detect


class LengthBetween(BaseFilter):
    type, name = "filter", "length"

    def __init__(
        self, least: int, most: int | None, least_tokens: int, tokenizer: str | None, few: FewDropped
    ) -> None:
        super().__init__(exclusion_writer=few)
        if least_tokens and not tokenizer:
            raise UserError(
                "length: min_tokens needs the tokenizer that counts them: set `tokenizer` beside it"
            )
        self.least, self.most, self.least_tokens, self.tokenizer = least, most, least_tokens, tokenizer
        self._loaded: Any = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        length = len(doc.text)
        if length < self.least:
            return False, "too_short"
        if self.most is not None and length > self.most:
            return False, "too_long"
        # A token is at least a character, but for few: no need to count those of a short text.
        if self.least_tokens and (length < self.least_tokens or self._tokens(doc.text) < self.least_tokens):
            return False, "too_few_tokens"
        return True

    def _tokens(self, text: str) -> int:
        if self._loaded is None:
            from megatron_smol.data.tokenizer import load_tokenizer

            assert self.tokenizer is not None
            self._loaded = load_tokenizer(self.tokenizer)
        return len(self._loaded.encode_batch([text])[0])


class Matching(BaseFilter):
    type, name = "filter", "match"

    def __init__(self, pattern: str, field: str, drop: bool, few: FewDropped) -> None:
        super().__init__(exclusion_writer=few)
        self.pattern, self.field, self.drop = re.compile(pattern), field, drop

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        text = doc.text if self.field == "text" else str(doc.metadata.get(self.field, ""))
        return (self.pattern.search(text) is not None) != self.drop or (False, "match")


class WithoutControl(BaseFormatter):
    """Removes characters that the tokenizer would drop, and counts them."""

    type, name = "clean", "control characters"

    def format(self, text: str) -> str:
        cleaned, count = _NO_TOKEN.subn("", text)
        if count:
            self.stat_update("characters_removed", value=count)
        return cleaned
