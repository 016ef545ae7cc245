"""The scripts for what comes after training, unchanged: export, SFT and DPO as one job, evaluation as one a checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.post.made import conversations, pairs, write_rows
from tests.slurm.conftest import REPOSITORY, User
from tests.tiny import TinyRun, rows

pytestmark = [pytest.mark.slurm, pytest.mark.faults]
TAIL = """
tail:
  sft: {lr: 1e-3, epochs: 1, global_batch: 4, micro_batch: 2, seq_length: 64, save_every: 5 steps}
  dpo: {lr: 1e-4, epochs: 1, global_batch: 4, micro_batch: 2, seq_length: 64, save_every: 5 steps}
"""
# What examples/accelerate has, for processors.
ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
use_cpu: true
num_machines: 1
machine_rank: 0
main_training_function: main
"""


def test_tail_and_evaluation(user: User, tiny_data: Path) -> None:
    recipe = user.folder / "examples/tiny.yaml"
    recipe.write_text(recipe.read_text() + TAIL)
    assert TinyRun(recipe, tiny_data, user.folder).train().returncode == 0
    (user.folder / "cpu.yaml").write_text(ACCELERATE)
    settings = {
        "RUN": "run",
        "RECIPE": "examples/tiny.yaml",
        "VENV": sys.prefix,
        "PYTHONPATH": str(REPOSITORY),
        "SMOL_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "GPUS": "2",
        "ACCELERATE": "cpu.yaml",
        "SFT_DATA": str(write_rows(user.folder / "sft.jsonl", conversations(400))),
        "DPO_DATA": str(write_rows(user.folder / "dpo.jsonl", pairs(80))),
    }
    _tail_requeues_itself(user, settings)
    _one_job_a_checkpoint(user, settings)


def _tail_requeues_itself(user: User, settings: dict[str, str]) -> None:
    """Before the time limit, in the middle of SFT: the next leg goes on from its last checkpoint."""
    (user.folder / "runs").mkdir()
    job = user.cluster.sbatch(f"--chdir={user.folder}", REPOSITORY / "examples/tail.sh", **settings)
    log = user.folder / f"runs/smollm2-tail-{job}.log"

    def made_steps() -> bool:
        assert not user.is_over(job), log.read_text()[-3000:]
        metrics = user.run / "sft/metrics.jsonl"
        return metrics.is_file() and len(rows(metrics)) >= 12

    user.until(made_steps, "step 12 of SFT")
    user.cluster.run("scancel", "--batch", "--signal=USR1", job)
    ended = user.cluster.wait(job, seconds=900)
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "1", log.read_text()[-3000:]
    for name in ("sft", "dpo"):
        made = json.loads((user.run / name / "tail.json").read_text())
        steps = [row["step"] for row in rows(user.run / name / "metrics.jsonl")]
        assert steps == list(range(1, made["steps"] + 1)), "every step once"
    assert (user.run / "hf/config.json").is_file() and list(user.run.glob("report*.html"))


def _one_job_a_checkpoint(user: User, settings: dict[str, str]) -> None:
    """Side by side into one file of results; given again they have nothing left to ask."""
    # Of a few tokens: the context of the first stages is 32.
    choices = {"text": ["if", "or"], "label": ["A", "B"]}
    questions = [{"question": word, "choices": choices, "answerKey": "A"} for word in ("def", "for", "in")]
    (user.folder / "questions/arc_easy").mkdir(parents=True)
    write_rows(user.folder / "questions/arc_easy/test.jsonl", questions)
    asked = settings | {"TASKS": "arc_easy", "OPTIONS": "--data-dir questions"}
    wanted = {"one", "two", "anneal", "long", "sft", "dpo"}
    for turn in range(2):
        command = ["bash", str(REPOSITORY / "examples/eval.sh"), "run"]
        environment = user.cluster.environment(**asked)
        done = subprocess.run(command, cwd=user.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        jobs = [int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("Submitted")]
        assert len(jobs) == len(wanted)
        for job in jobs:
            log = user.folder / f"runs/smol-eval-{job}.log"
            assert user.cluster.wait(job, seconds=900)["JobState"] == "COMPLETED", log.read_text()[-3000:]
            assert log.read_text().count("done before") == turn, log.read_text()
        found = rows(user.run / "evals.jsonl")
        assert len(found) == len(wanted), "a row for each, none torn, none twice"
        assert {row["stage"] or Path(row["model"]).name for row in found} == wanted
