"""What ranks do in the tests of a save beside training. Run by helpers.run_ranks, or started to be killed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

from megatron_smol.checkpoint import folder, saving, store
from megatron_smol.checkpoint.saving import Saving
from megatron_smol.checkpoint.staging import Staging
from megatron_smol.errors import CheckpointError
from megatron_smol.recipe.load import parse_recipe
from megatron_smol.train import step as train_step
from megatron_smol.train.step import Engine
from tests import ranks
from tests.layouts import Layout

STATE = {"stage": "one", "stage_index": 0}


def begin(running: Engine, path: Path, staging: Staging, step: int = 3) -> Saving:
    return store.begin_save(running, path, {**STATE, "step": step}, 160_000, staging)


def beside_training(where: str, layout: Layout, precision: str = "fp32", bucket: int | None = None) -> Any:
    """Save step 3 twice: while training waits, and while it goes on to step 6. Returns (curve, curve of a run without saves)."""
    small_buckets(bucket)
    running, staging = ranks.engine(layout, precision), Staging()
    ranks.train(running, layout, 0, 2)
    begin(
        running, Path(where) / "one-00000002", staging, step=2
    ).finish()  # the next one uses its buffers again
    ranks.train(running, layout, 2, 3)
    waited, beside = Path(where) / "waited", Path(where) / "beside"
    ranks.save(running, str(waited))
    trained = _writing_waits()
    under_way = begin(running, beside, staging)
    curve = ranks.train(running, layout, 3, 6)
    assert not beside.exists(), "nothing is published before the ranks agree"
    trained.set()
    under_way.finish()
    undisturbed = ranks.engine(layout, precision)
    return curve, ranks.train(undisturbed, layout, 0, 6)[3:]


def small_buckets(size: int | None) -> None:
    """Gradient buckets of so many numbers, as a large model has them."""
    if size is None:
        return
    original = train_step.ddp_config

    def config(*given: Any, **named: Any) -> Any:
        made = original(*given, **named)
        made.bucket_size = size
        return made

    train_step.ddp_config = config  # type: ignore[assignment]


def slow_rank(where: str) -> list[Any]:
    """Rank 1 cannot finish its file until it is let: what `finish` says meanwhile on this rank."""
    running, staging = ranks.engine(Layout(2, {"tp": 2})), Staging()
    let = _writing_waits() if torch.distributed.get_rank() == 1 else threading.Event()
    under_way = begin(running, Path(where) / "one-00000003", staging)
    torch.distributed.barrier()
    said: list[Any] = [under_way.finish(wait=False) for _ in range(3)]
    said.append((Path(where) / "one-00000003").exists())
    let.set()
    said.append(under_way.finish())
    return said


def _writing_waits() -> threading.Event:
    """From here on this rank's thread writes only when the event is set."""
    let, write = threading.Event(), saving._Writer.write
    saving._Writer.write = lambda self: let.wait(60) and write(self)  # type: ignore[method-assign,assignment]
    return let


def failing(where: str, what: str) -> tuple[str, list[str], bool]:
    """A save that fails in a thread after a good one: (what is raised at a later step, what is left, training goes on)."""
    running, staging, layout = ranks.engine(Layout(2)), Staging(), Layout(2)
    begin(running, Path(where) / "one-00000001", staging, step=1).finish()
    if torch.distributed.get_rank() == 0 and what == "writing":
        saving._Writer.write = _no_space  # type: ignore[method-assign,assignment]
    if torch.distributed.get_rank() == 0 and what == "publishing":
        saving.on_disk.publish = _no_space
    under_way = begin(running, Path(where) / "one-00000003", staging)
    ranks.train(running, layout, 0, 1)
    try:
        under_way.finish()
    except CheckpointError as error:
        torch.distributed.barrier()  # rank 0 clears up
        left = sorted(path.name for path in Path(where).iterdir())
        return str(error), left, bool(ranks.train(running, layout, 1, 2))
    return "", [], False


def _no_space(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


# --- to be killed ------------------------------------------------------------------------------------------

EVERY = 2  # steps from save to save
LAYOUT = Layout(2)


def training(where: str, steps: int, hidden: int, beside: bool = True) -> None:
    """Train to `steps` from the newest checkpoint in `where`, saving beside training or waiting for each save; each request
    leaves a file `asked-STEP`."""
    here = Path(where)
    running, staging, first = _engine(hidden), Staging(), 0
    if torch.distributed.get_rank() == 0:
        folder.remove_unfinished(here)
    torch.distributed.barrier()
    found = folder.choose_newest(here)
    if found is not None:
        store.load(running, found)
        first = found.step
    under_way: Saving | None = None
    for step in range(first, steps):
        ranks.train(running, LAYOUT, step, step + 1)
        if under_way is not None and under_way.finish(wait=False):
            under_way = None
        if (step + 1) % EVERY == 0:
            if under_way is not None:
                under_way.finish()
            if torch.distributed.get_rank() == 0:
                (here / f"asked-{step + 1}").touch()
            under_way = begin(running, here / folder.checkpoint_name("one", step + 1), staging, step + 1)
            if not beside:
                under_way.finish()
                under_way = None
    if under_way is not None:
        under_way.finish()


def _engine(hidden: int) -> Engine:
    torch.set_num_threads(1)
    recipe = parse_recipe(
        f"""
name: killed
run_dir: nowhere
tokenizer: none
model: {{layers: 4, hidden_size: {hidden}, heads: 4, kv_heads: 2, ffn_size: {2 * hidden}, vocab_size: {ranks.VOCABULARY}}}
sources: {{a: {{path: a, tokens: 10M}}}}
training: {{seq_length: {ranks.LENGTH}, global_batch: {ranks.GLOBAL_BATCH}, micro_batch: 1, precision: fp32}}
stages: [{{name: one, until: 100 steps, mixture: {{a: 1}}}}]
lr: {{peak: 1e-3}}
"""
    )
    return Engine(recipe, ranks.LENGTH, 10000.0, "fp32")
