"""The shipped batch scripts: one text, and what `smol submit` would write asks Slurm for the same."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_smol.recipe.load import load_recipe
from megatron_smol.slurm.submit import Shape, code_version, render
from tests.tiny import environment, smol

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SIZES = ("1.7b", "360m", "135m")


def directives(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))


@pytest.mark.parametrize("size", SIZES)
def test_the_scripts_are_one_text(size: str) -> None:
    """They differ in the comment at the top, the name and the number of nodes, which fits the recipe's GPUs."""
    script, first = ((EXAMPLES / f"smollm2_{s}.sh").read_text() for s in (size, "1.7b"))

    def common(text: str) -> list[str]:
        return [re.sub(r"1\.7b|360m|135m|(?<=nodes=)\d+", "*", line) for line in text.splitlines()[3:]]

    assert common(script)[1:] == common(first)[1:]
    asked = directives(script)
    gpus = load_recipe(EXAMPLES / f"smollm2_{size}.yaml").parallel.gpus
    assert int(asked["nodes"]) * int(asked["gpus-per-node"]) == gpus
    assert subprocess.run(["bash", "-n", EXAMPLES / f"smollm2_{size}.sh"]).returncode == 0


def test_submit_asks_for_what_the_script_asks_for() -> None:
    recipe = load_recipe(EXAMPLES / "smollm2_1.7b.yaml")
    written, shipped = (
        directives(render(recipe, Shape(32))),
        directives((EXAMPLES / "smollm2_1.7b.sh").read_text()),
    )
    same = set(shipped) - {"job-name", "output"}
    assert {key: written[key] for key in same} == {key: shipped[key] for key in same}
    spare = render(recipe, Shape(32, spares=1, partition="big"))
    assert directives(spare)["nodes"] == "33" and "no-kill" in directives(spare)
    assert directives(spare)["partition"] == "big" and "SPARES=1" in spare


def test_all_memory_of_the_nodes_is_asked_for() -> None:
    assert directives(render(load_recipe(EXAMPLES / "smollm2_1.7b.yaml"), Shape(1)))["mem"] == "0"


def test_paths_that_sbatch_would_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is quoted is what sbatch itself reads back; without Slurm, only that it is quoted."""
    folder = tmp_path / "a #1 'b' \\"
    folder.mkdir()
    monkeypatch.chdir(folder)
    script = folder / "job.sh"
    script.write_text(render(load_recipe(EXAMPLES / "smollm2_1.7b.yaml", ["run_dir=run"]), Shape(1)))
    quoted = str(folder).replace("\\", "\\\\")
    assert directives(script.read_text())["chdir"] == f'"{quoted}"'
    if shutil.which("sbatch") is None:
        return
    (tmp_path / "slurm.conf").write_text("ClusterName=x\nSlurmctldHost=localhost\nAuthType=auth/none\n")
    env = environment(SLURM_CONF=str(tmp_path / "slurm.conf"), SLURM_CLUSTERS="")
    told = subprocess.Popen(["sbatch", "-vv", script], env=env, stderr=subprocess.PIPE, text=True)
    assert told.stderr is not None
    found = {}
    for line in told.stderr:  # it says what it has read, and then looks for a controller
        if "end of defined options" in line:
            break
        option, colon, value = line.removeprefix("sbatch: ").partition(":")
        found |= {option.strip(): value.strip()} if colon else {}
    told.kill()
    told.communicate()
    assert found["chdir"] == str(folder) and found["output"] == f"{folder}/run/slurm/%x-%j.log"


@pytest.mark.parametrize("more", [("--dry-run",), ()])
def test_a_layout_that_would_die_after_the_queue(tmp_path: Path, more: tuple[str, ...]) -> None:
    recipe = EXAMPLES / "smollm2_1.7b.yaml"
    command = smol("submit", recipe, "--nodes", 3, *more, f"run_dir={tmp_path}/run")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and list(tmp_path.iterdir()) == []
    assert (
        "a job of 24 ranks (8 on each of 3 nodes) cannot train smollm2-1.7b: training.global_batch"
        in done.stderr
    )


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    recipe = EXAMPLES / "smollm2_1.7b.yaml"
    command = smol("submit", recipe, "--nodes", 4, "--dry-run", f"run_dir={tmp_path}/run")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert directives(done.stdout)["nodes"] == "4"
    assert list(tmp_path.iterdir()) == []


def test_without_slurm(tmp_path: Path) -> None:
    """One sentence; the run folder keeps the script, which may be copied to where Slurm is."""
    recipe = EXAMPLES / "smollm2_1.7b.yaml"
    command = smol("submit", recipe, "--nodes", 4, f"run_dir={tmp_path}/run")
    done = subprocess.run(command, env=environment(PATH=str(tmp_path)), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "'sbatch' is not installed here" in done.stderr


def test_a_file_where_the_run_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    for run_dir in (tmp_path / "run", tmp_path / "run/below"):
        command = smol("submit", EXAMPLES / "smollm2_1.7b.yaml", f"run_dir={run_dir}")
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1 and "a file is where its folder should be" in done.stderr


def test_code_version() -> None:
    found = code_version()
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", found["version"])
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}", found["commit"])
