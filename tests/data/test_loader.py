"""The loader: every layout reads the same rows, in the same places of the global batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_smol.data.loader import Share, StageLoader, check_divisible, held_out
from megatron_smol.data.source import TokenSource, load_source
from megatron_smol.errors import UserError
from megatron_smol.recipe.load import load_recipe
from megatron_smol.recipe.plan import Plan, make_plan, resolve_sizes
from tests.tiny import TinyRun

CPU = torch.device("cpu")


@pytest.fixture
def plan(tiny: TinyRun) -> Plan:
    recipe = load_recipe(tiny.recipe)
    return make_plan(recipe, resolve_sizes(recipe))


@pytest.fixture
def sources(tiny: TinyRun) -> dict[str, TokenSource]:
    return {name: load_source(tiny.data / name) for name in ("web", "code", "maths")}


def tokens(plan: Plan, sources: dict[str, TokenSource], step: int, ranks: int) -> torch.Tensor:
    """The global batch put together from the shares of `ranks` data-parallel ranks."""
    loaders = [StageLoader(plan.stages[0], plan.orders, sources, Share(r, ranks), CPU) for r in range(ranks)]
    shares = [loader.batch(step).micro_batches for loader in loaders]
    return torch.cat([share[i].tokens for i in range(len(shares[0])) for share in shares])


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_global_batch_does_not_depend_on_the_ranks(
    plan: Plan, sources: dict[str, TokenSource], ranks: int
) -> None:
    for step in (0, 3):
        assert torch.equal(tokens(plan, sources, step, ranks), tokens(plan, sources, step, 1))
    assert not torch.equal(tokens(plan, sources, 0, ranks), tokens(plan, sources, 1, ranks))


def test_labels_are_the_next_tokens_of_the_source(plan: Plan, sources: dict[str, TokenSource]) -> None:
    stage = plan.stages[0]
    batch = StageLoader(stage, plan.orders, sources, Share(0, 1), CPU).batch(2)
    rows = batch.rows
    ids = torch.cat([torch.cat([m.tokens, m.labels[:, -1:]], 1) for m in batch.micro_batches]).numpy()
    for i in range(stage.global_batch):
        source = sources[rows.names[rows.source[i]]]
        start = int(rows.window[i]) * stage.seq_length
        np.testing.assert_array_equal(ids[i], source.read(start, stage.seq_length + 1))
    for micro in batch.micro_batches:
        assert torch.equal(micro.tokens[:, 1:], micro.labels[:, :-1])


def test_reading_ahead_gives_the_batches_in_order(plan: Plan, sources: dict[str, TokenSource]) -> None:
    loader = StageLoader(plan.stages[0], plan.orders, sources, Share(0, 1), CPU)
    ahead = list(loader.batches(2))
    assert len(ahead) == plan.stages[0].end_step - 2
    for step, batch in enumerate(ahead, start=2):
        assert torch.equal(batch.micro_batches[0].tokens, loader.batch(step).micro_batches[0].tokens)


def test_held_out_tokens_are_never_trained_on(plan: Plan, sources: dict[str, TokenSource]) -> None:
    held = plan.recipe.data.holdout_tokens
    for name, order in plan.orders.items():
        assert order.tokens == sources[name].tokens - held
        last_window_end = order.windows_per_epoch(32) * 32 + 1
        assert last_window_end <= sources[name].tokens - held
    batches = held_out(sources["web"], held, 32, 4, Share(0, 1), CPU)
    first = sources["web"].read(sources["web"].tokens - held, 32)
    assert len(batches) == 4 and np.array_equal(batches[0].tokens[0].numpy(), first)
    shares = [held_out(sources["web"], held, 32, 3, Share(rank, 2), CPU) for rank in range(2)]
    assert [len(share) for share in shares] == [2, 1], (
        "ranks may have unequal shares, and none of them overlaps"
    )


def test_a_document_mask_needs_an_end_of_document(tiny: TinyRun, sources: dict[str, TokenSource]) -> None:
    recipe = load_recipe(tiny.recipe, ["training.document_mask=true"])
    plan = make_plan(recipe, resolve_sizes(recipe))
    batch = StageLoader(plan.stages[0], plan.orders, sources, Share(0, 1), CPU).batch(0)
    assert all(micro.mask is not None for micro in batch.micro_batches)
    bare = {name: load_source(tiny.data / name / "shard-00000") for name in sources}
    with pytest.raises(UserError, match="end-of-document id"):
        StageLoader(plan.stages[0], plan.orders, bare, Share(0, 1), CPU)


def test_ranks_that_cannot_share_evenly(plan: Plan) -> None:
    with pytest.raises(UserError, match="3 data-parallel ranks cannot share evenly; allowed: 1, 2, 4"):
        check_divisible(plan.stages[0], 3)
