"""The step count of the real recipe: the loader of a run of millions of steps costs what that of a short one costs."""

from __future__ import annotations

import time
import tracemalloc

import pytest
import torch

from megatron_smol.data.loader import Share, StageLoader
from megatron_smol.recipe.load import load_recipe
from megatron_smol.recipe.plan import make_plan, resolve_sizes
from megatron_smol.train.run import open_sources
from tests.tiny import TinyRun

STEPS = 3_200_000


def cost(tiny: TinyRun, steps: int, first: int, count: int, memory: bool) -> tuple[float, float]:
    """(processor seconds a step, kilobytes at most) of the loader of a run of `steps`, read from step `first` on."""
    if memory:
        tracemalloc.start()
    recipe = load_recipe(tiny.recipe, [f"stages.two.until={steps} steps"])
    plan = make_plan(recipe, resolve_sizes(recipe))
    loader = StageLoader(
        plan.stage("two"), plan.orders, open_sources(recipe), Share(0, 1), torch.device("cpu")
    )
    rounds = []
    for _ in range(1 if memory else 7):
        began = time.process_time()
        for step in range(first, first + count):
            loader.batch(step)
        rounds.append((time.process_time() - began) / count)
    peak = tracemalloc.get_traced_memory()[1] / 1000 if memory else 0.0
    tracemalloc.stop()
    return min(rounds), peak


PLACES = {"start": 10, "middle": STEPS // 2, "end": STEPS - 1000}


def test_memory_does_not_depend_on_the_step(tiny: TinyRun) -> None:
    cost(tiny, 1000, 10, 10, memory=True)  # what is imported and cached once
    _, short = cost(tiny, 1000, 10, 100, memory=True)
    for place, first in PLACES.items():
        _, peak = cost(tiny, STEPS, first, 100, memory=True)
        assert peak < 1.1 * short, (place, peak, short)


@pytest.mark.faults
def test_time_does_not_depend_on_the_step(tiny: TinyRun) -> None:
    short, _ = cost(tiny, 1500, 10, 1000, memory=False)
    found = {
        place: cost(tiny, STEPS, first, 1000, memory=False)[0] / short for place, first in PLACES.items()
    }
    print(f"\nprocessor time of a step against a run of 1,500 steps ({short * 1e6:.0f} us): {found}")
    assert all(ratio < 1.1 for ratio in found.values()), found
