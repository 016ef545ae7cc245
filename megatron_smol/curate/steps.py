"""The steps that a curation file may name, each with its parameters and their source; `build` makes datatrove's block.

Defaults are FineWeb's and SmolLM2's where they are public (datatrove examples/fineweb.py; SmolLM2 paper, section 3).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from megatron_smol.curate.kept import FewDropped
from megatron_smol.curate.section import Section


class Step(Section):
    """One entry of `steps`. `splits`: all documents must be known before the next step begins."""

    title: ClassVar[str]
    splits: ClassVar[bool] = False

    def build(self, few: FewDropped) -> Any:
        """datatrove's PipelineStep; `few` takes what it drops. Of steps that do not split."""
        raise NotImplementedError

    def keys(self) -> tuple[int, int, int, int]:
        """(ngram, bands, rows, seed) of `WriteKeys`; 0 bands: whole texts. Of steps that split."""
        raise NotImplementedError


class UrlFilter(Step):
    """Block lists of adult domains and words in the URL (datatrove's); documents without one go, with that reason."""

    title: ClassVar = "URL"
    lists: bool = Field(True, description="datatrove's block lists; false: extra_domains alone")
    extra_domains: tuple[str, ...] = ()

    def build(self, few: FewDropped) -> Any:
        from megatron_smol.curate.filters import UrlAllowed

        return UrlAllowed(self.lists, self.extra_domains, few)


class Language(Step):
    """By fastText's lid.176, as FineWeb, or by py3langid, whose model comes with its package."""

    title: ClassVar = "language"
    keep: tuple[str, ...] = ("en",)
    threshold: float = Field(0.65, ge=0, le=1, description="least score; FineWeb: 0.65")
    detector: Literal["fasttext", "py3langid"] = "fasttext"
    model: Path | None = Field(None, description="lid.176.bin or .ftz; absent: downloaded by datatrove")

    def build(self, few: FewDropped) -> Any:
        from megatron_smol.curate.filters import LanguageOf

        return LanguageOf(self.keep, self.threshold, self.detector, self.model, few)


class GopherRepetition(Step):
    """Repeated lines, paragraphs and n-grams (Rae et al. 2021, table A1)."""

    title: ClassVar = "Gopher repetition"

    def build(self, few: FewDropped) -> Any:
        from datatrove.pipeline.filters import GopherRepetitionFilter

        return GopherRepetitionFilter(exclusion_writer=few)


class GopherQuality(Step):
    """Length, mean word length, symbols, stop words (Rae et al. 2021)."""

    title: ClassVar = "Gopher quality"
    min_doc_words: int = 50
    max_doc_words: int = 100_000
    min_stop_words: int = 2

    def build(self, few: FewDropped) -> Any:
        from datatrove.pipeline.filters import GopherQualityFilter

        return GopherQualityFilter(**self.model_dump(), exclusion_writer=few)


class C4Quality(Step):
    """C4's line and page rules; FineWeb used them without the rule of terminal punctuation."""

    title: ClassVar = "C4 quality"
    filter_no_terminal_punct: bool = False

    def build(self, few: FewDropped) -> Any:
        from datatrove.pipeline.filters import C4QualityFilter

        return C4QualityFilter(**self.model_dump(), exclusion_writer=few)


class FineWebQuality(Step):
    """Lines without punctuation, duplicated and short lines (FineWeb)."""

    title: ClassVar = "FineWeb quality"

    def build(self, few: FewDropped) -> Any:
        from datatrove.pipeline.filters import FineWebQualityFilter

        return FineWebQualityFilter(exclusion_writer=few)


class Length(Step):
    """Documents by their length; the long-context subset of SmolLM2 kept documents of 8k tokens and more."""

    title: ClassVar = "length"
    min_characters: int = Field(0, ge=0)
    max_characters: int | None = None
    min_tokens: int = Field(0, ge=0, description="needs `tokenizer` in this step")
    tokenizer: str | None = None

    def build(self, few: FewDropped) -> Any:
        from megatron_smol.curate.filters import LengthBetween

        return LengthBetween(self.min_characters, self.max_characters, self.min_tokens, self.tokenizer, few)


def _compiles(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"'{value}' is no regular expression: {error}") from None
    return value


Regex = Annotated[str, AfterValidator(_compiles)]


class Match(Step):
    """Keeps documents whose text (or a metadata field) matches a regular expression, or drops them."""

    title: ClassVar = "match"
    pattern: Regex
    field: str = "text"
    drop: bool = False

    def build(self, few: FewDropped) -> Any:
        from megatron_smol.curate.filters import Matching

        return Matching(self.pattern, self.field, self.drop, few)


class Score(Step):
    """Keeps documents whose score is `keep` or more: of a classifier (`smol classifier`), or one that the input has.

    FineWeb-Edu and FineMath keep 3 of 5, FineMath-4+ keeps 4, Stack-Edu 3 (Java 2), all of the rounded score.
    """

    title: ClassVar = "score"
    keep: float = 3.0
    keep_of: dict[str, float] = Field(
        default_factory=dict, description="for some values of `by` another `keep`"
    )
    rounded: bool = Field(
        True, description="compare the score rounded to a whole number (int_score on the hub)"
    )
    model: Path | None = Field(
        None, description="folder of a classifier; absent: the documents' field is taken as it is"
    )
    field: str = "score"
    by: str | None = Field(
        None,
        description="field whose value says which classifier: MODEL/VALUE, such as `language` for Stack-Edu",
    )
    without_model: tuple[str, ...] = Field(
        (), description="values of `by` that are kept unscored (Stack-Edu: HTML)"
    )

    @model_validator(mode="after")
    def _can_be_met(self) -> Score:
        uneven = [value for value in (self.keep, *self.keep_of.values()) if self.rounded and value % 1]
        if uneven:
            raise ValueError(
                f"keep {uneven[0]:g} is no whole number, and scores are rounded: set rounded: false"
            )
        if (self.keep_of or self.without_model) and self.by is None:
            raise ValueError("keep_of and without_model go by a field: set `by`, such as by: language")
        return self

    def build(self, few: FewDropped) -> Any:
        from megatron_smol.curate.scoring import ScoreAtLeast

        return ScoreAtLeast(self, few)


class Sample(Step):
    """Keeps a share of the documents of each score; the choice hangs on the document and the seed only.

    The small models' web data dropped score 0 of DCLM and down-sampled 1 and 2 (SmolLM2 paper, section 6; the shares
    are not public).
    """

    title: ClassVar = "sample"
    shares: dict[int, float] = Field(description="share that stays, by whole score; scores not named stay")
    field: str = "score"
    seed: int = 0

    @field_validator("shares")
    @classmethod
    def _are_shares(cls, value: dict[int, float]) -> dict[int, float]:
        if wrong := [share for share in value.values() if not 0 <= share <= 1]:
            raise ValueError(f"a share is from 0 to 1, found {wrong[0]:g}")
        return value

    def build(self, few: FewDropped) -> Any:
        from megatron_smol.curate.scoring import Sampled

        return Sampled(self, few)


class Clean(Step):
    """Removes control characters that SmolLM2's vocabulary lacks and U+40000 to U+BFFFF, which lose bytes in it."""

    title: ClassVar = "control characters"

    def build(self, few: FewDropped) -> Any:
        from megatron_smol.curate.filters import WithoutControl

        return WithoutControl()


class Pii(Step):
    """E-mail addresses and public IP addresses are replaced, as in FineWeb."""

    title: ClassVar = "personal data"

    def build(self, few: FewDropped) -> Any:
        from datatrove.pipeline.formatters import PIIFormatter

        return PIIFormatter()


class MinHash(Step):
    """Near duplicates over word n-grams; FineWeb: 14 bands of 8 rows; FineMath: one band of 10."""

    title: ClassVar = "near duplicates"
    splits: ClassVar = True
    ngram: int = Field(5, ge=1, le=64)
    bands: int = Field(14, ge=1, le=1024)
    rows: int = Field(8, ge=1, le=1024)
    seed: int = Field(0, ge=0)

    def keys(self) -> tuple[int, int, int, int]:
        return self.ngram, self.bands, self.rows, self.seed


class Exact(Step):
    """Documents that are equal up to white space."""

    title: ClassVar = "exact duplicates"
    splits: ClassVar = True

    def keys(self) -> tuple[int, int, int, int]:
        return 1, 0, 0, 0


class Decontaminate(Step):
    """Benchmark items; FineMath: 13-grams, then a longest common subsequence of 0.6 of the item."""

    title: ClassVar = "contamination"
    files: tuple[str, ...]
    fields: tuple[str, ...] = ("question",)
    ngram: int = Field(13, ge=3)
    ratio: float = Field(0.6, gt=0, le=1)

    def build(self, few: FewDropped) -> Any:
        from megatron_smol.curate.contamination import Decontaminate as Filter

        return Filter(self.files, self.fields, self.ngram, self.ratio, few)


STEPS: dict[str, type[Step]] = {
    "url_filter": UrlFilter,
    "language": Language,
    "gopher_repetition": GopherRepetition,
    "gopher_quality": GopherQuality,
    "c4_quality": C4Quality,
    "fineweb_quality": FineWebQuality,
    "length": Length,
    "match": Match,
    "score": Score,
    "sample": Sample,
    "clean": Clean,
    "pii": Pii,
    "minhash": MinHash,
    "exact": Exact,
    "decontaminate": Decontaminate,
}
