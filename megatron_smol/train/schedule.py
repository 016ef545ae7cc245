"""Learning rates as pure functions of tokens; `recipe.plan` puts them on stages, the trainer asks the plan.

A step uses the rate at the tokens consumed before it, as nanotron and Megatron do: the first step of a
warm-up has rate 0. Boundaries are tokens, so that a change of batch size moves no boundary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi, sqrt

# What is left of the way to go at each fraction of a decay: 1 at its start, exactly 0 at its end. A new shape
# is one line here and one name in recipe.schema.Shape.
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + cos(pi * x)) / 2,
    "1-sqrt": lambda x: 1 - sqrt(x),
}


def glide(start: float, end: float, fraction: float, shape: str) -> float:
    """From `start` at fraction 0 to `end` at fraction 1, exact at both ends."""
    left = SHAPES[shape](min(max(fraction, 0.0), 1.0))
    return left * start + (1 - left) * end


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warm-up from 0, constant at `peak`, then decay to `final`. All boundaries in tokens."""

    peak: float
    warmup: int
    decay_start: int | None
    decay_end: int | None
    shape: str
    final: float

    def __call__(self, tokens: int) -> float:
        """The rate of the step that starts after `tokens` tokens."""
        if tokens < self.warmup:
            return self.peak * (tokens / self.warmup)
        if self.decay_start is None or self.decay_end is None or tokens <= self.decay_start:
            return self.peak
        fraction = (tokens - self.decay_start) / max(self.decay_end - self.decay_start, 1)
        return glide(self.peak, self.final, fraction, self.shape)


@dataclass(frozen=True)
class StageDecay:
    """A stage's own rate: from `start` to `end` over its tokens."""

    start: float
    end: float
    start_tokens: int
    end_tokens: int
    shape: str

    def __call__(self, tokens: int) -> float:
        """The rate of the step that starts after `tokens` tokens of the lineage."""
        fraction = (tokens - self.start_tokens) / (self.end_tokens - self.start_tokens)
        return glide(self.start, self.end, fraction, self.shape)


Schedule = WarmupStableDecay | StageDecay
