"""What the command in ALERT is told, and that nothing it does can hurt the job."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_smol.slurm.alert import send


def test_a_command_gets_json_and_words(tmp_path: Path) -> None:
    told = tmp_path / "told"
    command = f'cat > {told}; echo "$MESSAGE" >> {told}'
    assert send(command, "run a: 'done'", {"job": "7", "event": "done"}) == ""
    row, words = told.read_text().splitlines()
    assert json.loads(row) == {"message": "run a: 'done'", "job": "7", "event": "done"}
    assert words == "run a: 'done'"


def test_one_that_fails_says_why() -> None:
    assert send("echo no route >&2; exit 7", "m", {}) == "code 7: no route"
    assert send("exit 0", "m", {"long": "x" * 1_000_000}) == "", "one that does not read is no failure"


def test_one_that_hangs_is_left() -> None:
    assert send("sleep 60", "m", {}, seconds=0.2) == "no end after 0 s"
