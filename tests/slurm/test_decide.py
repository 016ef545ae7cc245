"""The restart decision without a cluster: every row of its table, and what counts as progress."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_smol.slurm.decide import Action, Evidence, decide
from megatron_smol.slurm.legs import append_row, futile_legs, last_rows, lost_legs


@pytest.mark.parametrize(
    ("seen", "action", "code", "says"),
    [
        (Evidence(0, finished=True), Action.DONE, 0, "published"),
        # Killed in teardown, after the last checkpoint: the run is done all the same.
        (Evidence(137, finished=True, stop_file="run/stop"), Action.DONE, 0, "published"),
        (Evidence(75), Action.RESTART, 75, "asked for a restart (saved on a signal"),
        # srun that started nothing.
        (Evidence(0), Action.RESTART, 75, "not finished"),
        (Evidence(137), Action.RESTART, 75, "SIGKILL"),
        (Evidence(138), Action.RESTART, 75, "SIGUSR1"),
        (Evidence(1), Action.RESTART, 75, "code 1"),
        (Evidence(75, stop_file="run/stop"), Action.STOP, 71, "remove it"),
        (Evidence(75, cancelled=True), Action.STOP, 71, "cancelled"),
        (Evidence(2), Action.STOP, 2, "the recipe"),
        (Evidence(3), Action.STOP, 3, "the data"),
        # A save that failed: a full disk, or a node that died during it. Tried again, not for ever.
        (Evidence(4), Action.RESTART, 75, "code 4"),
        (Evidence(4, futile_legs=3), Action.STOP, 70, "code 4"),
        (Evidence(6), Action.RESTART, 75, "code 6"),
        (Evidence(7), Action.RESTART, 75, "code 7"),
        (Evidence(137, rank_codes=(6, 1)), Action.RESTART, 75, "SIGKILL"),
        (Evidence(5), Action.STOP, 5, "training itself"),
        # One rank said why; those that waited for it were killed, and srun keeps the larger code.
        (Evidence(137, rank_codes=(3, 1, 1)), Action.STOP, 3, "the data"),
        (Evidence(1, rank_codes=(1, 1)), Action.RESTART, 75, "code 1"),
        (Evidence(137, futile_legs=2), Action.RESTART, 75, "SIGKILL"),
        (Evidence(137, futile_legs=3, step="step 9 of 'a'"), Action.STOP, 70, "step 9 of 'a' when it was ended"),
        (Evidence(75, futile_legs=3), Action.STOP, 70, "3 starts in a row"),
        (Evidence(1, futile_legs=3, allowed_futile_legs=5), Action.RESTART, 75, "code 1"),
        (Evidence(3, futile_legs=3), Action.STOP, 3, "the data"),
    ],
)  # fmt: skip
def test_table(seen: Evidence, action: Action, code: int, says: str) -> None:
    decision = decide(seen)
    assert (decision.action, decision.exit_code) == (action, code)
    assert says in decision.reason


def start(progress: tuple[int, int], chain: str = "7", restart: int = 0) -> dict[str, object]:
    return {"event": "start", "chain": chain, "job": chain, "restart": restart, "progress": list(progress)}


def test_what_counts_as_progress() -> None:
    rows = [
        start((0, 0), restart=0),
        start((0, 40), restart=1),
        {"event": "end", "chain": "7"},
        start((0, 40), restart=2),
        start((0, 40), chain="8"),
    ]
    assert futile_legs(rows, "7", (0, 40), "7", 2) == 2, "another job's starts do not count"
    assert futile_legs(rows, "7", (0, 60), "7", 2) == 0, "a new checkpoint was reached"
    # A damaged checkpoint was put aside and the run went back: the row is broken.
    assert futile_legs([*rows, start((0, 20), restart=3)], "7", (0, 20), "7", 3) == 1


def test_starts_whose_rows_could_not_be_written_count() -> None:
    """On a full disk no row is written for start after start: this must end too."""
    rows = [start((0, 0), restart=0), start((0, 40), restart=1)]
    assert futile_legs(rows, "7", (0, 40), "7", 3) == 3
    assert futile_legs([*rows, start((0, 40), restart=4)], "7", (0, 40), "7", 4) == 4
    # A new attempt inside the same start, and the next element of an array, leave no hole.
    assert futile_legs([*rows, start((0, 40), restart=1)], "7", (0, 40), "7", 1) == 2
    assert futile_legs([start((0, 40), restart=0)], "7", (0, 40), "8", 0) == 1
    assert futile_legs([], "7", (0, 0), "7", 2) == 3, "not even the first row could be written"


def test_rows_of_a_file_that_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "run/legs.jsonl"
    assert last_rows(path) == []
    for number in range(100):
        append_row(path, {"number": number})
    with path.open("a") as file:
        file.write('{"number": 10')
    assert [row["number"] for row in last_rows(path)] == list(range(100))
    append_row(path, {"number": 100})
    assert [row["number"] for row in last_rows(path)] == list(range(101))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:100]) + '{"number": 10')
    tail = [row["number"] for row in last_rows(path, tail_bytes=200)]
    assert tail == list(range(100 - len(tail), 100)) and 1 < len(tail) < 10


def test_legs_that_were_lost() -> None:
    rows = [
        {"event": event, "job": job}
        for event, job in (("start", "7"), ("start", "7"), ("start", "8"), ("end", "7"), ("start", "7"), ("start", "7"))
    ]  # fmt: skip
    assert lost_legs(rows, "7") == 2 and lost_legs(rows, "8") == 0
