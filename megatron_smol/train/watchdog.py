"""A thread of every rank that sees when training stands still, says who holds it up, and ends the run to be restarted.

The trainer marks what it does (train/pulse.py); this thread publishes that (train/heartbeat.py) and waits. When a phase takes
longer than the recipe's guard allows, every rank's watchdog writes its rank's Python stacks to RUN/watchdog, one of
them names the rank that lags in the log and in incidents.jsonl, and all end with EXIT_RESTART_ME. A rank that
cannot run even this thread (stopped, or stuck with the interpreter's lock) is named by the others; it is ended by
them if it is on their host, else by the launcher, and a C timer (faulthandler) that needs no lock ends it as well.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path

from megatron_smol.errors import EXIT_RESTART_ME, InUseError
from megatron_smol.recipe.schema import Guard
from megatron_smol.train.heartbeat import (
    FOLDER,
    WHERE_CHARACTERS,
    Beat,
    Verdict,
    beat_path,
    judge,
    read_beats,
    said,
    stacks_path,
    write_beat,
)
from megatron_smol.train.hooks import Hook, StepDone
from megatron_smol.train.incidents import write_incident
from megatron_smol.train.lock import Claim
from megatron_smol.train.pulse import PAUSES, Pulse

LEAST_TIMEOUT_SECONDS, MEDIANS = 120.0, 10
# Steps of a stage that may be slow (compilation, cold caches), and over which the median is taken.
FIRST_STEPS, STEPS = 5, 64
# This thread sleeps for an interval; where that took so much longer, the process was stopped.
FROZEN_SECONDS = 5.0
# The C timer comes after this thread's own verdict, which takes as long as the file system needs to show all ranks' words.
LAST_RESORT_SECONDS, VERDICT_SECONDS = 30.0, 300.0
_COLLECTIVES = ("/torch/distributed/", "/megatron/core/distributed/", "/p2p_communication.py")
_HERE = "/megatron_smol/"


class Watchdog(Hook):
    """Watches `pulse`; a hook only to learn how long steps take. `with Watchdog(...)`: watches inside the block."""

    def __init__(self, run: Path, rank: int, world: int, pulse: Pulse, settings: Guard, claim: Claim) -> None:
        self._run, self._folder, self._rank, self._world = run, run / FOLDER, rank, world
        self._pulse, self._settings, self._claim = pulse, settings, claim
        self._host, self._started = socket.gethostname(), process_start(os.getpid()) or 0
        self._count = 0
        self._steps: deque[float] = deque(maxlen=STEPS)
        self._main = threading.main_thread().ident
        self._over = threading.Event()
        self._alone = threading.Lock()  # one verdict at a time
        # Many ranks write less often: a shared file system has other work.
        self._interval = min(max(0.5, world / 64), 10.0)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def on_stage_start(self, trainer: object, stage: object) -> None:
        self._steps.clear()

    def on_step(self, trainer: object, done: StepDone) -> None:
        if done.result.own_seconds:
            self._steps.append(done.seconds)

    # --- life -----------------------------------------------------------------------------------------------

    def __enter__(self) -> Watchdog:
        self._folder.mkdir(parents=True, exist_ok=True)
        beat_path(self._folder, self._rank).unlink(missing_ok=True)
        self._stacks = stacks_path(self._folder, self._rank).open("a")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()

    @property
    def allowed_seconds(self) -> float:
        """How long the phase may take that the main thread is in now."""
        settings, pulse = self._settings, self._pulse
        if pulse.phase in PAUSES or not self._steps:  # the first step compiles, connects, fills caches
            return settings.pause_timeout
        if settings.step_timeout is not None:
            return settings.step_timeout
        if len(self._steps) < FIRST_STEPS:
            return max(settings.pause_timeout, LEAST_TIMEOUT_SECONDS)
        return max(MEDIANS * statistics.median(list(self._steps)), LEAST_TIMEOUT_SECONDS)

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(self._interval):
            if time.monotonic() - looked > self._interval + FROZEN_SECONDS:
                self._leave_if_shut_out()  # before anything is written: a later start may write there now
            looked = time.monotonic()
            left = self._pulse.since + self.allowed_seconds - time.monotonic()
            last_resort = max(left, 0.0) + LAST_RESORT_SECONDS + 4 * self._interval
            faulthandler.dump_traceback_later(last_resort, exit=True, file=self._stacks)
            self._publish()
            if left < 0:
                self._alarm()

    def _publish(self) -> Beat:
        pulse = self._pulse
        self._count += 1
        where, waiting = self._main_thread()
        beat = Beat(
            self._rank, self._host, os.getpid(), self._started, self._count, pulse.stage_index, pulse.step,
            pulse.phase, round(time.monotonic() - pulse.since, 1), where, waiting,
        )  # fmt: skip
        with contextlib.suppress(OSError):  # a full disk is no hang
            write_beat(self._folder, beat)
        return beat

    def _main_thread(self) -> tuple[str, bool]:
        """Innermost frames of the main thread that are ours, and whether it is inside torch.distributed."""
        frame = sys._current_frames().get(self._main or 0)
        if frame is None:
            return "", False
        stack = traceback.extract_stack(frame)
        waiting = any(place in entry.filename for entry in stack[-4:] for place in _COLLECTIVES)
        ours = [entry for entry in stack if _HERE in entry.filename][-2:]
        shown = [*ours, *(stack[-1:] if not ours or stack[-1] is not ours[-1] else [])]
        where = " > ".join(f"{Path(s.filename).name}:{s.lineno} {s.name}" for s in shown)
        return where[:WHERE_CHARACTERS], waiting

    # --- when something is wrong ----------------------------------------------------------------------------

    def _alarm(self) -> None:
        self._leave_if_shut_out()
        faulthandler.dump_traceback_later(VERDICT_SECONDS, exit=True, file=self._stacks)
        pulse = (self._pulse.phase, self._pulse.since)
        self._write_stacks(f"{self._pulse.phase} for {time.monotonic() - self._pulse.since:.0f} s")
        verdict = self._look_around()
        if verdict.moving or pulse != (self._pulse.phase, self._pulse.since):
            return  # slow, not hanging
        if verdict.teller == self._rank:
            hang = "hang" if verdict.lagging else "hang of all ranks"
            self._tell(verdict, hang, f"no progress for {time.monotonic() - self._pulse.since:.0f} s")
        else:
            time.sleep(4 * self._interval)  # let the teller write
        for beat in verdict.silent:
            self._end(beat)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_RESTART_ME)

    def explain(self, what: str) -> None:
        """After an error that another rank may have caused (a closed connection, a collective that timed out): say who."""
        with contextlib.suppress(OSError):
            verdict = self._look_around()
            if verdict.teller == self._rank and verdict.lagging and self._claim.holds():
                gone = all(beat in verdict.silent for beat in verdict.lagging)
                self._tell(verdict, "lost rank" if gone else "hang", what)

    def _leave_if_shut_out(self) -> None:
        """A rank that was frozen and finds its peers gone is no hang of the run that a later start of its job goes on with."""
        try:
            self._claim.require()
        except InUseError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(error.exit_code)
        except OSError:
            return  # the file system is what hangs

    def _look_around(self) -> Verdict:
        with self._alone:
            self._publish()
            time.sleep(2 * self._interval)
            first = read_beats(self._folder, self._world)
            for _ in range(4):
                time.sleep(self._interval)
                self._publish()
            return judge(first, read_beats(self._folder, self._world))

    def _tell(self, verdict: Verdict, what: str, seen: str) -> None:
        """Log, terminal and incidents.jsonl."""
        reason = f"{seen}: {said(verdict)} ({verdict.why}); stacks of all ranks are in {self._folder}"
        lines = [f"!! {reason}"]
        for beat in verdict.lagging[:2]:
            if beat not in verdict.silent:
                lines.append(f"   rank {beat.rank} is at {beat.where}")
        with (self._run / "log.txt").open("a") as log:
            log.writelines(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n" for line in lines)
        print("\n".join(lines), file=sys.stderr, flush=True)
        place = {"stage_index": self._pulse.stage_index, "step": self._pulse.step + 1}
        ranks = [
            {"rank": b.rank, "host": b.host, "phase": b.phase, "step": b.step + 1, "where": b.where}
            for b in verdict.lagging
        ]
        row = place | {"what": what, "decision": "restart", "reason": reason, "ranks": ranks}
        write_incident(self._run, row)

    def _write_stacks(self, what: str) -> None:
        with contextlib.suppress(OSError):
            where = f"rank {self._rank} on {self._host}, step {self._pulse.step + 1}, {what}"
            self._stacks.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {where}\n")
            self._stacks.flush()
            faulthandler.dump_traceback(self._stacks, all_threads=True)

    def _end(self, beat: Beat) -> None:
        """Kill a rank of this host that does not answer, so that nothing is left of the job."""
        if beat.host == self._host and process_start(beat.pid) == beat.started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(beat.pid, signal.SIGKILL)


def process_start(pid: int) -> int | None:
    """When a process of this host started (clock ticks since boot); None when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])
