"""Slurm's commands as a job asks them: a controller that is away for a while ends nothing, a refusal is told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_smol.errors import UserError
from megatron_smol.slurm import clients

AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


def command(folder: Path, words: str, times: int) -> str:
    """A program that fails so many times with these words, then answers."""
    program = folder / "scontrol"
    program.write_text(
        f"#!/bin/sh\necho x >> {folder}/asked\n"
        f'[ $(wc -l < {folder}/asked) -gt {times} ] || {{ echo "{words}" >&2; exit 1; }}\necho answer\n'
    )
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    "words",
    [
        AWAY,
        "slurm_load_jobs error: Zero Bytes were transmitted or received",
        "slurm_load_jobs error: Slurm backup controller in standby mode",
        "scontrol: error: Socket timed out on send/recv operation",
    ],
)
def test_a_controller_that_is_away_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setattr(clients, "_POLL_SECONDS", 0.01)
    assert clients.ask_patiently(command(tmp_path, words, 3)) == "answer"
    assert len((tmp_path / "asked").read_text().split()) == 4


def test_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(clients, "PATIENCE_SECONDS", 0.2)
    with pytest.raises(UserError, match="Unable to contact"):
        clients.ask_patiently(command(tmp_path, AWAY, 10**6))


def test_a_refusal_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Invalid job id"):
        clients.ask_patiently(command(tmp_path, "slurm_load_jobs error: Invalid job id specified", 10**6))
    assert len((tmp_path / "asked").read_text().split()) == 1


def test_nodes_that_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where users may not look at nodes, or the partition is hidden, sinfo lists none of them: that says nothing bad."""
    asked: list[tuple[str, ...]] = []
    listed = "n1 mixed\nn2 down*\nn3 drained\nn4 allocated"
    monkeypatch.setattr(clients, "ask", lambda *command: asked.append(command) or listed)
    assert clients.answering(["n1", "n2", "n3", "n4", "n5"]) == ["n1", "n4", "n5"]
    assert "-a" in asked[0], "also of hidden partitions"
