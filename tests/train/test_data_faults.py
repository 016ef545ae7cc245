"""Data that goes wrong while a run reads it, and data from an address, by the real command."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from megatron_smol.data.packing import pack_source
from tests.tiny import TinyRun, environment, rows, smol, wait_for

LONG = ("stages.one.until=5000 steps", "stages.two.until=5006 steps", "save.every=1000 steps")


def test_a_shard_truncated_in_a_running_job_stops_it_with_one_sentence(tiny: TinyRun) -> None:
    """A memory map would end it by SIGBUS, without a word."""
    shutil.copytree(tiny.data / "web", tiny.folder / "web")
    shard = tiny.folder / "web" / "shard-00000.bin"
    command = smol("train", tiny.recipe, f"sources.web.path={shard.parent}", *LONG)
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(tiny.run / "metrics.jsonl", 3, process)
    size = shard.stat().st_size
    os.truncate(shard, 1000)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 3, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in said
    assert f"{shard} has 1,000 bytes, expected {size:,}" in errors[0]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run / "metrics.jsonl")]


def test_a_source_behind_an_address_trains_the_same(tiny: TinyRun) -> None:
    short = ("stages.two.until=9 steps", "stages.long.from.before_end=1 steps", "eval.windows_per_source=0")
    assert tiny.train(*short).returncode == 0
    cache = tiny.folder / "cache"
    far = (f"sources.web.path=file://{tiny.data}/web", f"run_dir={tiny.folder}/far")
    done = tiny.train(*short, *far, SMOL_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    assert losses(tiny.folder / "far") == losses(tiny.run)


def test_a_packed_source_trains_under_document_masks(tiny: TinyRun) -> None:
    pack_source(tiny.data / "web", 32, tiny.folder / "web")
    packed = (f"sources.web.path={tiny.folder}/web", "training.document_mask=true")
    done = tiny.train(*packed)
    assert done.returncode == 2 and "it is packed for 32" in done.stderr, "the last stage reads windows of 64"
    assert not tiny.run.exists(), "refused before anything was done"
    done = tiny.train(*packed, "stages.long.seq_length=32")
    assert done.returncode == 0, done.stderr
    found = losses(tiny.run)
    assert found[-1] < found[0]
