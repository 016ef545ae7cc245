"""The loader: every layout reads the same rows, in the same places of the global batch."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from megatron_smol.data.batch import IGNORED
from megatron_smol.data.loader import GlobalBatch, Share, StageLoader, check_divisible, held_out
from megatron_smol.data.packing import ignored_labels, pack_source
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


@pytest.mark.parametrize("read_ahead", [0, 1, 5])
def test_how_far_it_reads_ahead_changes_nothing(
    plan: Plan, sources: dict[str, TokenSource], read_ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = StageLoader(plan.stages[0], plan.orders, sources, Share(0, 1), CPU, read_ahead)
    started: list[int] = []
    original = loader.batch

    def batch(step: int) -> GlobalBatch:
        started.append(step)
        return original(step)

    monkeypatch.setattr(loader, "batch", batch)
    batches = loader.batches(0)
    for step in range(plan.stages[0].end_step):
        found = next(batches)
        assert torch.equal(found.micro_batches[0].tokens, original(step).micro_batches[0].tokens)
        assert len(started) <= step + 1 + read_ahead, "never more batches in memory than asked for"
    assert next(batches, None) is None
    # A reader that stops early leaves no thread behind it.
    stopped = loader.batches(0)
    next(stopped)
    stopped.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.fixture
def packed(tiny: TinyRun) -> dict[str, TokenSource]:
    """The tiny run's sources, `web` packed for the windows of its first stages."""
    pack_source(tiny.data / "web", 32, tiny.folder / "web")
    paths = {"web": tiny.folder / "web", "code": tiny.data / "code", "maths": tiny.data / "maths"}
    return {name: load_source(path) for name, path in paths.items()}


def test_rows_of_a_packed_source_carry_no_loss_on_padding(
    tiny: TinyRun, packed: dict[str, TokenSource]
) -> None:
    recipe = load_recipe(tiny.recipe, [f"sources.web.path={tiny.folder / 'web'}"])
    plan = make_plan(recipe, {name: source.tokens for name, source in packed.items()})
    loader = StageLoader(plan.stages[0], plan.orders, packed, Share(0, 1), CPU)
    seen = set()
    for step in range(plan.stages[0].end_step):
        batch = loader.batch(step)
        labels = torch.cat([micro.labels for micro in batch.micro_batches])
        for row in range(len(labels)):
            name = batch.rows.names[batch.rows.source[row]]
            window = packed[name].read(int(batch.rows.window[row]) * 32, 33)
            ignored = np.zeros(32, bool)
            if name == "web":
                ignored = ignored_labels(window[None], packed[name].eod_id or 0)[0]
                assert ignored[-1], "the label over the seam"
            expected = np.where(ignored, IGNORED, window[1:].astype(np.int64))
            np.testing.assert_array_equal(labels[row].numpy(), expected)
            seen.add(name)
        assert all(micro.real_tokens == int(micro.loss_mask.sum()) for micro in batch.micro_batches)
    assert seen == {"web", "code"}
    with pytest.raises(
        UserError, match=r"'long' reads source 'web' in windows of 64, but it is packed for 32"
    ):
        StageLoader(plan.stage("long"), plan.orders, packed, Share(0, 1), CPU)


def test_held_out_windows_of_a_packed_source_lie_on_its_windows(packed: dict[str, TokenSource]) -> None:
    web = packed["web"]
    batches = held_out(web, 600, 32, 4, Share(0, 1), CPU)
    assert len(batches) == 4
    start = -(-(web.tokens - 600) // 32) * 32
    for i, batch in enumerate(batches):
        assert batch.tokens[0].tolist() == web.read(start + 32 * i, 32).tolist()
        assert batch.labels[0, -1] == IGNORED
    everything = held_out(web, 600, 32, 1000, Share(0, 1), CPU)
    assert len(everything) == (web.tokens - start - 1) // 32, "not one window too many"
