"""SFT and DPO on a tiny model: it learns, stops where it should, and a killed run ends with the same bits."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_smol import cli
from megatron_smol.errors import CheckpointError, InUseError, RunError, UserError
from megatron_smol.post.output import Output
from tests.post.conftest import rows_of
from tests.post.made import COLOURS, QUICK, TUNING, conversations, run_dpo, run_sft, write_rows
from tests.tiny import environment, smol, wait_for

WEIGHTS = "model.safetensors"
DPO = ("lr=5e-3", "epochs=3")


def killed(command: str, model: Path, data: Path, output: Path, *settings: str, at_step: int) -> None:
    """Start the real command and end it with SIGKILL once it has made so many steps."""
    arguments = smol(command, model, "--data", data, "--output", output, *QUICK, *settings)
    process = subprocess.Popen(
        arguments,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for(output / "metrics.jsonl", at_step, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / "config.json").exists(), "it ended before it could be killed"


def without_time(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(path)]


def test_sft_learns(tuned: Path) -> None:
    heldout = [row["loss"] for row in rows_of(tuned / "validation.jsonl")]
    steps = rows_of(tuned / "metrics.jsonl")
    assert heldout[0] > 5  # knows nothing yet: ln 640 = 6.5
    assert heldout[-1] < 0.1
    assert [row["step"] for row in steps] == list(range(1, steps[-1]["step"] + 1))
    assert steps[-1]["tokens"] > steps[0]["tokens"] > 0
    assert list((tuned / "tensorboard").glob("events*"))
    record = json.loads((tuned / "tail.json").read_text())
    assert record["heldout_loss"] == heldout[-1] and record["steps"] == steps[-1]["step"]


def require_chat_model(folder: Path, things: list[str]) -> None:
    """Plain transformers: right answers, ended by <|im_end|>, as the template and the ids in the folder say."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    pipe = transformers.pipeline("text-generation", model=str(folder))
    for thing in things:
        turns = [{"role": "user", "content": f"Colour of 7 {thing}?"}]
        answer = pipe(turns, max_new_tokens=30, do_sample=False)[0]["generated_text"][-1]
        assert answer == {"role": "assistant", "content": COLOURS[thing]}
        ids = pipe.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert pipe.tokenizer.decode(ids["input_ids"][0]).endswith("<|im_start|>assistant\n")
        out = model.generate(**ids, max_new_tokens=30, do_sample=False)
        assert out[0, -1] == 2 and out.size(1) < ids["input_ids"].size(1) + 30
    config = model.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert model.generation_config.eos_token_id == 2 and pipe.tokenizer.eos_token == "<|im_end|>"


def test_the_output_is_a_chat_model_for_anyone(tuned: Path) -> None:
    require_chat_model(tuned, list(COLOURS))


def test_a_finished_output_is_not_made_again(base: Path, chat_rows: Path, tuned: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tuned.iterdir()}
    assert run_sft(base, chat_rows, tuned, *TUNING) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tuned.iterdir()}
    with pytest.raises(UserError, match=r"epochs 6.0 -> 1.0"):
        run_sft(base, chat_rows, tuned, *TUNING, "epochs=1")


def test_dpo_begins_at_ln_2_and_the_margin_rises(tuned: Path, pair_rows: Path, tmp_path: Path) -> None:
    assert run_dpo(tuned, pair_rows, tmp_path / "dpo", *DPO) == 0
    steps, heldout = (
        rows_of(tmp_path / "dpo" / "metrics.jsonl"),
        rows_of(tmp_path / "dpo" / "validation.jsonl"),
    )
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=5e-4)
    assert steps[0]["margin"] == pytest.approx(0, abs=1e-3)
    assert heldout[0]["loss"] == pytest.approx(math.log(2), abs=5e-4) and heldout[0][
        "margin"
    ] == pytest.approx(0, abs=1e-3)
    assert heldout[-1]["margin"] > 0.3 and heldout[-1]["loss"] < 0.6 and heldout[-1]["accuracy"] > 0.8
    require_chat_model(tmp_path / "dpo", ["sky"])


def test_the_reference_stays_where_it_was(tuned: Path, pair_rows: Path, tmp_path: Path) -> None:
    """The margin that training reports is that of the written model against the model it came from."""
    from megatron_smol.post.prepare import split
    from megatron_smol.recipe.schema import Dpo

    captured: dict[str, Any] = {}
    publish = Output.publish

    def keep(self: Output, written: Path, record: dict[str, Any]) -> None:
        assert written.parent == self.start, "beside the checkpoints, where no other start writes"
        captured["rows"] = split(self.work, Dpo(heldout_rows=500))[1]
        captured["rows"] = [dict(row) for row in captured["rows"]]
        publish(self, written, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Output, "publish", keep)
        run_dpo(tuned, pair_rows, tmp_path / "dpo", *DPO)
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dpo")
    before = transformers.AutoModelForCausalLM.from_pretrained(tuned)

    def logp(model: Any, row: dict[str, Any], answer: str) -> float:
        ids = torch.tensor([row["prompt_ids"] + row[answer]])
        with torch.no_grad():
            scores = model(ids).logits.log_softmax(-1)[0]
        places = range(len(row["prompt_ids"]), ids.size(1))
        return sum(float(scores[place - 1, ids[0, place]]) for place in places)

    margins = [
        0.5
        * sum(
            sign * (logp(after, row, a) - logp(before, row, a))
            for sign, a in ((1, "chosen_ids"), (-1, "rejected_ids"))
        )
        for row in captured["rows"]
    ]
    reported = rows_of(tmp_path / "dpo" / "validation.jsonl")[-1]["margin"]
    assert sum(margins) / len(margins) == pytest.approx(reported, rel=1e-3)


def test_a_killed_sft_ends_with_the_same_bits(
    base: Path, chat_rows: Path, tmp_path: Path, one_thread: None
) -> None:
    run_sft(base, chat_rows, tmp_path / "whole")
    killed("sft", base, chat_rows, tmp_path / "killed", at_step=5)
    assert run_sft(base, chat_rows, tmp_path / "killed") == 0
    same(tmp_path / "whole", tmp_path / "killed")


def test_a_killed_dpo_whose_last_checkpoint_is_damaged(
    tuned: Path, pair_rows: Path, tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dpo(tuned, pair_rows, tmp_path / "whole", *DPO)
    output = tmp_path / "killed"
    killed("dpo", tuned, pair_rows, output, *DPO, at_step=8)
    last = max(
        (output / ".work/start-1").glob("checkpoint-*/complete.json"),
        key=lambda p: int(p.parent.name.split("-")[1]),
    ).parent
    data = bytearray((last / "optimizer.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (last / "optimizer.pt").write_bytes(bytes(data))
    assert run_dpo(tuned, pair_rows, output, *DPO) == 0
    said = capsys.readouterr().err
    last = output / ".work/start-2" / last.name  # of the start that goes on
    assert f"checkpoint passed over: {last}/optimizer.pt does not have the checksum" in said
    assert "going on from" in said
    same(tmp_path / "whole", output)


def test_one_that_thaws_in_a_save_harms_no_later_start(
    base: Path, chat_rows: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sleeps in the middle of saving step 4; meanwhile the job's next start goes on, saves that step too, and is killed."""
    run_sft(base, chat_rows, tmp_path / "whole")
    output = tmp_path / "out"
    save = transformers.Trainer._save_optimizer_and_scheduler
    second: dict[Path, int] = {}

    def sleep_at_step_4(self: Any, folder: str) -> None:
        if self.state.global_step == 4:
            monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
            killed("sft", base, chat_rows, output, at_step=6)  # four rows are there
            second.update(written(output / ".work"))
        save(self, folder)

    monkeypatch.setattr(transformers.Trainer, "_save_optimizer_and_scheduler", sleep_at_step_4)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("LOCK_SECONDS", "0")
    with pytest.raises((RuntimeError, OSError, InUseError)):  # RuntimeError: its folder is gone
        run_sft(base, chat_rows, output)
    assert any(path.parent.name == "checkpoint-4" for path in second)
    assert second.items() <= written(output / ".work").items()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert run_sft(base, chat_rows, output) == 0
    same(tmp_path / "whole", output)


def written(folder: Path) -> dict[Path, int]:
    """Every file, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def same(whole: Path, continued: Path) -> None:
    assert (whole / WEIGHTS).read_bytes() == (continued / WEIGHTS).read_bytes()
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert without_time(whole / name) == without_time(continued / name)
    assert not (continued / ".work").exists()


def test_a_signal_saves_and_the_same_command_goes_on(
    base: Path, chat_rows: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_smol.post.monitor import Monitor

    run_sft(base, chat_rows, tmp_path / "whole")
    write = Monitor._write

    def signal_at_step_3(self: Monitor, name: str, kind: str, state: Any, logs: dict[str, Any]) -> None:
        write(self, name, kind, state, logs)
        if kind == "train" and state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Monitor, "_write", signal_at_step_3)
    assert run_sft(base, chat_rows, tmp_path / "stopped") == 75
    assert not (tmp_path / "stopped" / "config.json").exists()
    monkeypatch.undo()
    assert run_sft(base, chat_rows, tmp_path / "stopped") == 0
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "stopped" / WEIGHTS).read_bytes()


def test_two_ranks_learn_what_one_does(base: Path, chat_rows: Path, tmp_path: Path, one_thread: None) -> None:
    run_sft(base, chat_rows, tmp_path / "one", "micro_batch=2", "packing=false")
    arguments = ["--data", chat_rows, "--output", tmp_path / "two", *QUICK, "micro_batch=2", "packing=false"]
    command = smol("sft", base, *arguments, ranks=2)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("rows kept") == 1 and "accumulated x 2 ranks" in done.stderr
    one, two = rows_of(tmp_path / "one" / "metrics.jsonl"), rows_of(tmp_path / "two" / "metrics.jsonl")
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=2e-2)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two")


def test_two_ranks_save_in_one_folder(base: Path, chat_rows: Path, tmp_path: Path) -> None:
    arguments = ["--data", chat_rows, "--output", tmp_path / "out", *QUICK, "micro_batch=2"]
    broken = ["lr=1e30", "warmup_ratio=0"]  # ends with its checkpoints, not with a model
    command = smol("sft", base, *arguments, *broken, ranks=2)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert "no model was written" in done.stderr
    assert [path.name for path in (tmp_path / "out/.work").glob("start-*")] == ["start-1"]
    marks = [*(tmp_path / "out/.work/start-1").glob("checkpoint-*/complete.json")]
    for mark in marks:
        listed = json.loads(mark.read_text())["files"]
        assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} < listed.keys()
    assert marks


def test_a_model_that_is_broken_is_not_written(base: Path, chat_rows: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RunError,
        match="loss that is not a number, so no model was written; start over with a lower lr than 1e",
    ):
        run_sft(base, chat_rows, tmp_path / "out", "lr=1e30", "warmup_ratio=0")
    assert not (tmp_path / "out" / "config.json").exists()


def test_what_is_no_model_is_refused(tmp_path: Path, chat_rows: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"is a training checkpoint .* first run `smol convert to-hf"):
        run_sft(tmp_path / "run", chat_rows, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"has no config\.json, so it is no Hugging Face model folder"):
        run_sft(tmp_path, chat_rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(base: Path, tmp_path: Path, chat_rows: Path) -> None:
    shutil.copytree(base, tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<added {number}>" for number in range(100)])
    tokenizer.save_pretrained(tmp_path / "hf")
    with pytest.raises(
        CheckpointError, match=r"its tokenizer has 7\d\d ids and the model's vocabulary 640; they are not"
    ):
        run_sft(tmp_path / "hf", chat_rows, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_command_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "bad.jsonl", [*conversations(2), {"messages": []}])
    arguments = [
        "sft",
        base,
        "--data",
        rows,
        "--output",
        tmp_path / "out",
        "--strict",
        "lr=1e-3",
        "seq_length=64",
    ]
    monkeypatch.setattr("sys.argv", ["smol", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 3
    assert f"error: {rows}:3: no turns; mend the row" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # a row mended, the same command works
