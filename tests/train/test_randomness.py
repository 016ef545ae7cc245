"""Why a checkpoint holds no state of a random generator: training draws from none."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import tensor_parallel

from tests import ranks
from tests.helpers import run_ranks
from tests.layouts import Layout


def generators() -> list[Any]:
    streams = tensor_parallel.get_cuda_rng_tracker().get_states()
    states = {"torch": torch.get_rng_state(), **streams}
    return [random.getstate(), repr(np.random.get_state()), {k: ranks.digest(v) for k, v in states.items()}]


def before_and_after(layout: Layout) -> tuple[list[Any], list[Any]]:
    running = ranks.engine(layout)
    before = generators()
    ranks.train(running, layout, 0, 2)
    ranks.validate(running, layout)
    return before, generators()


@pytest.mark.parametrize("layout", [Layout(2), Layout(2, {"tp": 2, "recompute": "full"})], ids=["dp", "tp"])
def test_no_step_draws_a_random_number(layout: Layout) -> None:
    """SmolLM2 has no dropout; were there any, ranks would have to be given their streams back at a resume."""
    found = run_ranks(before_and_after, 2, layout)
    for before, after in found:
        assert before == after
    if layout.parallel:
        assert found[0][0][2] != found[1][0][2], "tensor-parallel ranks have streams of their own"
