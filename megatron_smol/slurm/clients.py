"""The few questions asked of Slurm's own commands, and the few orders given to them."""

from __future__ import annotations

import re
import subprocess
import time

from megatron_smol.errors import UserError

_AWAY = re.compile(
    "unable to contact|timed out|connection refused|connect failure|no answer in", re.IGNORECASE
)
PATIENCE_SECONDS = 600.0  # a controller that is updated or changes hosts
_POLL_SECONDS = 5.0


def ask_patiently(*command: str) -> str:
    """`ask` from inside a job, which a controller that is away for some minutes must not end."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return ask(*command)
        except UserError as error:
            if not _AWAY.search(str(error)) or time.monotonic() > until:
                raise
        time.sleep(_POLL_SECONDS)


def ask(*command: str, seconds: float = 60) -> str:
    """Standard output of a Slurm command; UserError with its own words when it refuses or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except FileNotFoundError:
        raise UserError(f"'{command[0]}' is not installed here; run this where jobs are submitted") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"'{' '.join(command)}' gave no answer in {seconds:.0f} s; is Slurm up?") from None
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"'{command[0]}' refused: {words or f'code {done.returncode}'}")
    return done.stdout.strip()


def host_names(node_list: str) -> list[str]:
    """node[1-3] as node1, node2, node3."""
    return ask("scontrol", "show", "hostnames", node_list).split()


def answering(nodes: list[str]) -> list[str]:
    """Those that Slurm does not call down, drained or silent (a `*` behind the state), in the given order."""
    rows = (
        line.split()
        for line in ask_patiently("sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", "%N %T").splitlines()
    )
    state = dict(rows)
    lost = ("down", "drain", "fail", "*", "reboot")
    return [node for node in nodes if not any(word in state.get(node, "down") for word in lost)]


def most_automatic_requeues() -> int:
    """How often Slurm itself requeues a job whose nodes it lost; it holds the job at the next one, until somebody
    releases it (slurm.conf, SchedulerParameters, max_batch_requeue; 5 where it is not set)."""
    found = re.search(r"max_batch_requeue=(\d+)", ask("scontrol", "show", "config"))
    return int(found[1]) if found else 5


def is_held(facts: dict[str, str]) -> bool:
    """Whether a job of `job` waits for `scontrol release`."""
    reason = facts.get("Reason", "").lower()
    return facts.get("JobState") == "REQUEUE_HOLD" or "held" in reason or "jobhold" in reason


def job(job_id: str, *, patient: bool = False) -> dict[str, str]:
    """`scontrol show job` as a mapping; UserError when Slurm no longer knows it."""
    text = (ask_patiently if patient else ask)("scontrol", "show", "job", job_id).split("\n\n")[0]
    return dict(item.split("=", 1) for item in text.split() if "=" in item)
