"""Sentence splitting with nltk for `--split-sentences`: each sentence becomes a sequence of its document."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from megatron_smol.errors import UserError

Splitter = Callable[[str], list[str]]


def sentence_splitter(language: str, keep_newlines: bool) -> Splitter:
    """nltk's punkt model for a language, which must be on this machine already.

    With `keep_newlines` a sentence keeps the white space after it, so that joining gives the text back.
    """
    try:
        from nltk.tokenize import PunktTokenizer
    except ImportError:
        raise UserError("--split-sentences needs nltk: pip install 'megatron-smol[text]'") from None
    try:
        punkt = PunktTokenizer(language)
    except LookupError:
        raise UserError(
            f"--split-sentences needs nltk's sentence model for '{language}', which is not on this "
            "machine; get it with: python -m nltk.downloader punkt_tab (and set NLTK_DATA when it lies "
            "elsewhere)"
        ) from None

    def split(text: str) -> list[str]:
        spans = list(punkt.span_tokenize(text))
        return list(_with_gaps(text, spans) if keep_newlines else (text[start:stop] for start, stop in spans))

    return split


def _with_gaps(text: str, spans: list[tuple[int, int]]) -> Iterator[str]:
    starts = [0, *(start for start, _ in spans[1:]), len(text)]
    for start, stop in itertools.pairwise(starts):
        yield text[start:stop]
