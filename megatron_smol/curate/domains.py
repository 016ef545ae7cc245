"""Which domains hold the pages that are wanted: counted in one pass, all their pages read in the next (FineMath).

The first pass scores pages; its card task writes `domains.jsonl`: {"domain", "pages", "scores": {"0": n, ...}}. The
second names that file under `inputs.domains` and reads every page of the domains that pass the rule, also those
that the first pass did not have or scored low. A list without `scores` (the domains of another set) counts pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson
from pydantic import Field

from megatron_smol.curate.section import Section
from megatron_smol.data.records import parse
from megatron_smol.errors import UserError


class Domains(Section):
    """The rule. SmolLM2's paper: 10 pages of score 2; the data's own page: a tenth of the domain's pages."""

    files: tuple[Path, ...] = Field(
        min_length=1, description="domains.jsonl of an earlier pass, or a list like it"
    )
    min_score: int = Field(2, description="score from which a page counts")
    min_pages: int = Field(10, ge=1, description="pages that count, at least")
    min_share: float = Field(0.0, ge=0, le=1, description="their share of the domain's pages, at least")

    def chosen(self) -> frozenset[str]:
        """Domains that pass in any of the files. UserError when there are none."""
        found = frozenset(row["domain"] for file in self.files for row in _rows(file) if self._passes(row))
        if not found:
            raise UserError(
                f"no domain in {', '.join(map(str, self.files))} has {self.min_pages} pages of score {self.min_score} or more: "
                "nothing would be read; lower inputs.domains.min_pages or min_score"
            )
        return found

    def _passes(self, row: dict[str, Any]) -> bool:
        pages = int(row["pages"])
        scores = row.get("scores")
        counted = (
            pages if scores is None else sum(n for score, n in scores.items() if int(score) >= self.min_score)
        )
        return counted >= max(self.min_pages, self.min_share * pages)


def domain_of(url: object) -> str:
    return urlsplit(str(url or "")).netloc.lower()


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        raise UserError(
            f"no list of domains at {file}; an earlier pass over scored pages writes domains.jsonl"
        )
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                row = parse(line)
                yield {"domain": str(row["domain"]), "pages": int(row["pages"]), "scores": row.get("scores")}
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f'{file} line {number} is not {{"domain": ..., "pages": n}} ({error})'
                ) from None


def table(scores: dict[str, Counter[int]]) -> bytes:
    """Lines of domains.jsonl from the scores of each domain's pages; most pages first."""
    rows = sorted(scores.items(), key=lambda item: (-item[1].total(), item[0]))
    return b"".join(
        orjson.dumps(
            {"domain": domain, "pages": counts.total(), "scores": {str(k): counts[k] for k in sorted(counts)}}
        )
        + b"\n"
        for domain, counts in rows
    )
