"""The recipe that tests train: every kind of stage, a model of a few ten thousand weights, seconds to run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers import free_port

RECIPE = """
name: tiny
seed: 3
run_dir: {run}
tokenizer: {data}/tokenizer
model: {{layers: 2, hidden_size: 32, heads: 4, kv_heads: 2, ffn_size: 64, vocab_size: 640, init_std: 0.02}}
data: {{seed: 5, holdout_tokens: 600, over_epochs: warn}}
sources:
  web: {{path: {data}/web}}
  code: {{path: {data}/code}}
  maths: {{path: {data}/maths}}
training: {{seq_length: 32, rope_base: 10000, global_batch: 8, micro_batch: 2, precision: fp32}}
stages:
  - name: one
    until: 6 steps
    mixture: {{web: 0.9, code: 0.1}}
  - name: two
    until: 12 steps
    mixture: {{web: 0.5, code: 0.3, maths: 0.2}}
  - name: anneal
    from: {{stage: one, before_end: 2 steps}}
    tokens: 3 steps
    lr: {{end: 0}}
    mixture: {{maths: 0.6, web: 0.4}}
  - name: long
    from: {{stage: two, before_end: 3 steps}}
    tokens: 4 steps
    seq_length: 64
    global_batch: 4
    micro_batch: 1
    rope_base: 130000
    mixture: {{code: 0.4, web: 0.6}}
lr: {{peak: 2e-2, warmup: 3 steps, decay_start: 8 steps, decay_end: 13 steps}}
save: {{every: 2 steps, keep_last: 2}}
eval: {{windows_per_source: 4}}
"""


def write_recipe(data: Path, folder: Path, run: str = "run") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(data=data, run=folder / run))
    return path


def smol(*arguments: object, ranks: int = 0, **environment: str) -> list[str]:
    """The command line of `smol`, under torchrun when ranks are asked for."""
    command = ["-m", "megatron_smol", *map(str, arguments)]
    if ranks:
        launcher = [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(ranks),
            "--master-port",
            str(free_port()),
        ]
        return [sys.executable, *launcher, *command]
    return [sys.executable, *command]


def environment(**extra: str) -> dict[str, str]:
    """Of a test's processes: this checkout, the CPU, one thread, no rank variables of ours."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
    root = str(Path(__file__).parent.parent)
    return kept | {"PYTHONPATH": root, "SMOL_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | extra


@dataclass
class TinyRun:
    """A recipe file and where its run goes; `train` runs the real command."""

    recipe: Path
    data: Path
    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def train(
        self, *overrides: str, ranks: int = 0, timeout: float = 300, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        command = smol("train", self.recipe, *overrides, ranks=ranks)
        return subprocess.run(
            command, env=environment(**extra), capture_output=True, text=True, timeout=timeout
        )

    def start(self, *overrides: str, ranks: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            smol("train", self.recipe, *overrides, ranks=ranks),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def rows(path: Path, *ignored: str) -> list[dict[str, Any]]:
    """A JSON-lines file without fields that time decides."""
    drop = {"seconds", "tokens_per_s", *ignored}
    return [
        {k: v for k, v in json.loads(line).items() if k not in drop} for line in path.read_text().splitlines()
    ]


def wait_for(path: Path, lines: int, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait until a growing file has so many lines."""
    until = time.monotonic() + seconds
    while not path.is_file() or len(path.read_text().splitlines()) < lines:
        assert process.poll() is None, f"ended too early: {process.stdout.read() if process.stdout else ''}"
        assert time.monotonic() < until, f"{path} has fewer than {lines} lines after {seconds} s"
        time.sleep(0.02)


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the training ranks that torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def kill_group(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
