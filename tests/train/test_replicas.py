"""Copies of weights that nothing but a fault makes differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_smol.model.llama import named_global_parameters
from megatron_smol.train.replicas import differing_copies
from tests.helpers import run_ranks
from tests.layouts import Layout
from tests.ranks import engine, train

NORM, WEIGHT = "decoder.layers.3.input_layernorm.weight", "decoder.layers.1.mlp.linear_fc2.weight"


def flip(layout: Layout, rank: int, name: str) -> list[Any]:
    """Two steps, a look, one exponent bit of `name` flipped on `rank`, another look: both answers."""
    running = engine(layout)
    train(running, layout, 0, 2)
    before = differing_copies(running)
    if torch.distributed.get_rank() == rank:
        (weight,) = [p for n, p, _ in named_global_parameters(running.gpt) if n == name]
        weight.detach().view(torch.int32).view(-1)[5] ^= 1 << 24
    after = differing_copies(running)
    train(running, layout, 2, 3)
    return [before, [(row["rank"], row["parameter"], row["of"]) for row in after], differing_copies(running)]


@pytest.mark.parametrize(
    ("layout", "rank", "name", "found", "of", "stays"),
    [
        (Layout(3, {"distributed_optimizer": False}), 2, WEIGHT, [2], "data parallel", True),
        (Layout(2, {"tp": 2}), 1, NORM, [0, 1], "tensor parallel", True),
        (Layout(2), 1, WEIGHT, [0, 1], "data parallel", False),
    ],
    ids=["one of three", "a norm of two tensor-parallel ranks", "distributed optimizer"],
)
def test_a_flipped_bit_is_found(
    layout: Layout, rank: int, name: str, found: list[int], of: str, stays: bool
) -> None:
    """Of two copies nobody can say which is right. The distributed optimizer's next step overwrites what is not its own."""
    for before, after, next_step in run_ranks(flip, layout.ranks, layout, rank, name):
        assert before == []
        assert after == [(number, name, of) for number in found]
        assert bool(next_step) == stays or not stays
