"""What all generators share: how a model draws its words, and that it is named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from megatron_smol.curate.chat.rows import Outcome
from megatron_smol.curate.chat.tools import Tools
from megatron_smol.curate.section import Section


class Sampling(Section):
    """As the API names it; what is left out is the model's own."""

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(1024, gt=0)

    def payload(self, seed: int) -> dict[str, Any]:
        return self.model_dump() | {"seed": seed}


class Generator(Section):
    """Where the rows of a part come from."""

    model: str = Field(description="name of one of `models`")

    def outcomes(self, tools: Tools) -> Iterator[Outcome]:
        """Rows, and those that could not be made with the reason; in the same order in every run."""
        raise NotImplementedError

    def models(self) -> list[str]:
        """Names that must be among `models`."""
        return [self.model]
