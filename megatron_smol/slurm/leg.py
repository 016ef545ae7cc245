"""One leg of a run: what the batch script becomes on the first node, from the job's start to its exit code.

    python -m megatron_smol.slurm.leg RECIPE [a.b=c]

A run that is finished already is left alone, in a second. Else: look at the nodes (preflight), train under srun,
decide (decide.py), write it down (legs.jsonl), requeue the job or leave. Reads the nodes, tasks and GPUs from the
environment that sbatch made; settings of its own:

    SPARES=0         nodes of the allocation that are held back; with --no-kill one takes a lost node's place
    PREFLIGHT=1      0: do not look at the nodes first
    FUTILE_LEGS=3    starts in a row without a new checkpoint after which the job stops for good
    ROOM_SECONDS=600 how long a start waits for the run folder's disk, if it is full or does not answer
    OVERRIDES=""     more a.b=c, in shell quoting
    ALERT=""         a command that is told how each leg ends (alert.py)
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_smol.data.files import write_whole
from megatron_smol.errors import EXIT_RESTART_ME, DiskError, UserError, is_away
from megatron_smol.recipe.load import load_recipe
from megatron_smol.recipe.plan import Plan, make_plan, resolve_sizes
from megatron_smol.slurm import alert, clients, legs, preflight
from megatron_smol.slurm.decide import (
    FUTILE_LEGS,
    UNREACHABLE,
    Action,
    Decision,
    Evidence,
    decide,
    decide_without_folder,
)
from megatron_smol.slurm.run_folder import RunFolder, patiently

# One rank that left: the others have so long to leave too (they save together) before they are ended.
WAIT_SECONDS = 30
PREFLIGHT_SECONDS = 180
STARTED_AGAIN = "started again elsewhere"
TRAINING = "preflight: training on"
LOG = Path("/proc/self/fd/1")  # where sbatch sends standard output
# What Slurm calls a job between scancel and its end. At its time limit it is COMPLETING too, and the reason tells them apart.
CANCELLED = ("CANCELLED", "COMPLETING", "COMPLETED")
TIMED_OUT, NOT_KNOWN = "TIMEOUT", "UNKNOWN"
# With less than this left of the job's time, a spare is of no use: ranks that left before the limit were asked to.
LEAST_SECONDS_IN_PLACE = 900.0


@dataclass
class Leg:
    """This start of the job. nodes: all of the allocation; needed: how many of them train."""

    arguments: list[str]  # RECIPE [a.b=c]
    plan: Plan
    job: str
    chain: str
    restart: int
    nodes: list[str]
    needed: int
    tasks_per_node: int
    attempt: int = 0
    signalled: list[int] = field(default_factory=list)

    @classmethod
    def from_environment(cls, arguments: list[str], signalled: list[int]) -> Leg:
        slurm = os.environ
        recipe = load_recipe(arguments[0], arguments[1:])
        plan = make_plan(recipe, resolve_sizes(recipe))
        plan.require_no_errors()
        nodes = clients.host_names(slurm["SLURM_JOB_NODELIST"])
        spares = int(slurm.get("SPARES", "0"))
        if not 0 <= spares < len(nodes):
            raise UserError(
                f"SPARES is {spares} and the job has {len(nodes)} nodes; keep at least one to train on"
            )
        return cls(
            arguments,
            plan,
            job=slurm["SLURM_JOB_ID"],
            chain=slurm.get("SLURM_ARRAY_JOB_ID", slurm["SLURM_JOB_ID"]),
            restart=int(slurm.get("SLURM_RESTART_COUNT", "0")),
            nodes=nodes,
            needed=len(nodes) - spares,
            tasks_per_node=_tasks_per_node(len(nodes)),
            signalled=signalled,
        )

    @property
    def run(self) -> Path:
        return self.plan.recipe.run_path

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.plan, self.say, lambda: bool(self.signalled))

    @property
    def _allowed_futile_legs(self) -> int:
        return int(os.environ.get("FUTILE_LEGS", FUTILE_LEGS))

    @property
    def has_spares(self) -> bool:
        return self.needed < len(self.nodes)

    @property
    def scratch(self) -> Path:
        """Small files of this attempt, in the run folder, which every node sees."""
        return self.run / "slurm" / f"{self.job}.{self.restart}.{self.attempt}"

    def say(self, line: str) -> None:
        with contextlib.suppress(OSError):  # the log may be on the disk that is full
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} leg: {line}", flush=True)

    def go(self) -> int:
        """Train until done, stopped, or requeued; the job's exit code."""
        try:
            return self._go()
        except (OSError, DiskError) as error:
            if not is_away(error):
                raise UserError(f"the run folder cannot be used: {error}") from error
            decision = decide_without_folder(
                str(error), self._starts_out_of_reach(), self._allowed_futile_legs
            )
            return self._end(decision, None)

    def _go(self) -> int:
        self.folder.require(self._trained_before)
        stands = self.folder.position()
        where = (
            f"nodes {','.join(self.nodes)}, {self.needed * self.tasks_per_node} ranks, run folder {self.run}"
        )
        self.say(f"job {self.job}, restart {self.restart}, {where}, from {stands.name}")
        if stands.finished:
            return self._end(decide(Evidence(0, finished=True)), stands)
        rows = self.folder.rows(self.run / legs.LEGS)
        if stop := legs.stopped_chain(rows, self.chain, self.job):
            self.say(
                f"the array's job {stop['job']} ended it: {stop['reason']} (exit code {stop['exit_code']})"
            )
            return int(stop["exit_code"])
        if [row.get("event") for row in rows[-1:]] == ["start"]:
            self._after_a_loss(rows, stands)
        while True:
            decision = self._attempt()
            stands = self.folder.position()
            if decision.action is not Action.RESTART or not self._again_in_place():
                return self._end(decision, stands)
            self._alert(decision.action, decision.reason, stands.name)
            self.attempt += 1

    # --- a start ----------------------------------------------------------------------------------------------

    def _after_a_loss(self, rows: list[dict[str, Any]], stands: legs.Position) -> None:
        """Slurm requeued the job, which it does a few times only: said before it holds the job, when nobody looks."""
        reason = "the leg before left no word: its node was lost, or it was killed"
        with contextlib.suppress(UserError):
            lost, most = legs.lost_legs(rows, self.job) + 1, clients.most_automatic_requeues()
            if lost >= most - 2:
                reason += (
                    f"; that was {lost} times, and Slurm may hold the job from {most} on, until somebody gives `scontrol "
                    f"release {self.job}` (newer versions: an administrator can raise MaxBatchRequeue)"
                )
        self.say(reason)
        self._alert("lost", reason, stands.name)

    def _trained_before(self) -> bool:
        """Not in the run folder, so that it can be told from one that was never made."""
        return (self.restart > 0 or self.attempt > 0) and TRAINING in _log()

    def _starts_out_of_reach(self) -> int:
        """In a row, this one included; no row can count them."""
        return _log().rpartition(TRAINING)[2].count(UNREACHABLE) + 1

    def _attempt(self) -> Decision:
        """Preflight, training, decision."""
        self.folder.require(self._trained_before)
        self.folder.require_checkpoints(self.chain)
        before = self.folder.position()
        row = {"job": self.job, "chain": self.chain, "restart": self.restart, "attempt": self.attempt}
        where = {"nodes": self.nodes, "host": os.uname().nodename}
        self._record({"event": "start", **row, "progress": before.progress, **where})
        started = time.time()
        code, nodes = EXIT_RESTART_ME, []
        if not self.folder.stop_file():
            try:
                self.folder.wait_for_room()
                nodes = self._fit_nodes()
                code = self._train(nodes) if nodes else 1
            except OSError as error:  # the run folder's disk is full, or away: as if a node were
                self.say(f"this start cannot write in the run folder: {error}")
                code = DiskError.exit_code
        decision = decide(self._evidence(code))
        after = self.folder.position()
        self._record(
            {
                "event": "end", **row, "progress": after.progress, "nodes": nodes, "code": code,
                "seconds": round(time.time() - started, 1), "action": decision.action, "reason": decision.reason,
                "exit_code": decision.exit_code,
            },
        )  # fmt: skip
        return decision

    def _record(self, row: dict[str, Any]) -> None:
        """A row of legs.jsonl. On a full disk the log has it instead, and the next leg sees from its number that one is
        missing."""
        try:
            legs.append_row(self.run / legs.LEGS, row)
        except OSError as error:
            self.say(f"{legs.LEGS} cannot be written ({error.strerror}): {json.dumps(row)}")

    def _evidence(self, code: int) -> Evidence:
        stands = self.folder.position()
        rows = self.folder.rows(self.run / legs.LEGS)
        last = self.folder.rows(self.run / "metrics.jsonl", 1 << 16)[-1:]
        return Evidence(
            code,
            rank_codes=tuple(row["code"] for row in self.folder.rows(self.scratch / "exits.jsonl")),
            finished=stands.finished,
            stop_file=self.folder.stop_file(),
            cancelled=signal.SIGTERM in self.signalled and self._state() in CANCELLED,
            futile_legs=legs.futile_legs(rows, self.chain, stands.progress, self.job, self.restart),
            allowed_futile_legs=self._allowed_futile_legs,
            checkpoint=stands.name,
            step=f"step {last[0]['step']} of '{last[0]['stage']}'" if last else "no step",
        )

    def _alert(self, event: str, reason: str, checkpoint: str) -> None:
        if command := os.environ.get("ALERT"):
            name = self.plan.recipe.name
            facts = {"run": name, "folder": str(self.run), "job": self.job, "restart": self.restart}
            facts |= {"event": event, "reason": reason, "checkpoint": checkpoint}
            if failed := alert.send(command, f"{name}, job {self.job}: {event}: {reason}", facts):
                self.say(f"the alert could not be sent: {failed}")

    def _state(self) -> str:
        try:
            job = clients.job(self.job, patient=True)
        except UserError:
            return NOT_KNOWN
        # Slurm lost sight of this node (its slurmd died, say) and started the job on others: that is not this leg's to end.
        if int(job.get("Restarts", self.restart)) != self.restart:
            return STARTED_AGAIN
        state = job["JobState"]
        return TIMED_OUT if state in CANCELLED and job.get("Reason") == "TimeLimit" else state

    def _fit_nodes(self) -> list[str]:
        """As many fit nodes as are needed, or none; who is not fit, and why, is said."""
        try:
            up = clients.answering(self.nodes)
        except UserError as error:
            self.say(f"preflight: {error}")
            return []
        unfit = {node: "Slurm calls it down or drained" for node in self.nodes if node not in up}
        fit = up
        if os.environ.get("PREFLIGHT", "1") != "0" and up:
            verdict = self._preflight(up)
            fit = verdict.fit
            unfit |= verdict.unfit
            for note in verdict.notes:
                self.say(f"preflight: {note}")
        for node, why in unfit.items():
            self.say(f"preflight: {node} is not fit: {why}")
            self.say(
                f"preflight: an operator can keep jobs off it: scontrol update NodeName={node} State=DRAIN Reason=..."
            )
        if len(fit) < self.needed:
            self.say(f"preflight: {len(fit)} of {len(self.nodes)} nodes are fit, {self.needed} are needed")
            return []
        self.say(f"{TRAINING} {','.join(fit[: self.needed])}")
        return fit[: self.needed]

    def _preflight(self, nodes: list[str]) -> preflight.Verdict:
        folder = self.scratch / "preflight"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        on_cpu = os.environ.get("SMOL_DEVICE") == "cpu" or "SLURM_GPUS_ON_NODE" not in os.environ
        per_node = 1 if on_cpu else self.tasks_per_node
        limit = float(os.environ.get("PREFLIGHT_SECONDS", PREFLIGHT_SECONDS))
        command = self._srun(nodes, per_node, "megatron_smol.slurm.preflight", str(folder))
        process = subprocess.Popen(command, env=self._environment(nodes, port_shift=1))
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            self.say(f"preflight: no end after {limit:.0f} s")
            process.terminate()
            process.wait()
        found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
        return preflight.judge(nodes, found)

    def _train(self, nodes: list[str]) -> int:
        self.scratch.mkdir(parents=True, exist_ok=True)
        command = self._srun(nodes, self.tasks_per_node, "megatron_smol.slurm.rank", "train", _held())
        return subprocess.run(command, env=self._environment(nodes)).returncode

    def _srun(
        self, nodes: list[str], per_node: int, module: str, first: str, before: list[str] | None = None
    ) -> list[str]:
        """--export=ALL: an sbatch --export=NONE would start the ranks without PATH. No --kill-on-bad-exit: a rank that
        leaves with 75 takes the others along by agreement; --wait ends those that do not follow. --no-kill: a lost
        node ends the step, not the job that holds a spare. --overlap: the batch step does not hold the nodes."""
        count = len(nodes)
        shape = [f"--nodes={count}", f"--ntasks={count * per_node}", f"--ntasks-per-node={per_node}"]
        rules = ["--export=ALL", "--kill-on-bad-exit=0", f"--wait={WAIT_SECONDS}", "--overlap"]
        where = [f"--nodelist={','.join(nodes)}", *(["--no-kill"] if self.has_spares else [])]
        python = [*(before or []), sys.executable, "-m", module, first, *self.arguments]
        return ["srun", *shape, *where, *rules, *python]

    def _environment(self, nodes: list[str], port_shift: int = 0) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k not in ("SLURM_DISTRIBUTION", "SLURM_NODELIST")}
        port = 20000 + (int(self.job) * 8 + self.attempt * 2 + port_shift) % 20000
        kept |= {"MASTER_ADDR": nodes[0], "MASTER_PORT": str(port), "SMOL_RUN_FOLDER": str(self.run)}
        kept |= {"SMOL_EXITS": str(self.scratch / "exits.jsonl"), "SMOL_ATTEMPT": str(self.attempt)}
        if cpus := kept.get("SLURM_CPUS_PER_TASK"):
            kept["SRUN_CPUS_PER_TASK"] = cpus  # srun does not inherit it since Slurm 22.05
        return kept

    def _again_in_place(self) -> bool:
        """Whether to try again inside this allocation: there is a spare, no signal asked the job to leave, and there is time.
        (The signal before the time limit reaches the ranks alone.)"""
        if not self.has_spares or self.signalled or self._state() != "RUNNING":
            return False
        try:
            return clients.seconds_left(self.job) > LEAST_SECONDS_IN_PLACE
        except UserError:
            return False

    def _end(self, decision: Decision, stands: legs.Position | None) -> int:
        """stands: where the run does, None where its folder could not be asked."""
        name = stands.name if stands else "not known"
        if decision.action is Action.DONE:
            mark: dict[str, Any] = {"job": self.job, "restart": self.restart, "checkpoint": name}
            try:
                (self.run / "slurm").mkdir(exist_ok=True)
                write_whole(self.run / "slurm" / f"{self.job}.done", json.dumps(mark) + "\n")
            except (DiskError, OSError) as error:  # done is what the checkpoints say
                self.say(f"the mark that says so could not be written: {error}")
        self.say(f"{decision.action}: {decision.reason} (exit code {decision.exit_code})")
        # Slurm leaves a job KillWait seconds after SIGTERM: the requeue first, an alert may take as long.
        in_a_hurry = signal.SIGTERM in self.signalled and decision.action is Action.RESTART
        if in_a_hurry:
            self._requeue()
        self._alert(decision.action, decision.reason, name)
        if decision.action is Action.RESTART and not in_a_hurry:
            self._requeue()
        return decision.exit_code

    def _requeue(self) -> None:
        """Put the job back into the queue under its own number, unless another one follows by itself."""
        if "SLURM_ARRAY_TASK_ID" in os.environ:
            is_last = os.environ["SLURM_ARRAY_TASK_ID"] == os.environ.get("SLURM_ARRAY_TASK_MAX")
            goes_on = (
                "this was the array's last; submit another to go on" if is_last else "the next one goes on"
            )
            self.say(f"element {os.environ['SLURM_ARRAY_TASK_ID']} of an array is not requeued: {goes_on}")
            return
        state = self._state()
        # Preempted: Slurm requeues it. Cancelled: nobody shall; so not either where it may have been and Slurm does not say.
        mine = ("RUNNING", TIMED_OUT, *([] if signal.SIGTERM in self.signalled else [NOT_KNOWN]))
        if state not in mine:
            self.say(f"not requeued from here: Slurm calls the job {state}")
            return
        try:
            clients.ask_patiently("scontrol", "requeue", self.job)
            self.say("requeued; the same job goes on in the same log")
        except UserError as error:
            self.say(f"{error}; submit the job again to go on")


def _tasks_per_node(nodes: int) -> int:
    """Ranks of a node. (sbatch says how many there are in all only where it was given a number of nodes, not a range.)"""
    if tasks := os.environ.get("SLURM_NTASKS"):
        return max(int(tasks) // nodes, 1)
    return int(os.environ.get("SLURM_NTASKS_PER_NODE", "1"))


def _held() -> list[str]:
    """A command prefix under which stop signals wait until the rank takes them (coreutils 8.31); else none.

    Without it they wait from the first line of rank.py on, and one that comes while Python starts kills the rank.
    """
    prefix = ["env", "--block-signal=USR1,TERM,INT"]
    return prefix if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0 else []


def _log() -> str:
    """What this job's starts have said so far, where sbatch was given --open-mode=append; "" where it is no file."""
    return LOG.read_text(errors="replace") if LOG.is_file() else ""


def main() -> None:
    """The job's exit code is `decide`'s; an error of the recipe leaves with its own code before anything starts."""
    if len(sys.argv) < 2 or "SLURM_JOB_ID" not in os.environ:
        print("error: this runs inside a Slurm job, as examples/smollm2_1.7b.sh starts it", file=sys.stderr)
        sys.exit(UserError.exit_code)
    signalled: list[int] = []  # Slurm gives the same signals to the ranks, which save and leave
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda number, _: signalled.append(number))
    arguments = [*sys.argv[1:], *shlex.split(os.environ.get("OVERRIDES", ""))]
    try:
        leg = patiently(lambda: Leg.from_environment(arguments, signalled), print, lambda: bool(signalled))
        code = leg.go()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        if command := os.environ.get("ALERT"):
            job = os.environ["SLURM_JOB_ID"]
            facts = {"job": job, "event": Action.STOP, "reason": str(error)}
            alert.send(command, f"job {job}: {Action.STOP}: {error}", facts)
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
