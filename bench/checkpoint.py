"""Save and load a whole training state: ours against torch.save and torch.load of the same tensors.

Ours writes megatron-core's distributed format, hashes every file, flushes all of it to the disk and renames it
into place; loading checks the hashes first, as a resumed run does. The peer is the usual script with the same
safety where it is cheap: one file, flushed, read with weights_only. On the wall, because disks are.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import Outcome, Seconds, Turns, run, say, take_turns, timed
from bench.shape import build, describe
from megatron_smol.checkpoint import folder, store
from megatron_smol.data.loader import MicroBatch
from megatron_smol.train.step import Engine

TURNS = 4


def measure() -> Outcome:
    recipe, engine = build()
    # One step, so that the moments are not zeros, which some file systems store for free.
    ids = torch.randint(recipe.model.vocab_size, (1, 65), generator=torch.Generator().manual_seed(1))
    engine.train_step([MicroBatch.of(ids.numpy(), torch.device("cpu"))], 1e-3)
    parameters = recipe.model.parameters()
    with tempfile.TemporaryDirectory() as where:
        ours, peer = Path(where) / "ours-00000001", Path(where) / "peer.pt"
        same = _tensors(engine)
        state = {"stage": "ours", "stage_index": 0, "step": 1}
        say(f"{TURNS} turns of save and load, {sum(t.nbytes for t in same.values()) / 1e6:.0f} MB")
        save = take_turns(
            lambda: timed(lambda: store.save(engine, ours, state, parameters)),
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
        size = {"ours": sum(f.stat().st_size for f in ours.iterdir()), "peer": peer.stat().st_size}
    seconds = {what: _medians(turns) for what, turns in (("save", save), ("load", load))}
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
        },
        settings=describe(recipe),
        notes=[
            f"load: ratio {load.ratio.median:.2f} (ours {seconds['load'][0]:.2f} s with the hashes checked, torch.load "
            f"{seconds['load'][1]:.2f} s without)"
        ],
    )


def _tensors(engine: Engine) -> dict[str, Tensor]:
    """What a checkpoint of ours holds: the weights, the optimizer's copy of them, the two moments."""
    found = {f"model.{name}": parameter.detach() for name, parameter in engine.gpt.named_parameters()}
    for inner in (chained.optimizer for chained in engine.optimizer.chained_optimizers):
        for number, (parameter, state) in enumerate(inner.state.items()):
            found[f"optimizer.{number}.param"] = parameter.detach()
            found |= {f"optimizer.{number}.{key}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    return found


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
