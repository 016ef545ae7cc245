"""What users get wrong: one clear sentence, the right exit code, nothing lost. By the real command."""

from __future__ import annotations

import fcntl
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.conftest import train_tokenizer
from tests.tiny import TinyRun, environment, smol


def fails(tiny: TinyRun, code: int, *says: str, overrides: tuple[str, ...] = (), **extra: str) -> None:
    done = tiny.train(*overrides, **extra)
    assert done.returncode == code, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    for part in says:
        assert part in errors[0]


def copy_data(tiny: TinyRun) -> Path:
    """A copy of one source that a test may damage."""
    damaged = tiny.folder / "web"
    shutil.copytree(tiny.data / "web", damaged)
    return damaged


def test_misspelt_key(tiny: TinyRun) -> None:
    tiny.recipe.write_text(tiny.recipe.read_text().replace("mixture: {maths", "mixtur: {maths"))
    fails(tiny, 2, "'mixtur'", "did you mean 'mixture'?")


def test_weights_sum_to_1_1(tiny: TinyRun) -> None:
    tiny.recipe.write_text(tiny.recipe.read_text().replace("web: 0.9, code: 0.1", "web: 0.9, code: 0.2"))
    fails(tiny, 2, "1.1", "one")


def test_heads_not_divisible_by_tp(tiny: TinyRun) -> None:
    fails(tiny, 2, "tp", "3", overrides=("parallel.tp=3",))


def test_missing_shard(tiny: TinyRun) -> None:
    damaged = copy_data(tiny)
    (damaged / "shard-00000.bin").unlink()
    fails(tiny, 3, "shard-00000.bin", overrides=(f"sources.web.path={damaged}",))


def test_truncated_bin(tiny: TinyRun) -> None:
    damaged = copy_data(tiny)
    with (damaged / "shard-00000.bin").open("r+b") as file:
        file.truncate((damaged / "shard-00000.bin").stat().st_size - 2)
    fails(tiny, 3, "shard-00000.bin", "bytes", overrides=(f"sources.web.path={damaged}",))


def test_missing_source(tiny: TinyRun) -> None:
    fails(tiny, 3, "nowhere", overrides=("sources.web.path=nowhere",))


def test_data_of_another_tokenizer(tiny: TinyRun) -> None:
    other = train_tokenizer(tiny.folder / "other", vocab_size=500)
    fails(tiny, 3, "another tokenizer", overrides=(f"tokenizer={other}",))


def test_too_small_a_vocabulary(tiny: TinyRun) -> None:
    fails(tiny, 3, "model.vocab_size is 320", overrides=("model.vocab_size=320",))


def test_fp8_on_a_cpu(tiny: TinyRun) -> None:
    fp8 = ("stages.two.precision=fp8-tensorwise", "fp8.bf16_first=0", "fp8.bf16_last=0")
    fails(tiny, 2, "Transformer Engine", overrides=fp8)
    assert not tiny.run.exists(), "an error before step 1"


def test_ranks_that_cannot_share_the_batch(tiny: TinyRun) -> None:
    done = tiny.train("training.micro_batch=8", ranks=2)
    assert done.returncode != 0 and "2 data-parallel ranks cannot share evenly; allowed: 1" in done.stderr


def test_ranks_that_do_not_make_the_layout(tiny: TinyRun) -> None:
    fails(tiny, 2, "1 ranks cannot be divided into tp 2", overrides=("parallel.tp=2",))


def test_run_folder_of_another_recipe(tiny: TinyRun) -> None:
    assert tiny.train("stages.one.until=2 steps", "stages.anneal.from.before_end=1 steps").returncode == 0
    fails(
        tiny, 2, "stages.one.until", "another run_dir", overrides=("stages.anneal.from.before_end=1 steps",)
    )


def test_stages_in_another_order(tiny: TinyRun) -> None:
    assert tiny.train().returncode == 0
    text = tiny.recipe.read_text()
    anneal, long = text.index("  - name: anneal"), text.index("  - name: long")
    end = text.index("lr: {peak")
    tiny.recipe.write_text(text[:anneal] + text[long:end] + text[anneal:long] + text[end:])
    fails(tiny, 2, "stages[2].name is anneal, this recipe says long")


def test_a_branch_may_be_appended_to_a_finished_run(tiny: TinyRun) -> None:
    assert tiny.train().returncode == 0
    before = (tiny.run / "metrics.jsonl").read_text()
    text = tiny.recipe.read_text()
    end = text.index("lr: {peak")
    branch = "  - name: again\n    from: {stage: two, before_end: 3 steps}\n    tokens: 2 steps\n    mixture: {maths: 1}\n"
    tiny.recipe.write_text(text[:end] + branch + text[end:])
    done = tiny.train()
    assert done.returncode == 0 and "again branches off two at step 9" in done.stdout, done.stderr
    after = (tiny.run / "metrics.jsonl").read_text()
    assert after.startswith(before) and after.count("\n") == before.count("\n") + 2


def test_a_run_that_never_saved_does_not_lock_its_folder(tiny: TinyRun) -> None:
    fails(tiny, 2, "1 ranks cannot", overrides=("parallel.tp=2", "seed=7"))
    assert tiny.train("stages.one.until=4 steps", "stages.anneal.from.before_end=1 steps").returncode == 0


def test_two_jobs_in_one_run_folder(tiny: TinyRun) -> None:
    tiny.run.mkdir()
    with (tiny.run / ".lock").open("w") as held:
        held.write("job 7, process 9 on node3")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        fails(tiny, 2, "another job is training in", "(job 7, process 9 on node3)")
    assert tiny.train(SLURM_JOB_ID="8").returncode == 0, "what a dead job left is taken over"
    assert (tiny.run / ".lock").read_text().startswith("job 8, start 0.0, process ")


def test_a_damaged_branch_point_is_named(tiny: TinyRun) -> None:
    assert tiny.train("stages.one.until=6 steps").returncode == 0
    for later in ("anneal-00000007", "long-00000013", "anneal-00000006", "long-00000012", "long-00000010"):
        shutil.rmtree(tiny.run / "checkpoints" / later, ignore_errors=True)
    tensors = tiny.run / "checkpoints" / "one-00000004" / "__0_0.distcp"
    tensors.write_bytes(tensors.read_bytes()[:-7])
    fails(tiny, 4, "stage 'anneal' starts from", "one-00000004", "were written")


def test_an_error_is_told_once_under_torchrun(tiny: TinyRun) -> None:
    for overrides in (("sources.web.path=nowhere",), ("model.heads=3",)):
        done = tiny.train(*overrides, ranks=2)
        assert done.returncode != 0
        assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1, done.stderr


def test_checkpoint_of_another_model(tiny: TinyRun) -> None:
    assert tiny.train().returncode == 0
    (tiny.run / "recipe.yaml").unlink()
    fails(tiny, 4, "another model", "layers is 2", overrides=("model.layers=4",))


def test_data_that_grew_since_the_run_began(tiny: TinyRun) -> None:
    assert tiny.train().returncode == 0
    fails(tiny, 4, "source 'web' is not what it was", overrides=(f"sources.web.path={tiny.data}/code",))


def test_damaged_checkpoints_are_named_and_the_one_before_is_used(tiny: TinyRun) -> None:
    assert tiny.train().returncode == 0
    newest = tiny.run / "checkpoints" / "long-00000013" / "__0_0.distcp"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    done = tiny.train()
    assert done.returncode == 0
    assert f"damaged checkpoint passed over: {newest}" in done.stdout and "long-00000012" in done.stdout


def test_full_disk(tiny: TinyRun) -> None:
    """A limit on file size stands for a full disk: the kernel refuses the write in the middle of a save."""
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
        "from megatron_smol.cli import main; sys.argv[0] = 'smol'; main()"
    )
    command = [sys.executable, "-c", limited, "train", str(tiny.recipe)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 4, done.stderr
    assert "error: saving" in done.stderr and "the disk is full or limits" in done.stderr
    assert not list((tiny.run / "checkpoints").iterdir()), "nothing half-written is left"
    assert tiny.train().returncode == 0, "with space again, the same command goes on"


def test_port_taken(tiny: TinyRun) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ranks = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        fails(tiny, 2, f"127.0.0.1:{port}", "is the port taken", **ranks)


def test_unwritable_run_dir(tiny: TinyRun) -> None:
    (tiny.folder / "file").write_text("")
    done = tiny.train(f"run_dir={tiny.folder}/file/run")
    assert done.returncode in (2, 4) and "run_dir" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["train"], ["train", "missing.yaml"], ["plan", "missing.yaml"]])
def test_command_line_mistakes_exit_with_2(arguments: list[str]) -> None:
    done = subprocess.run(smol(*arguments), env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_plan_as_json_of_a_recipe_over_its_caps_exits_with_2(tiny: TinyRun) -> None:
    command = smol("plan", tiny.recipe, "sources.maths.max_epochs=0.001", "data.over_epochs=error", "--json")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "max_epochs" in done.stderr
    json.loads(done.stdout)
