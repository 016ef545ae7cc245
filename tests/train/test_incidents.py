"""incidents.jsonl after a resume: what is decided again goes, what must not be forgotten stays; what status says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_smol.slurm.status import status
from megatron_smol.train.incidents import drop_undone, read_incidents, write_incident
from tests.slurm.test_status import write_run


def row(step: int, decision: str, **more: Any) -> dict[str, Any]:
    return {
        "stage": "one",
        "stage_index": 0,
        "step": step,
        "decision": decision,
        "reason": f"at {step}",
    } | more


def decisions(run: Path) -> list[tuple[int, str]]:
    return [(found["step"], found["decision"]) for found in read_incidents(run)]


def test_what_stays_after_a_resume(tmp_path: Path) -> None:
    rows = [
        row(3, "skip"),
        row(5, "note", lasting=True, what="straggler"),
        row(9, "rollback", to="one-00000004", skip=["one", 8, 12]),
        row(6, "restart", what="hang"),
        row(7, "note"),
        row(8, "stop"),
    ]
    for one in rows:
        write_incident(tmp_path, one)
    with (tmp_path / "incidents.jsonl").open("a") as file:
        file.write('{"torn')
    drop_undone(tmp_path, (0, 4))
    assert decisions(tmp_path) == [(3, "skip"), (5, "note"), (9, "rollback"), (6, "restart")]
    drop_undone(tmp_path, (0, 0))  # no checkpoint is left: the run starts over
    assert decisions(tmp_path) == [(5, "note"), (6, "restart")]


def test_status_tells_of_incidents(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, rows=50, steps=100)
    found = status(run)
    assert (found.incidents, found.hangs, found.stragglers, found.skipped_tokens) == (0, 0, [], 0)
    many = {
        "web": {"shard-00000": list(range(100_000))}
    }  # a row longer than what is usually read of a file's end
    write_incident(run, row(3, "skip", documents=many))
    write_incident(run, row(4, "note", what="straggler", rank=3, host="n1", lasting=True))
    write_incident(run, row(5, "restart", what="hang"))
    write_incident(run, row(5, "restart", what="lost rank"))
    (run / "ledger.json").write_text(json.dumps({"skipped_tokens": 256}))
    found = status(run)
    assert (found.incidents, found.hangs, found.lost_ranks, found.skipped_tokens) == (4, 1, 1, 256)
    assert (found.stragglers, found.last_incident) == (["rank 3 on n1"], "at 5")
