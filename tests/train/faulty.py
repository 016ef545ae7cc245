"""Ranks of a real run in which something goes wrong: `launch` starts them, `Fault` says what happens where.

The package knows nothing of this: a fault replaces a function of it inside the test's own processes.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import multiprocessing as mp
import os
import random
import signal
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.helpers import free_port
from tests.tiny import TinyRun


@dataclass(frozen=True)
class Fault:
    """What `rank` does at a step (counted as in metrics.jsonl); "slow": in every micro-batch of the stage up to it.

    once: not again after a roll-back or a restart. place: one of PLACES; then it is done there instead, when the stage
    and step before it are these ("" and 0: the first time).
    """

    kind: str  # gradient, scale, loss, activation, garbage, bit, die after row, busy, lock, slow; anywhere: kill, raise, full disk, asleep, signal
    stage: str = ""
    step: int = 0
    rank: int = 1
    value: float = float("nan")
    once: bool = False
    place: str = ""


@dataclass(frozen=True)
class Place:
    """A function of the package, in which a rank can be hit. anyone: all ranks come there, not only rank 0."""

    module: str
    owner: str
    name: str
    anyone: bool = True

    def rank(self, chance: random.Random) -> int:
        return chance.randrange(2) if self.anyone else 0


PLACES = {
    "opening the sources": Place("train.run", "", "open_sources"),
    "making the run folder": Place("train.run", "", "_prepare_folder", anyone=False),
    "building the model": Place("train.run", "", "Engine"),
    "looking for a checkpoint": Place("train.trainer", "Trainer", "newest_checkpoint"),
    "loading": Place("checkpoint.store", "", "load"),
    "reading a batch": Place("data.loader", "StageLoader", "batch"),
    "a step": Place("train.trainer", "Trainer", "_step"),
    "validation": Place("train.validate", "", "source_losses"),
    "copying for a save": Place("checkpoint.store", "", "begin_save"),
    "writing a save": Place("checkpoint.saving", "_Writer", "write"),
    "publishing": Place("checkpoint.folder", "", "publish", anyone=False),
    "removing old checkpoints": Place("checkpoint.folder", "", "prune", anyone=False),
    "writing a row": Place("train.monitor", "JsonLines", "write", anyone=False),
    "the end": Place("train.run", "", "_farewell"),
}


def launch(tiny: TinyRun, *overrides: str, ranks: int = 2, faults: tuple[Fault, ...] = ()) -> list[Any]:
    """Start `smol train` of the tiny recipe in processes forked from a server that has imported everything."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.preload"])
    port = free_port()
    arguments = (str(tiny.recipe), overrides, faults, str(tiny.folder), ranks, port)
    processes = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def ended(processes: list[Any], seconds: float = 240) -> list[int]:
    """Wait for all of them; their exit codes (minus the signal's number where one ended it)."""
    until = time.monotonic() + seconds
    try:
        for process in processes:
            process.join(max(until - time.monotonic(), 0))
            assert process.exitcode is not None, f"a rank still runs after {seconds} s"
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def run(tiny: TinyRun, *overrides: str, ranks: int = 2, faults: tuple[Fault, ...] = ()) -> list[int]:
    return ended(launch(tiny, *overrides, ranks=ranks, faults=faults))


def errors(tiny: TinyRun) -> str:
    """What the ranks said when they failed."""
    return "".join(path.read_text() for path in sorted(tiny.folder.glob("error-*.txt")))


def _rank(rank: int, recipe: str, overrides: Any, faults: Any, folder: str, ranks: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), SMOL_DEVICE="cpu", OMP_NUM_THREADS="1",
    )  # fmt: skip
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    error = Path(folder) / f"error-{rank}.txt"
    error.unlink(missing_ok=True)
    os._exit(_train(rank, recipe, overrides, faults, Path(folder), error))


def _train(rank: int, path: str, overrides: Any, faults: Any, folder: Path, error: Path) -> int:
    from megatron_smol.errors import UserError
    from megatron_smol.recipe.load import load_recipe
    from megatron_smol.train.run import train
    from megatron_smol.train.signals import StopFlag

    try:
        recipe = load_recipe(Path(path), list(overrides))
        stop = StopFlag(recipe.run_path)
        stop.install()
        install([fault for fault in faults if fault.rank == rank], folder)
        return train(recipe, stop)
    except UserError as found:
        error.write_text(str(found))
        return found.exit_code
    except BaseException:
        error.write_text(traceback.format_exc())
        return 1


def install(faults: list[Fault], folder: Path) -> None:
    """Put faults between the package's functions: after backward, before ranks reduce their gradients."""
    from megatron_smol.train import guard as guard_module
    from megatron_smol.train import step as step_module
    from megatron_smol.train.trainer import Trainer

    here: list[Any] = ["", 0]
    placed = [fault for fault in faults if fault.place]
    faults = [fault for fault in faults if not fault.place]
    write_incident = guard_module.write_incident
    take_step, finalize, mean_loss = Trainer._step, step_module.finalize_model_grads, step_module._mean_loss

    def noting(self: Trainer, stage: Any, batch: Any) -> None:
        here[:] = [stage.name, self.state.step + 1]
        for fault in due("kill", "signal", "raise"):
            _strike(fault)
        for fault in due("garbage"):
            _garble(batch, fault.step)
        if due("bit"):
            self.engine.gpt.decoder.final_layernorm.weight.detach().view(torch.int32)[5] ^= 1 << 24
        hooks = [_spoil_activations(self.engine.gpt, fault.value) for fault in due("activation")]
        take_step(self, stage, batch)
        for hook in hooks:
            hook.remove()

    def due(*kinds: str) -> list[Fault]:
        found = [f for f in faults if f.kind in kinds and [f.stage, f.step] == here and not _done(f, folder)]
        slow = [f for f in faults if f.kind == "slow" and f.kind in kinds and f.stage == here[0]]
        return found + [f for f in slow if here[1] < f.step]

    def faulty_finalize(model: Any, *args: Any, **kwargs: Any) -> None:
        for fault in due("gradient", "scale"):
            _harm(fault, model)
        finalize(model, *args, **kwargs)

    def faulty_loss(per_token: Any) -> Any:
        for fault in due("loss", "busy", "lock", "asleep", "slow"):
            if fault.kind == "loss":
                return mean_loss(per_token * fault.value)
            _stall(fault)
        return mean_loss(per_token)

    def dying(run: Path, row: dict[str, Any]) -> None:
        write_incident(run, row)
        if due("die after row"):
            os.kill(os.getpid(), signal.SIGKILL)

    guard_module.write_incident = dying
    Trainer._step = noting  # type: ignore[method-assign]
    step_module.finalize_model_grads = faulty_finalize
    step_module._mean_loss = faulty_loss
    for fault in placed:
        _install_at(fault, here, folder)


def _install_at(fault: Fault, here: list[Any], folder: Path) -> None:
    place = PLACES[fault.place]
    owner: Any = importlib.import_module(f"megatron_smol.{place.module}")
    if place.owner:
        owner = getattr(owner, place.owner)
    original, mark, pending = getattr(owner, place.name), folder / f"hit-{fault.place}", [True]

    def hit(*args: Any, **kwargs: Any) -> Any:
        if pending and [fault.stage or here[0], fault.step or here[1]] == here:
            pending.clear()
            mark.touch()
            _strike(fault)
        return original(*args, **kwargs)

    setattr(owner, place.name, hit)


def _strike(fault: Fault) -> None:
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind == "full disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if fault.kind == "raise":
        raise RuntimeError(f"planted in {fault.place or 'a step'}")
    if fault.kind == "signal":
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
    if fault.kind in ("asleep", "signal"):
        time.sleep(fault.value)


def _done(fault: Fault, folder: Path) -> bool:
    if not fault.once:
        return False
    mark = folder / f"done-{fault.kind}-{fault.stage}-{fault.step}-{fault.rank}"
    if mark.exists():
        return True
    mark.touch()
    return False


def _garble(batch: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for micro_batch in batch.micro_batches:
        for ids in (micro_batch.tokens, micro_batch.labels):
            ids.random_(0, 600, generator=generator)


def _spoil_activations(model: Any, value: float) -> Any:
    return model.decoder.final_layernorm.register_forward_hook(lambda module, given, output: output * value)


def _harm(fault: Fault, model: Any) -> None:
    for parameter in (parameter for part in model for parameter in part.parameters()):
        if fault.kind == "scale":
            parameter.main_grad.mul_(fault.value)
        else:
            parameter.main_grad.view(-1)[-1] = fault.value
            return


def _stall(fault: Fault) -> None:
    if fault.kind == "busy":
        while True:
            pass
    if fault.kind == "lock":  # PyDLL keeps the interpreter's lock during the call
        ctypes.PyDLL(None).sleep(1000)
    time.sleep(fault.value)


def incidents(tiny: TinyRun) -> list[dict[str, Any]]:
    path = tiny.run / "incidents.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tensors(tiny: TinyRun, name: str) -> dict[str, str]:
    """Hashes of all weights and moments in a checkpoint; and none of them may be other than finite."""
    from torch.distributed import checkpoint as dcp

    from tests.ranks import digest

    path = tiny.run / "checkpoints" / name
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    found = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    dcp.load(found, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())
    return {key: digest(tensor) for key, tensor in found.items()}
