"""How often the stages of a training recipe would read a curated set; for its card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_smol.curate.config import Curation
from megatron_smol.errors import UserError


@dataclass(frozen=True)
class Reading:
    """What a recipe reads of one source. stages: (name, tokens read in it, tokens read by its end)."""

    recipe: str
    source: str
    stages: list[tuple[str, int, int]]

    def of(self, tokens: int) -> dict[str, Any]:
        """The same in epochs of a set of so many tokens."""
        size = max(1, tokens)
        rows = [
            {"stage": stage, "tokens": drawn, "epochs": drawn / size, "epochs_at_end": by_end / size}
            for stage, drawn, by_end in self.stages
        ]
        return {"recipe": self.recipe, "source": self.source, "tokens": tokens, "stages": rows}


def reading(config: Curation) -> Reading | None:
    """None when the curation names no recipe. UserError for one that says nothing about this set."""
    if config.epochs is None:
        return None
    if config.tokenizer is None:
        raise UserError("epochs are counted in tokens: set `tokenizer` too (--tokenizer)")
    from megatron_smol.recipe.load import load_recipe
    from megatron_smol.recipe.plan import make_plan, resolve_sizes

    recipe = load_recipe(config.epochs.recipe)
    source = config.epochs.source or config.name
    if source not in recipe.sources:
        raise UserError(
            f"recipe {config.epochs.recipe} has no source '{source}'; say which one this set stands for (--source): "
            f"{', '.join(recipe.sources)}"
        )
    stages = [
        (stage.name, stage.tokens_drawn(source), stage.tokens_after(source))
        for stage in make_plan(recipe, resolve_sizes(recipe)).stages
        if stage.tokens_drawn(source)
    ]
    return Reading(recipe.name, source, stages)
