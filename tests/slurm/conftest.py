"""A cluster for the session, and a user's folder on it. Skipped, with the reason, where no cluster can be started."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.tiny import TinyRun, rows, write_recipe
from tests.train.test_run import weights_of

REPOSITORY = Path(__file__).parent.parent.parent
SCRIPT = REPOSITORY / "examples/smollm2_1.7b.sh"
# Long enough to be interrupted in: the second stage takes some seconds.
LONG = "stages.two.until='80 steps' save.every='20 steps'"
LAST = "long-00000081"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "slurm: starts a real Slurm on this machine (root, namespaces, slurm-wlm)"
    )
    config.addinivalue_line("markers", "faults: slow; run by `pytest -m faults tests/slurm`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "faults" in str(config.option.markexpr):
        return
    for item in items:
        if item.get_closest_marker("faults"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest -m faults tests/slurm"))


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


@dataclass
class User:
    """A folder with examples/tiny.yaml, from which the shipped script is submitted."""

    cluster: Cluster
    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

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
        shape = ("--nodes=2", "--ntasks-per-node=1", "--time=10", f"--chdir={self.folder}")
        return self.cluster.sbatch(*shape, *arguments, script, **(settings | environment))

    def log(self, job: int) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"*-{job}*.log")))

    def legs(self, event: str = "end") -> list[dict[str, Any]]:
        return [row for row in rows(self.run / "legs.jsonl") if row["event"] == event]

    def until(self, ready: Any, what: str, seconds: float = 600) -> None:
        limit = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < limit, f"no {what} after {seconds} s; the log: {self.log(1)[-3000:]}"
            time.sleep(0.05)

    def until_line(self, number: int, seconds: float = 600) -> None:
        """Wait until metrics.jsonl has so many lines."""
        metrics = self.run / "metrics.jsonl"
        self.until(
            lambda: metrics.is_file() and metrics.read_bytes().count(b"\n") >= number,
            f"line {number}",
            seconds,
        )

    def until_logged(self, job: int, text: str, times: int = 1, seconds: float = 600) -> None:
        self.until(lambda: self.log(job).count(text) >= times, f"'{text}' in the log of job {job}", seconds)


@pytest.fixture
def user(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> Iterator[User]:
    (tmp_path / "examples").mkdir()
    write_recipe(tiny_data, tmp_path).rename(tmp_path / "examples/tiny.yaml")
    yield User(cluster, tmp_path)
    if jobs := cluster.run("squeue", "-h", "-o", "%A").split():
        cluster.run("scancel", *jobs)
    limit = time.monotonic() + 60
    while cluster.run("squeue", "-h") and time.monotonic() < limit:
        time.sleep(0.2)


@pytest.fixture(scope="session")
def whole(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The uninterrupted run on two ranks, without Slurm."""
    return _whole(tiny_data, tmp_path_factory.mktemp("whole"), 2)


@pytest.fixture(scope="session")
def whole_on_four(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return _whole(tiny_data, tmp_path_factory.mktemp("whole4"), 4)


def _whole(data: Path, folder: Path, ranks: int) -> TinyRun:
    run = TinyRun(write_recipe(data, folder), data, folder)
    done = run.train("stages.two.until=80 steps", "save.every=20 steps", ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def assert_nothing_lost(user: User, whole: TinyRun) -> None:
    """Every metrics row once, and the weights bit for bit, as if nothing had happened."""
    assert rows(user.run / "metrics.jsonl") == rows(whole.run / "metrics.jsonl")
    assert rows(user.run / "validation.jsonl") == rows(whole.run / "validation.jsonl")
    assert weights_of(user.run, LAST) == weights_of(whole.run, LAST)
