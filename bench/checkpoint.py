"""Save and load a whole training state: ours against torch.save and torch.load of the same tensors.

Ours writes megatron-core's distributed format, hashes every file, flushes all of it to the disk and renames it
into place; loading checks the hashes first, as a resumed run does. The peer is the usual script with the same
safety where it is cheap: one file, flushed, read with weights_only. On the wall, because disks are.

The same save without its hashes, in turns with the save as it is, tells what they cost.

Then a save beside training against one that training waits for, in turns: the stall is all the time spent in the trainer's
calls, from the request to the publication; what steps lose meanwhile to the thread that writes is told apart from it.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import Outcome, Seconds, Spread, Turns, run, say, take_turns, timed
from bench.shape import build, describe
from megatron_smol.checkpoint import durable, folder, store
from megatron_smol.checkpoint.staging import Staging
from megatron_smol.data.loader import MicroBatch
from megatron_smol.recipe.estimate import checkpoint_bytes
from megatron_smol.train.step import Engine

TURNS = 4
HASH_TURNS = 12
STALL_TURNS = 8
STALL_GOAL = 0.10  # of the time of a save that training waits for


def measure() -> Outcome:
    recipe, engine = build()
    _steps(engine)()  # so that the moments are not zeros, which some file systems store for free
    parameters, size_bytes = recipe.model.parameters(), checkpoint_bytes(recipe.model, "fp32")
    with tempfile.TemporaryDirectory() as where:
        ours, peer = Path(where) / "ours-00000001", Path(where) / "peer.pt"
        same = _tensors(engine)
        say(f"{TURNS} turns of save and load, {sum(t.nbytes for t in same.values()) / 1e6:.0f} MB")
        save = take_turns(
            lambda: timed(lambda: store.save(engine, ours, _STATE, size_bytes)),
            lambda: timed(lambda: _torch_save(same, peer)),
            TURNS,
            "wall",
        )
        before = {name: tensor.clone() for name, tensor in same.items()}
        verify: list[Seconds] = []

        def load_ours() -> None:
            verify.append(timed(lambda: folder.verify_files(ours)))
            store.load(engine, folder.read_checkpoint(ours))

        load = take_turns(
            lambda: _checked(load_ours, engine, before),
            lambda: _checked(lambda: _torch_load(_tensors(engine), peer), engine, before),
            TURNS,
            "wall",
        )
        say(f"{HASH_TURNS} turns of save with and without hashes")
        hashes = take_turns(
            lambda: timed(lambda: store.save(engine, ours, _STATE, size_bytes)),
            lambda: _without_hashes(lambda: store.save(engine, ours, _STATE, size_bytes)),
            HASH_TURNS,
            "wall",
        )
        store.save(engine, ours, _STATE, size_bytes)
        beside = _beside_training(engine, Path(where), size_bytes)
        size = {"ours": sum(f.stat().st_size for f in ours.iterdir()), "peer": peer.stat().st_size}
    seconds = {what: _medians(turns) for what, turns in (("save", save), ("load", load), ("hashes", hashes))}
    return Outcome(
        ratio=save.ratio,
        ratio_of=f"seconds to save {parameters / 1e6:.0f}M parameters with optimizer state, hashed and durable",
        peer_is="torch.save with fsync",
        ours=f"{seconds['save'][0]:.2f} s, {size['ours'] / 1e6:.0f} MB",
        peer=f"{seconds['save'][1]:.2f} s, {size['peer'] / 1e6:.0f} MB",
        details={
            "bytes": size,
            "save": save.to_json(),
            "load": {**load.to_json(), "ratio": load.ratio.to_json()},
            "of_our_load_verify_wall_seconds": [s.wall for s in verify],
            "hashes": {**hashes.to_json(), "ratio": hashes.ratio.to_json()},
            "beside_training": beside,
        },
        settings=describe(recipe),
        notes=[
            f"load: ratio {load.ratio.median:.2f} (ours {seconds['load'][0]:.2f} s with the hashes checked, torch.load "
            f"{seconds['load'][1]:.2f} s without)",
            f"hashes cost {1 - hashes.ratio.median:.1%} of a save ({seconds['hashes'][0]:.2f} s with, {seconds['hashes'][1]:.2f} s "
            f"without; at most {1 - min(hashes.ratio.values):.1%} and at least {1 - max(hashes.ratio.values):.1%} in {HASH_TURNS} turns)",
            _told(beside),
        ],
    )


def _beside_training(engine: Engine, where: Path, size_bytes: int) -> dict[str, Any]:
    """Saves that training waits for and saves beside it, in turns, in this run; seconds on the wall."""
    staging, step = Staging(), _steps(engine)
    found: dict[str, list[float]] = {
        name: [] for name in ("waited", "stall", "longest_call", "slowdown", "until_durable")
    }
    first = store.begin_save(engine, where / "first-00000000", _STATE, size_bytes, staging)
    first_stall = first.stall_seconds  # takes the buffers from the system, once a run
    first.finish()
    undisturbed = [step() for _ in range(12)][2:]
    for turn in range(STALL_TURNS):
        whole = timed(
            lambda: store.begin_save(engine, where / "waited-00000001", _STATE, size_bytes, staging).finish()
        )
        found["waited"].append(whole.wall)
        undisturbed.append(step())
        calls, steps, begin = [], [], time.perf_counter()
        under_way = store.begin_save(engine, where / f"beside-{turn:08d}", _STATE, size_bytes, staging)
        calls.append(time.perf_counter() - begin)
        published = False
        while not published:
            steps.append(step())
            asked = time.perf_counter()
            published = under_way.finish(wait=False)
            calls.append(time.perf_counter() - asked)
        found["until_durable"].append(time.perf_counter() - begin)
        found["stall"].append(sum(calls))
        found["longest_call"].append(max(calls))
        found["slowdown"].append(sum(steps) - len(steps) * statistics.median(undisturbed))
        folder.discard(where / f"beside-{turn:08d}")
    ratio = [stall / waited for stall, waited in zip(found["stall"], found["waited"], strict=True)]
    return {
        "stall_over_waited": Spread(tuple(ratio)).to_json(),
        **{f"{name}_wall_seconds": Spread(tuple(values)).to_json() for name, values in found.items()},
        "first_stall_wall_seconds": first_stall,
        "step_wall_seconds": Spread(tuple(undisturbed)).to_json(),
        "tokens_per_step": _LENGTH,
    }


def _told(beside: dict[str, Any]) -> str:
    share, seconds = (
        beside["stall_over_waited"],
        {k: v["median"] for k, v in beside.items() if isinstance(v, dict)},
    )
    return (
        f"beside training: stall {share['median']:.1%} ({share['min']:.1%} to {share['max']:.1%}; goal {STALL_GOAL:.0%}) of a "
        f"save that training waits for, {seconds['stall_wall_seconds']:.3f} of {seconds['waited_wall_seconds']:.2f} s; steps lose "
        f"{seconds['slowdown_wall_seconds']:.2f} s besides to the thread that writes, durable after "
        f"{seconds['until_durable_wall_seconds']:.2f} s"
    )


_STATE = {"stage": "ours", "stage_index": 0, "step": 1}
_LENGTH = 64


def _steps(engine: Engine) -> Any:
    """A call trains one step and gives its seconds."""
    ids = torch.randint(8192, (1, _LENGTH + 1), generator=torch.Generator().manual_seed(1))
    batch = [MicroBatch.of(ids.numpy(), torch.device("cpu"))]
    return lambda: timed(lambda: engine.train_step(batch, 1e-4)).wall


def _tensors(engine: Engine) -> dict[str, Tensor]:
    """What a checkpoint of ours holds: the weights, the optimizer's copy of them, the two moments."""
    found = {f"model.{name}": parameter.detach() for name, parameter in engine.gpt.named_parameters()}
    for inner in (chained.optimizer for chained in engine.optimizer.chained_optimizers):
        for number, (parameter, state) in enumerate(inner.state.items()):
            found[f"optimizer.{number}.param"] = parameter.detach()
            found |= {f"optimizer.{number}.{key}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    return found


class _NoHash:
    def update(self, data: Any) -> None:
        pass

    def hexdigest(self) -> str:
        return ""


def _without_hashes(save: Any) -> Seconds:
    real = durable.xxhash
    durable.xxhash = types.SimpleNamespace(xxh3_128=_NoHash)  # type: ignore[assignment]
    try:
        return timed(save)
    finally:
        durable.xxhash = real


def _torch_save(tensors: dict[str, Tensor], path: Path) -> None:
    # clone: torch.save writes the whole buffer that a view lies in
    with path.open("wb") as file:
        torch.save({name: tensor.clone() for name, tensor in tensors.items()}, file)
        file.flush()
        os.fsync(file.fileno())


def _torch_load(tensors: dict[str, Tensor], path: Path) -> None:
    loaded = torch.load(path, weights_only=True)
    for name, tensor in tensors.items():
        tensor.copy_(loaded[name])


def _checked(load: Any, engine: Engine, expected: dict[str, Tensor]) -> Seconds:
    """Time a load into a wiped state, and see that every bit came back."""
    for tensor in _tensors(engine).values():
        tensor.fill_(7.0)
    seconds = timed(load)
    if any(not torch.equal(tensor, expected[name]) for name, tensor in _tensors(engine).items()):
        raise AssertionError("a load did not bring back what was saved")
    return seconds


def _medians(turns: Turns) -> tuple[float, float]:
    ours, peer = turns.rates(1.0)
    return 1 / ours.median, 1 / peer.median


if __name__ == "__main__":
    run("checkpoint", measure)
