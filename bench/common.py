"""What every bench shares: alternating runs, their spread, the machine, and the result file.

A bench is a module of this package with `measure() -> Outcome`; `python -m bench` runs each in a process of
its own, so that memory and threads of one do not reach another. Ours and the peer take turns in the same
run, and the ratio is taken turn by turn, so that what else the machine does hits both alike.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CORES = len(os.sched_getaffinity(0))
# More than this part of a core used by other processes, and the numbers are marked as noisy.
NOISY_CORES = 0.25


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def to_json(self) -> dict[str, float | int]:
        low, high = min(self.values), max(self.values)
        return {"median": self.median, "min": low, "max": high, "runs": len(self.values)}


@dataclass(frozen=True)
class Seconds:
    """Time of one piece of work: on the wall, and of processor time in this process and its finished children.

    On a quiet machine they agree for work on one core; on a shared one only the second means anything, as
    long as the work does not wait for a disk.
    """

    wall: float
    cpu: float


def timed(work: Callable[[], Any]) -> Seconds:
    """How long one call takes."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    work()
    return Seconds(time.perf_counter() - wall, cpu_seconds() - cpu)


@dataclass(frozen=True)
class Turns:
    """Seconds of ours and of the peer, turn by turn; `clock` is the one that the ratio is taken from."""

    ours: tuple[Seconds, ...]
    peer: tuple[Seconds, ...]
    clock: Literal["wall", "cpu"]

    @property
    def ratio(self) -> Spread:
        """How many times faster ours was, in each turn."""
        pairs = zip(self._read(self.ours), self._read(self.peer), strict=True)
        return Spread(tuple(peer / ours for ours, peer in pairs))

    def rates(self, amount: float) -> tuple[Spread, Spread]:
        """(ours, peer): amount a second, for work of `amount` a turn."""
        ours, peer = (Spread(tuple(amount / s for s in self._read(one))) for one in (self.ours, self.peer))
        return ours, peer

    def to_json(self) -> dict[str, Any]:
        both = {"ours": self.ours, "peer": self.peer}
        return {"clock": self.clock} | {
            f"{who}_{clock}_seconds": Spread(tuple(getattr(s, clock) for s in seconds)).to_json()
            for who, seconds in both.items()
            for clock in ("wall", "cpu")
        }

    def _read(self, seconds: Sequence[Seconds]) -> list[float]:
        return [getattr(one, self.clock) for one in seconds]


def take_turns(
    ours: Callable[[], Seconds], peer: Callable[[], Seconds], turns: int, clock: Literal["wall", "cpu"]
) -> Turns:
    """Call both `turns` times, the one that goes first changing each time."""
    taken: dict[Callable[[], Seconds], list[Seconds]] = {ours: [], peer: []}
    for turn in range(turns):
        for one in (ours, peer) if turn % 2 == 0 else (peer, ours):
            taken[one].append(one())
    return Turns(tuple(taken[ours]), tuple(taken[peer]), clock)


def cpu_seconds() -> float:
    """Processor time of this process and its finished children, finer than os.times()."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, who))


@dataclass(frozen=True)
class Outcome:
    """What a bench found. `ratio`: above 1 ours is better; `ours` and `peer` are for people."""

    ratio: Spread
    ratio_of: str
    peer_is: str
    ours: str
    peer: str
    details: dict[str, Any]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def run(name: str, measure: Callable[[], Outcome]) -> None:
    """Measure, print the ratio and write bench/results/<name>.json."""
    from megatron_smol.data.files import write_whole

    begin = time.perf_counter()
    with _watched() as around:
        outcome = measure()
    noisy = around["cores_used_by_others"] > NOISY_CORES
    result = {
        "name": name,
        "ratio": outcome.ratio.to_json(),
        "ratio_of": outcome.ratio_of,
        "peer_is": outcome.peer_is,
        "ours": outcome.ours,
        "peer": outcome.peer,
        "details": outcome.details,
        "settings": outcome.settings,
        "notes": outcome.notes,
        "noisy": noisy,
        **around,
        "seconds": round(time.perf_counter() - begin, 1),
        "command": f"python -m bench {name}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_whole(RESULTS / f"{name}.json", json.dumps(_rounded(result), indent=1) + "\n")
    print(f"\n{name}: {outcome.ratio_of}\n  ours {outcome.ours}\n  peer {outcome.peer} ({outcome.peer_is})")
    spread = f"{digits(min(outcome.ratio.values))} to {digits(max(outcome.ratio.values))}"
    print(f"  RATIO {digits(outcome.ratio.median)} ({spread}, {len(outcome.ratio.values)} turns)")
    for note in outcome.notes:
        print(f"  note: {note}")
    if noisy:
        print(f"  noisy: other processes used {around['cores_used_by_others']:.1f} of {CORES} cores")


def machine() -> dict[str, Any]:
    """The machine and the versions that made a number; nothing that names a host or a place."""
    import psutil

    packages = (
        "megatron-smol",
        "megatron-core",
        "torch",
        "transformers",
        "tokenizers",
        "splintr-rs",
        "numpy",
    )
    return {
        "cpu": _cpu_model(),
        "cores": CORES,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def peak_memory_bytes() -> int:
    """Most resident memory this process has had. (getrusage's also remembers the parent's.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: benches measure memory on Linux only")


def digits(ratio: float) -> str:
    """Three digits, and no exponent."""
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"


def say(text: str) -> None:
    """Progress, for who is waiting."""
    print(f"  {text}", file=sys.stderr, flush=True)


@contextmanager
def _watched() -> Iterator[dict[str, float]]:
    """Fills in how busy the machine was with other things, before and during the block."""
    import psutil

    found: dict[str, float] = {"load_average_before": round(os.getloadavg()[0], 2)}
    begin, busy, own = time.perf_counter(), _busy(psutil.cpu_times()), cpu_seconds()
    yield found
    others = (_busy(psutil.cpu_times()) - busy) - (cpu_seconds() - own)
    found["cores_used_by_others"] = round(max(0.0, others / (time.perf_counter() - begin)), 2)


def _busy(times: Any) -> float:
    return float(sum(times[:]) - times.idle - getattr(times, "iowait", 0.0))


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _rounded(value: Any) -> Any:
    """Four digits are more than a stopwatch knows."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return (
        [_rounded(item) for item in value]
        if isinstance(value, Sequence) and not isinstance(value, str)
        else value
    )
