"""`smol eval` from the command line: models, checkpoints, stages; what is done stays done."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_smol import cli
from megatron_smol.checkpoint import folder as on_disk
from megatron_smol.checkpoint import store
from megatron_smol.evals.results import load_rows, read_samples
from tests.checkpoint.shapes import build, small_model, state
from tests.evals.conftest import arc_rows, random_model, write_rows
from tests.tiny import environment, smol


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Run `smol eval ...` in this process; returns exit code, stdout, stderr."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, os.environ[name])

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr("sys.argv", ["smol", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return run


def checkpoint(path: Path, tokenizer: Path, stage: str, step: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    said = state(small_model(), tokenizer) | {"stage": stage, "step": step, "tokens": step * 1000}
    store.save_model(build(small_model(), seed), path, said)


def test_what_has_a_result_is_not_asked_again(model: Path, data: Path, tmp_path: Path, command: Any) -> None:
    out = tmp_path / "evals.jsonl"
    arguments = (model, "--tasks", "arc_easy,piqa", "--data-dir", data, "--output", out)
    code, table, told = command(*arguments)
    assert (
        code == 0 and "arc_easy" in table and "acc_norm" in table and "arc_easy (1 of 2): 6 questions" in told
    )
    first = load_rows(out)
    assert [(r["task"], r["suite"], r["tokens"], r["n"]) for r in first] == [
        ("arc_easy", None, None, 6),
        ("piqa", None, None, 4),
    ]
    assert len(read_samples(out, first[0]) or []) == 6
    assert command(*arguments)[2].count("done before") == 2 and load_rows(out) == first

    # As after a kill: the first task is whole, the second one's row is torn.
    whole, torn = out.read_text().splitlines(keepends=True)
    out.write_text(whole + torn[: len(torn) // 2])
    told = command(*arguments)[2]
    assert "arc_easy (1 of 2): done before" in told and "piqa (2 of 2): 4 questions" in told
    assert [r["metrics"] for r in load_rows(out)] == [r["metrics"] for r in first]

    assert "done before" not in command(*arguments, "--again")[2] and len(load_rows(out)) == 4
    assert "done before" not in command(*arguments, "--limit", 2)[2] and load_rows(out)[-1]["n"] == 2


def test_changed_weights_and_changed_questions_are_asked(
    model: Path, data: Path, tmp_path: Path, tokenizer_folder: Path, command: Any
) -> None:
    own, questions = random_model(tmp_path / "m" / "own", tokenizer_folder, seed=1), tmp_path / "data"
    write_rows(questions / "arc_easy" / "test.jsonl", arc_rows(4))
    arguments = (own, "--tasks", "arc_easy", "--data-dir", questions)
    assert command(*arguments)[0] == 0 and "done before" in command(*arguments)[2]
    write_rows(questions / "arc_easy" / "test.jsonl", arc_rows(5))
    assert "done before" not in command(*arguments)[2]
    random_model(own, tokenizer_folder, seed=3)
    assert "done before" not in command(*arguments)[2]
    rows = load_rows(tmp_path / "m" / "evals.jsonl")  # beside the model
    assert [r["n"] for r in rows] == [4, 5, 5] and len({r["fingerprint"] for r in rows}) == 2


def test_the_end_of_every_stage(data: Path, tmp_path: Path, tokenizer_folder: Path, command: Any) -> None:
    run = tmp_path / "run"
    for stage, step, seed in (("one", 3, 1), ("one", 6, 2), ("two", 9, 3)):
        checkpoint(run / "checkpoints" / f"{stage}-{step:08d}", tokenizer_folder, stage, step, seed)
    stages = [{"name": name, "end_step": step} for name, step in (("one", 6), ("two", 9), ("three", 12))]
    (run / "plan.json").write_text(json.dumps({"stages": stages}))
    ends = [str(run / "checkpoints" / name) for name in ("one-00000006", "two-00000009")]
    assert command(run, "--stages", "--list")[1].split() == ends

    asked = ("--tasks", "arc_easy", "--data-dir", data)
    code, _, told = command(run, "--stages", *asked)
    assert code == 0, told
    rows = load_rows(run / "evals.jsonl")
    assert [(r["stage"], r["step"], r["tokens"], r["task"]) for r in rows] == [
        ("one", 6, 6000, "arc_easy"),
        ("two", 9, 9000, "arc_easy"),
    ]
    answers = [[s["answers"] for s in read_samples(run / "evals.jsonl", r) or []] for r in rows]
    assert answers[0] != answers[1]
    told = command(run, "--stages", *asked)[2]
    assert told.count("done before") == 2 and "exporting" not in told
    assert "done before" in command(run, *asked)[2]  # a run folder: its newest checkpoint

    random_model(run / "dpo", tokenizer_folder, seed=4)  # not whole yet: without tail.json
    assert command(run, "--stages", "--list")[1].split() == ends
    (run / "dpo" / "tail.json").write_text("{}")
    assert command(run, "--stages", "--list")[1].split() == [*ends, str(run / "dpo")]
    told = command(run, "--stages", *asked)[2]
    assert told.count("done before") == 2
    row = load_rows(run / "evals.jsonl")[-1]
    assert (row["model"], row["tokens"]) == (str(run / "dpo"), None)

    code, table, _ = command("--compare", *ends)
    assert code == 0 and "arc_easy" in table and f"A: {ends[0]}" in table and f"B: {ends[1]}" in table

    (run / "checkpoints" / "two-00000009" / on_disk.COMPLETE).unlink()
    code, _, told = command(ends[1], *asked)
    assert code == 4 and "has no complete.json" in told and told.count("error:") == 1


def test_the_mean_of_arc_is_a_row(
    model: Path, data: Path, tmp_path: Path, command: Any, monkeypatch: Any
) -> None:
    from megatron_smol.evals import suites

    small = {
        "tasks": suites._file()["tasks"],
        "suites": {
            "pair": {"about": "", "tasks": ["arc_easy", "piqa"], "means": {"both": ["arc_easy", "piqa"]}}
        },
    }
    monkeypatch.setattr(suites, "_file", lambda: small)
    out = tmp_path / "evals.jsonl"
    for _ in range(2):
        assert command(model, "--suite", "pair", "--data-dir", data, "--output", out)[0] == 0
    *parts, mean = load_rows(out)
    figures = [r["metrics"]["acc_norm"] for r in parts]
    assert (
        [r["task"] for r in parts] == ["arc_easy", "piqa"]
        and mean["task"] == "both"
        and mean["suite"] == "pair"
    )
    assert mean["metrics"]["mean"]["value"] == pytest.approx((figures[0]["value"] + figures[1]["value"]) / 2)
    assert mean["metrics"]["mean"]["stderr"] == pytest.approx(
        (figures[0]["stderr"] ** 2 + figures[1]["stderr"] ** 2) ** 0.5 / 2
    )
    assert mean["n"] == 10


def test_a_missing_gold_is_one_sentence_and_nothing_is_written(
    model: Path, tmp_path: Path, command: Any
) -> None:
    rows = arc_rows()
    rows[3]["answerKey"] = None
    write_rows(tmp_path / "arc_easy" / "test.jsonl", rows)
    out = tmp_path / "evals.jsonl"
    code, _, told = command(model, "--tasks", "arc_easy", "--data-dir", tmp_path, "--output", out)
    assert code == 3 and not out.exists()
    assert told.splitlines()[-1] == (
        "error: task arc_easy, question 4 of 6: no gold answer (answerKey is empty or missing); give every question "
        "its gold answer, or leave that row out"
    )


def test_bad_input_is_one_sentence(
    model: Path, other_model: Path, data: Path, tmp_path: Path, command: Any
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    cases: list[tuple[tuple[object, ...], int, str]] = [
        ((), 2, "name a MODEL to evaluate"),
        ((model,), 2, "either --suite (smollm2-base, smollm2-instruct, early-signal) or --tasks"),
        ((model, "--suite", "smollm2-base", "--tasks", "piqa"), 2, "either --suite"),
        ((model, "--suite", "smollm2"), 2, "there is no suite 'smollm2'; did you mean 'smollm2-base'?"),
        (
            (model, "--tasks", "piqa", "--data-dir", tmp_path / "no"),
            2,
            "is no folder; it holds TASK/SPLIT.jsonl",
        ),
        ((tmp_path / "no", "--tasks", "piqa"), 2, "no folder"),
        (
            (data, "--tasks", "piqa"),
            4,
            "is no model: a Hugging Face folder has config.json, a checkpoint complete.json",
        ),
        ((bare, "--tasks", "piqa"), 4, "has no tokenizer.json; save the model's tokenizer into that folder"),
        ((data, "--stages", "--tasks", "piqa"), 2, "--stages needs a run folder"),
        (
            (other_model, "--tasks", "piqa", "--data-dir", data, "--chat"),
            2,
            "has no chat template, so it is a base model",
        ),
        (("--compare", model, other_model), 2, "evaluate it first: smol eval"),
    ]
    for arguments, expected, sentence in cases:
        code, _, told = command(*arguments)
        errors = [line for line in told.splitlines() if line.startswith("error: ")]
        assert (code, len(errors)) == (expected, 1) and sentence in errors[0], (arguments, told)


def test_the_hub_cannot_be_reached(model: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        smol("eval", model, "--tasks", "openbookqa"),
        env=environment(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 3, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "error: task openbookqa: its data allenai/openbookqa could not be fetched from the hub"
    )
    assert "--data-dir" in last and "Traceback" not in done.stderr


def test_the_suites_are_listed_with_their_formulations(command: Any) -> None:
    code, listed, _ = command("--list")
    assert code == 0 and "smollm2-base" in listed and "inside the chat template" in listed
    assert "smollm2_mmlu_pro" in listed and "letter, up to ten options" in listed
