"""The few questions asked of Slurm's own commands, and the few orders given to them."""

from __future__ import annotations

import math
import re
import subprocess
import time

from megatron_smol.errors import UserError

# What Slurm's commands say while its controller is away, starts, or hands over to another host.
_AWAY = re.compile(
    "unable to contact|timed out|connection|connect failure|no answer in|zero bytes|standby|socket|try again|unavailable"
    "|communication",
    re.IGNORECASE,
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
    """Those that Slurm does not call down, drained or silent (a `*` behind the state), in the given order.

    -a: also of hidden partitions. Where users may not look at nodes (PrivateData) it lists none: then they are taken to answer.
    """
    listed = ask_patiently("sinfo", "-a", "-h", "-N", "-n", ",".join(nodes), "-o", "%N %T")
    state = dict(line.split() for line in listed.splitlines())
    lost = ("down", "drain", "fail", "*", "reboot")
    return [node for node in nodes if not any(word in state.get(node, "") for word in lost)]


def seconds_left(job_id: str) -> float:
    """Until the time limit of a job that runs; infinity where it has none."""
    text = ask_patiently("squeue", "-h", "-j", job_id, "-o", "%L")
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not found:  # UNLIMITED, NOT_SET
        return math.inf
    days, hours, minutes, seconds = (int(number or 0) for number in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def most_automatic_requeues() -> int:
    """How often Slurm itself requeues a job whose batch host was lost and came back; at the next time it holds the job, until
    somebody releases it. 5, compiled in (seen with 22.05); later versions let slurm.conf say it (MaxBatchRequeue)."""
    found = re.search(r"MaxBatchRequeue\s*=\s*(\d+)", ask("scontrol", "show", "config"))
    return int(found[1]) if found else 5


def is_held(facts: dict[str, str]) -> bool:
    """Whether a job of `job` waits for `scontrol release`."""
    reason = facts.get("Reason", "").lower()
    return facts.get("JobState") == "REQUEUE_HOLD" or "held" in reason or "jobhold" in reason


def job(job_id: str, *, patient: bool = False) -> dict[str, str]:
    """`scontrol show job` as a mapping; UserError when Slurm no longer knows it."""
    text = (ask_patiently if patient else ask)("scontrol", "show", "job", job_id).split("\n\n")[0]
    return dict(item.split("=", 1) for item in text.split() if "=" in item)
