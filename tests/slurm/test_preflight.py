"""Which node is named, from what the nodes saw; and what a node sees of itself."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.checkpoint.folder import WRITING, checkpoint_name, write_json
from megatron_smol.recipe.load import load_recipe
from megatron_smol.slurm import preflight
from megatron_smol.slurm.preflight import judge, look, room_needed
from tests.tiny import TinyRun

NODES = ["n1", "n2", "n3"]
FACTS = {"python": "3.11.7", "megatron-smol": "0.1.0", "torch": "2.13.0", "sources": "web:5:ab"}


def seen(**changes: Any) -> dict[str, Any]:
    facts = FACTS | {key: value for key, value in changes.items() if key in FACTS}
    row = {"facts": facts, "wrong": [], "clock": 1000.0, "group": "ok"}
    return row | {key: value for key, value in changes.items() if key not in FACTS}


def test_all_fit() -> None:
    verdict = judge(NODES, {node: seen() for node in NODES})
    assert (verdict.fit, verdict.unfit, verdict.notes) == (NODES, {}, [])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (None, "did not answer"),
        (seen(torch="2.11.0"), "torch is 2.11.0, on other nodes 2.13.0"),
        (seen(sources="web:4:cd"), "on other nodes web:5:ab"),
        (seen(wrong=["7 of 8 GPUs are visible"]), "7 of 8 GPUs"),
        (seen(clock=1009.0), r"\+9.0 s off"),
        (seen(clock=900.0), "-100.0 s off"),
    ],
)
def test_the_odd_one_is_named(row: dict[str, Any] | None, says: str) -> None:
    found = {node: seen() for node in NODES} | ({"n2": row} if row else {})
    if row is None:
        del found["n2"]
    verdict = judge(NODES, found)
    assert verdict.fit == ["n1", "n3"]
    assert list(verdict.unfit) == ["n2"]
    assert re.search(says, verdict.unfit["n2"])


def test_a_network_that_nobody_can_be_blamed_for() -> None:
    verdict = judge(NODES, {node: seen(group="RuntimeError: timed out") for node in NODES})
    assert verdict.fit == NODES and "timed out" in verdict.notes[0]


def test_what_a_node_sees(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(tiny.recipe)
    found = look(recipe)
    assert found["wrong"] == []
    assert "web:" in found["facts"]["sources"]

    gone = look(load_recipe(tiny.recipe, [f"sources.web.path={tiny.folder}/nowhere"]))
    assert len(gone["wrong"]) == 1 and "nowhere" in gone["wrong"][0]

    huge = look(
        load_recipe(tiny.recipe, ["model.hidden_size=65536", "model.layers=4000", "model.ffn_size=262144"])
    )
    assert any("GB free" in line for line in huge["wrong"])


def test_gpus(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A real nvidia-smi is not here: a script answers in its format, to see how its answers are judged."""
    monkeypatch.delenv("SMOL_DEVICE", raising=False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.setenv("PATH", str(tmp_path))
    recipe = load_recipe(tiny.recipe)
    assert "nvidia-smi gave no answer" in look(recipe)["wrong"][0]
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100, 570.1, 4, 0'\necho 'NVIDIA H100, 570.1, 9000, 3'\n")
    tool.chmod(0o755)
    found = look(recipe)
    assert found["facts"]["driver"] == "570.1"
    assert [line.split(" ")[2:4] for line in found["wrong"]] == [["has", "9000"], ["has", "3"]]
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert any("2 of 8 GPUs" in line for line in look(recipe)["wrong"])


def test_no_room_is_told(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(preflight.shutil, "disk_usage", refuse)
    assert any("Read-only" in line for line in look(load_recipe(tiny.recipe))["wrong"])


def test_room_for_the_next_checkpoint(tiny: TinyRun) -> None:
    """A disk that holds what the run keeps and one more is enough, also with what a killed save left."""
    recipe = load_recipe(tiny.recipe, ["save.keep_last=2"])
    checkpoints, one = recipe.run_path / "checkpoints", room_needed(recipe) // 2
    assert one > 0
    for step in (1, 2):
        path = checkpoints / checkpoint_name("one", step)
        path.mkdir(parents=True)
        write_json(path / "state.json", {"format": 2, "stage": "one", "stage_index": 0, "step": step})
        (path / "complete.json").touch()
        assert room_needed(recipe) == (one if step == 2 else 2 * one)
    left = checkpoints / f"{WRITING}one-00000003-abcd" / "deeper"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(bytes(one // 2))
    assert room_needed(recipe) == one - one // 2


def test_checkpoints_on_a_disk_that_is_not_mounted(tiny: TinyRun) -> None:
    tiny.run.mkdir(parents=True)
    (tiny.run / "checkpoints").symlink_to(tiny.folder / "not mounted")
    [told] = look(load_recipe(tiny.recipe))["wrong"]
    assert "link to nowhere" in told


def test_a_run_folder_is_not_made_where_it_is_missing(tiny: TinyRun) -> None:
    """On a node where its disk is not mounted it would hide that."""
    assert look(load_recipe(tiny.recipe))["wrong"] == [] and not tiny.run.exists()
