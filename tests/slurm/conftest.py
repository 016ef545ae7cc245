"""A cluster for the session, and a user's folder on it. Skipped, with the reason, where no cluster can be started."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.slurm.legs import last_rows
from tests.slurm.cluster import ENDED, Cluster, describe, missing
from tests.slurm.table import FaultTable
from tests.tiny import TinyRun, rows, write_recipe
from tests.train.test_run import weights_of

REPOSITORY = Path(__file__).parent.parent.parent
SCRIPT = REPOSITORY / "examples/smollm2_1.7b.sh"
# PYTHONPATH of ranks that shall be changed: tests/slurm/inside/sitecustomize.py.
INSIDE = f"{REPOSITORY}/tests/slurm/inside:{REPOSITORY}"
EVERY = 20
# Long enough to be interrupted in: the second stage takes some seconds.
# The learning rate falls to its end, so that every step moves the weights.
LONG = (
    f"stages.two.until='80 steps' save.every='{EVERY} steps' "
    "lr.peak=1e-3 lr.decay_start='40 steps' lr.decay_end='82 steps'"
)
LAST = "long-00000081"
MINUTE = (
    "stages.two.until='2000 steps' save.every='100 steps' "
    "lr.peak=1e-3 lr.decay_start='1000 steps' lr.decay_end='2002 steps'"
)
# A batch that 2, 3 and 4 ranks can share.
TWELVE = f"{LONG} training.global_batch=12 training.micro_batch=1 stages.long.global_batch=12"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "slurm: starts a real Slurm on this machine (root, namespaces, slurm-wlm)"
    )


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three nodes of eight fake GPUs. Its folder is kept when a test failed to start it, for the logs."""
    reason = missing()
    if reason:
        pytest.skip(f"no Slurm here: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    with Cluster(folder / "c", nodes=3) as running:
        yield running
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def table(cluster: Cluster) -> FaultTable:
    """Collects what followed each fault; written where FAULT_TABLE says."""
    path = os.environ.get("FAULT_TABLE")
    version = cluster.run("sinfo", "--version").removeprefix("slurm-wlm ")
    return FaultTable(version, EVERY, Path(path) if path else None)


@dataclass
class User:
    """A folder with examples/tiny.yaml, from which the shipped script is submitted."""

    cluster: Cluster
    folder: Path
    run: Path

    def submit(self, *arguments: str, script: Path = SCRIPT, overrides: str = "", **environment: str) -> int:
        """sbatch of the shipped script, 2 nodes and one task a node unless `arguments` say otherwise."""
        settings = {
            "MODEL": "tiny",
            "VENV": sys.prefix,
            "PYTHONPATH": str(REPOSITORY),
            "SMOL_DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
            "PREFLIGHT": "0",
            "OVERRIDES": overrides,
        }
        shape = ("--nodes=2", "--ntasks-per-node=1", "--time=60", f"--chdir={self.folder}")
        return self.cluster.sbatch(*shape, *arguments, script, **(settings | environment))

    def cancel(self, job: int) -> None:
        """scancel, and wait until the ranks are gone."""
        self.cluster.run("scancel", job)
        self.until(lambda: not self.cluster.run("squeue", "-h", "-j", job), "end")

    def log(self, job: int) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"*-{job}*.log")))

    def _last_said(self) -> str:
        """The end of the logs of all jobs that this user submitted, and what Slurm says of those that it still knows."""
        said = [f"{path.name}: ...{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log"))]
        return "\n".join(
            [*said, self.cluster.run("squeue"), self.cluster.run("sinfo", "-N", "-o", "%N %T %E")]
        )

    def legs(self, event: str = "end") -> list[dict[str, Any]]:
        log = self.run / "legs.jsonl"
        return [row for row in last_rows(log, 1 << 30) if row["event"] == event]

    def lines(self) -> int:
        """Rows of metrics.jsonl: steps trained, and not yet taken back by a restart."""
        metrics = self.run / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0

    def ranks(self, job: int) -> list[int]:
        """Process ids of the job's ranks; none while it waits or starts."""
        if self.cluster.job(job)["JobState"] != "RUNNING":
            return []
        return [pid for node in self.cluster.names(job) for pid in self.cluster.tasks(node)]

    def is_over(self, job: int) -> bool:
        return self.cluster.job(job)["JobState"] in ENDED

    def until(self, ready: Any, what: str, seconds: float = 600) -> None:
        limit = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < limit, f"no {what} after {seconds} s; {self._last_said()}"
            time.sleep(0.05)

    def until_line(self, number: int, seconds: float = 600) -> None:
        """Wait until metrics.jsonl has so many lines."""
        self.until(lambda: self.lines() >= number, f"line {number}", seconds)

    def until_logged(self, job: int, text: str, times: int = 1, seconds: float = 600) -> None:
        self.until(lambda: self.log(job).count(text) >= times, f"'{text}' in the log of job {job}", seconds)


@pytest.fixture
def user(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> Iterator[User]:
    (tmp_path / "examples").mkdir()
    write_recipe(tiny_data, tmp_path).rename(tmp_path / "examples/tiny.yaml")
    yield User(cluster, tmp_path, tmp_path / "run")
    if jobs := cluster.run("squeue", "-h", "-o", "%A").split():
        cluster.run("scancel", *jobs)
    limit = time.monotonic() + 60
    while cluster.run("squeue", "-h") and time.monotonic() < limit:
        time.sleep(0.2)
    while (left := leftovers(cluster)) and time.monotonic() < limit:
        time.sleep(0.2)
    assert not left, "of a job that is over nothing stays on any node"


def leftovers(cluster: Cluster) -> dict[int, list[object]]:
    """Ranks, launchers and files in memory, by node."""
    found: dict[int, list[object]] = {}
    for node in (node for node in range(1, cluster.nodes + 1) if f"node{node}" in cluster.daemons):
        processes = [
            *cluster.tasks(node),
            *cluster.running(node, b"slurm.leg"),
            *cluster.running(node, b"srun"),
        ]
        found[node] = [*map(describe, processes), *cluster.left_in_memory(node)]
    return {node: things for node, things in found.items() if things}


@pytest.fixture(scope="session")
def whole(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The uninterrupted run on two ranks, without Slurm."""
    return _whole(tiny_data, tmp_path_factory.mktemp("whole"), 2)


@pytest.fixture(scope="session")
def whole_on_four(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return _whole(tiny_data, tmp_path_factory.mktemp("whole4"), 4)


@pytest.fixture(scope="session")
def whole_of_twelve(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """On one process, with batches of twelve."""
    return _whole(tiny_data, tmp_path_factory.mktemp("whole12"), 0, TWELVE)


@pytest.fixture(scope="session")
def whole_of_a_minute(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """For faults that Slurm takes half a minute to notice, while the ranks train on."""
    return _whole(tiny_data, tmp_path_factory.mktemp("minute"), 2, MINUTE)


def _whole(data: Path, folder: Path, ranks: int, overrides: str = LONG) -> TinyRun:
    run = TinyRun(write_recipe(data, folder), data, folder)
    done = run.train(*shlex.split(overrides), ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def assert_nothing_lost(user: User, whole: TinyRun) -> None:
    """Every metrics row once, and the weights and moments bit for bit, as if nothing had happened."""
    last = max((whole.run / "checkpoints").glob("long-*")).name
    assert rows(user.run / "metrics.jsonl") == rows(whole.run / "metrics.jsonl")
    assert rows(user.run / "validation.jsonl") == rows(whole.run / "validation.jsonl")
    assert weights_of(user.run, last) == weights_of(whole.run, last)
