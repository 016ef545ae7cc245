"""Numbers that go wrong in real runs of two ranks: what is applied, what is remembered, and what a person reads."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.data.inspect import batch_of_step, read_rows
from megatron_smol.data.ledger import Ledger
from megatron_smol.recipe.load import load_recipe
from megatron_smol.recipe.plan import make_plan, resolve_sizes
from megatron_smol.train.guard import Guard
from megatron_smol.train.pulse import COMPUTING, SAVING, Pulse
from megatron_smol.train.spikes import Window
from tests.tiny import TinyRun, rows, write_recipe
from tests.train.faulty import Fault, errors, incidents, run, tensors

LAST = "long-00000013"
SHORT = ("eval.windows_per_source=0", "guard.straggler_every=0")  # a busy machine makes stragglers
SKIP = (*SHORT, "guard.non_finite=skip")


@pytest.fixture
def other(tiny_data: Path, tmp_path: Path) -> TinyRun:
    """A second run of the same recipe, to compare with."""
    folder = tmp_path / "other"
    folder.mkdir()
    return TinyRun(write_recipe(tiny_data, folder), tiny_data, folder)


def skip_steps(**steps: list[list[int]]) -> str:
    return f"guard.skip_steps={json.dumps(steps)}"


def ledger(tiny: TinyRun) -> Ledger:
    return Ledger.from_json(json.loads((tiny.run / "ledger.json").read_text()))


def trained_rows(tiny: TinyRun) -> list[dict[str, Any]]:
    """Metrics without what is not there or not a number where a step was skipped."""
    return [
        {k: v for k, v in row.items() if row.get("applied", True) or k not in ("loss", "grad_norm")}
        for row in rows(tiny.run / "metrics.jsonl")
    ]


def test_what_is_not_finite_is_never_applied(tiny: TinyRun, other: TinyRun) -> None:
    """At the first step, the last and between, in gradients, the loss and activations, on either rank: as if the recipe
    skipped them."""
    longer = (
        "stages.two.until=66 steps",
        "lr.decay_start=40 steps",
        "lr.decay_end=67 steps",
        "save.every=20 steps",
    )
    faults = (
        Fault("gradient", "one", 1, rank=1),
        Fault("loss", "two", 10, rank=0),
        Fault("activation", "two", 65, rank=1),
        Fault("gradient", "anneal", 6, rank=0, value=math.inf),
        Fault("gradient", "long", 67, rank=1, value=-math.inf),
    )
    assert run(tiny, *SKIP, *longer, faults=faults) == [0, 0], errors(tiny)
    found = incidents(tiny)
    assert [(row["stage"], row["step"], row["decision"]) for row in found] == [
        ("one", 1, "skip"),
        ("two", 10, "skip"),
        ("two", 65, "skip"),
        ("anneal", 6, "skip"),
        ("long", 67, "skip"),
    ]
    assert [[entry["rank"] for entry in row["gradients"]] for row in found] == [[1], [0], [1], [0], [1]]
    assert found[0]["gradients"][0]["parameters"] == ["embedding.word_embeddings.weight"]
    assert [row["value"] for row in found] == ["nan", "nan", "nan", "inf", "inf"]
    assert "rank 1" in (tiny.run / "log.txt").read_text()

    skipped = skip_steps(one=[[1, 1]], two=[[10, 10], [65, 65]], anneal=[[6, 6]], long=[[67, 67]])
    assert run(other, *SHORT, *longer, skipped) == [0, 0], errors(other)
    assert not incidents(other)
    assert tensors(tiny, "long-00000067") == tensors(other, "long-00000067"), "weights and moments"
    assert trained_rows(tiny) == trained_rows(other)
    assert ledger(tiny) == ledger(other)
    # The last lineage is one, two up to step 63, and long: what other stages skipped is not in it.
    assert sum(ledger(tiny).skipped_tokens().values()) == 2 * 8 * 32 + 4 * 64


def test_an_incident_names_the_documents_of_its_batch(tiny: TinyRun) -> None:
    assert run(tiny, *SKIP, ranks=1, faults=(Fault("gradient", "two", 9, rank=0),)) == [0], errors(tiny)
    recipe = load_recipe(tiny.recipe)
    plan = make_plan(recipe, resolve_sizes(recipe))
    batch = batch_of_step(plan.stages, plan.orders, "two", 9)
    wanted: dict[str, set[tuple[str, int]]] = {}
    for index, content in zip(
        batch.rows.source, read_rows(recipe, plan.stage("two"), plan.orders, batch), strict=True
    ):
        parts = {(part.shard, part.document) for part in content.documents}
        wanted.setdefault(batch.rows.names[index], set()).update(parts)
    (row,) = incidents(tiny)
    found = {
        source: {(shard, number) for shard, numbers in shards.items() for number in numbers}
        for source, shards in row["documents"].items()
    }
    assert found == wanted


def test_by_default_a_run_stops_with_its_last_checkpoint_intact(tiny: TinyRun) -> None:
    assert run(tiny, *SHORT, faults=(Fault("loss", "two", 10),)) == [5, 5]
    said = errors(tiny)
    assert "step 10 of 'two': loss nan" in said and "--step 10 --stage two" in said
    assert [row["decision"] for row in incidents(tiny)] == ["stop"]
    tensors(tiny, "two-00000008")
    assert run(tiny, *SHORT, faults=(Fault("loss", "two", 10),)) == [5, 5]
    assert len(incidents(tiny)) == 1, "the row of a step that is decided again replaces the first"


def test_a_run_stops_after_too_many_in_a_row(tiny: TinyRun) -> None:
    faults = tuple(Fault("gradient", "one", step) for step in range(2, 26))
    limits = ("guard.max_in_a_row=20", "stages.one.until=40 steps", "stages.two.until=46 steps")
    assert run(tiny, *SKIP, *limits, faults=faults) == [5, 5]
    assert "21 incidents in a row, guard.max_in_a_row allows 20" in errors(tiny)
    assert [row["decision"] for row in incidents(tiny)] == ["skip"] * 20 + ["stop"]
    assert rows(tiny.run / "metrics.jsonl")[-1]["step"] == 21


SPIKE = Fault("scale", "two", 11, value=1e4, once=True)
BACK = (
    *SHORT,
    "guard.spike=rollback",
    "guard.history=8",
    "guard.skip_before=1",
    "guard.skip_after=1",
    "save.every=3 steps",
)
# The newest checkpoint before step 11 is of step 9 (a branch point, and an interval); 10, 11 and 12 are skipped.
SKIPPED = skip_steps(two=[[10, 12]])


@pytest.fixture(scope="module")
def skipping(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The run whose recipe skips what the others skip after a roll-back."""
    folder = tmp_path_factory.mktemp("skipping")
    made = TinyRun(write_recipe(tiny_data, folder), tiny_data, folder)
    assert run(made, *SHORT, SKIPPED, "save.every=3 steps") == [0, 0], errors(made)
    return made


def assert_rolled_back(tiny: TinyRun, skipping: TinyRun) -> None:
    (row,) = [
        row for row in incidents(tiny) if row["decision"] != "restart"
    ]  # a rank that was killed has one
    assert (row["stage"], row["step"], row["decision"], row["to"]) == ("two", 11, "rollback", "two-00000009")
    assert row["what"] == "gradient norm spike" and row["value"] > row["limit"] > row["median"]
    assert row["skip"] == ["two", 10, 12]
    assert tensors(tiny, LAST) == tensors(skipping, LAST)
    assert tensors(tiny, "two-00000012") == tensors(skipping, "two-00000012")
    assert trained_rows(tiny) == trained_rows(skipping)
    state = json.loads((tiny.run / "checkpoints" / "two-00000012" / "state.json").read_text())
    read = Ledger.from_json(state["ledger"])
    assert sum(read.skipped_tokens().values()) == 3 * 8 * 32
    assert state["ledger"]["trained_tokens"] == read.consumed_tokens - 3 * 8 * 32
    assert state["hooks"]["Guard"]["skipped"] == [["two", 10, 12]]
    other = json.loads((skipping.run / "checkpoints" / "two-00000012" / "state.json").read_text())
    windows = state["hooks"]["Guard"]["windows"]
    assert windows == other["hooks"]["Guard"]["windows"] and len(windows["loss"]) == 3


def test_a_spike_rolls_back_and_skips_the_steps_around_it(tiny: TinyRun, skipping: TinyRun) -> None:
    assert run(tiny, *BACK, faults=(SPIKE,)) == [0, 0], errors(tiny)
    assert_rolled_back(tiny, skipping)
    assert "back at" in (tiny.run / "log.txt").read_text()


@pytest.mark.parametrize(
    "kill",
    [
        Fault("die after row", "two", 11, rank=0),
        Fault("kill", "two", 12, rank=0),
    ],
    ids=["the moment after the decision", "before the next save"],
)
def test_kill_9_after_a_roll_back(tiny: TinyRun, skipping: TinyRun, kill: Fault) -> None:
    """The spike does not come again after the restart, and what was decided is not forgotten."""
    codes = run(tiny, *BACK, faults=(SPIKE, kill))
    assert codes[0] == -9 and codes[1] != 0, errors(tiny)
    assert run(tiny, *BACK) == [0, 0], errors(tiny)
    assert_rolled_back(tiny, skipping)


def decided(tiny: TinyRun) -> list[dict[str, Any]]:
    """A busy machine makes stragglers, which are only noted."""
    return [row for row in incidents(tiny) if row["what"] != "straggler"]


@pytest.mark.faults
@pytest.mark.parametrize(("batches", "last"), [(1, 100), (20, 600)])
def test_garbage_is_seen_at_once_and_what_is_learnt_stays(
    tiny: TinyRun, other: TinyRun, batches: int, last: int
) -> None:
    """Random ids in place of text: found in the first step, rolled back, skipped, and the loss ends where it would have."""
    trained = (
        *SHORT, f"stages.two.until={last} steps", f"lr.decay_start={last - 10} steps", f"lr.decay_end={last} steps",
        "stages.long.from.before_end=1 steps", "save.every=10 steps", "guard.history=16", "guard.spike=rollback",
        "guard.skip_before=0", f"guard.skip_after={batches - 1}",
    )  # fmt: skip
    assert run(other, *trained) == [0, 0], errors(other)
    assert not decided(other), "no false alarm"
    garbage = [Fault("garbage", "two", 50 + i, rank=rank) for i in range(batches) for rank in range(2)]
    assert run(tiny, *trained, faults=tuple(garbage)) == [0, 0], errors(tiny)
    (row,) = decided(tiny)
    assert (row["step"], row["decision"], row["skip"]) == (50, "rollback", ["two", 50, 49 + batches])
    assert row["documents"] and row["to"] in ("two-00000040", "two-00000030")
    skipped = [r["step"] for r in rows(tiny.run / "metrics.jsonl") if not r.get("applied", True)]
    assert skipped == list(range(50, 50 + batches))
    final, wanted = (
        statistics.fmean(
            r["loss"]
            for r in rows(one.run / "metrics.jsonl")
            if r["stage"] == "two" and r["step"] > last - 10
        )
        for one in (tiny, other)
    )
    print(f"\n{batches} batches of garbage: loss {final:.4f}, without them {wanted:.4f}")
    assert final == pytest.approx(wanted, rel=0.02)


@pytest.mark.faults
def test_a_flipped_bit_of_one_copy_stops_the_run_within_the_interval(tiny: TinyRun) -> None:
    three = ("parallel.distributed_optimizer=false", "guard.replica_check=5", *SHORT)
    three += ("training.global_batch=12", "stages.long.global_batch=12")
    assert run(tiny, *three, ranks=3, faults=(Fault("bit", "two", 7, rank=2),)) == [5, 5, 5]
    (row,) = incidents(tiny)
    assert (row["what"], row["step"]) == ("copies differ", 10)
    assert [copy["rank"] for copy in row["copies"]] == [2] and "rank 2 on " in errors(tiny)


def test_a_clean_run_has_no_incidents(skipping: TinyRun) -> None:
    assert not (skipping.run / "incidents.jsonl").exists()
    assert "!!" not in (skipping.run / "log.txt").read_text()


def test_a_window_knows_a_spike() -> None:
    window = Window(32, sigmas=6.0, floor=0.01)
    for step in range(200):
        value = 2.0 + 0.02 * math.sin(7 * step)
        usual = window.usual()
        assert (usual is None) == (step < 8)
        assert usual is None or value < usual.limit < 3 * value
        window.add(value)
    usual = window.usual()
    assert usual is not None and usual.limit < 2.3
    for _ in range(8):  # spikes do not make spikes usual
        window.add(9.0)
    assert (again := window.usual()) is not None and again.limit < 2.6
    for _ in range(24):  # a level that stays is one
        window.add(9.0)
    assert (high := window.usual()) is not None and high.limit > 9


def test_a_falling_loss_is_no_spike() -> None:
    window = Window(128, sigmas=6.0, floor=0.01)
    for step in range(2000):
        loss = 2 + 8 * math.exp(-step / 150) + 0.05 * math.sin(11 * step)
        if usual := window.usual():
            assert loss < usual.limit
        window.add(loss)


def test_what_was_seen_survives_a_checkpoint() -> None:
    window, again = (Window(16, sigmas=6.0, floor=0.1) for _ in range(2))
    for step in range(40):
        window.add(1 + 0.1 * step)
    again.load(json.loads(json.dumps(window.state())))
    assert again.usual() == window.usual()


def test_a_stage_that_is_not_there_is_refused(tiny: TinyRun) -> None:
    assert run(tiny, skip_steps(too=[[1, 2]]), ranks=1) == [2]
    assert "guard.skip_steps names stage 'too', which is not in the recipe; did you mean 'two'?" in errors(
        tiny
    )


def test_a_stop_waits_for_the_save_under_way_as_long_as_saves_may_take(tiny: TinyRun) -> None:
    """In a step's own time the watchdog would take the wait for a hang, and the reason to stop would not be told."""
    pulse = Pulse()
    pulse.mark(COMPUTING)

    class Saving:
        def finish_saving(self) -> None:
            raise TimeoutError(pulse.phase)

    trainer: Any = Saving()
    trainer.pulse = pulse
    guard = Guard(load_recipe(tiny.recipe))
    with pytest.raises(TimeoutError, match=SAVING):
        guard._stop(trainer, None, None, "", {})  # type: ignore[arg-type]
