"""The power goes out before every flush and rename of a run: what was published is there, and the run goes on from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_smol.checkpoint import folder, store
from megatron_smol.checkpoint.staging import Staging
from megatron_smol.recipe.load import load_recipe
from megatron_smol.train.monitor import cut_back
from megatron_smol.train.state import open_run_folder
from tests import ranks
from tests.helpers import run_ranks
from tests.layouts import Layout
from tests.power import Cut, Disk
from tests.tiny import TinyRun, rows


def save_three_times(where: str) -> list[Cut]:
    """Into folders that are not there yet; each save removes the checkpoint before it, the last replaces its own step."""
    running, layout, staging = ranks.engine(Layout(1)), Layout(1), Staging()
    checkpoints = Path(where) / "run" / "checkpoints"
    with Disk(Path(where)).watched() as disk:
        for step in (2, 4, 4):
            ranks.train(running, layout, step, step + 1)
            store.begin_save(
                running,
                checkpoints / folder.checkpoint_name("one", step),
                {"stage": "one", "stage_index": 0, "step": step},
                160_000,
                staging,
                lambda: folder.prune(checkpoints, 1, lambda _: False) and None,
            ).finish()
            disk.promised = step
    return disk.cuts


def test_what_is_published_survives_a_power_cut_at_any_moment(tmp_path: Path) -> None:
    watched = tmp_path / "watched"
    watched.mkdir()
    [cuts] = run_ranks(save_three_times, 1, str(watched))
    assert len(cuts) > 60
    for number, cut in enumerate(cuts):
        after = tmp_path / str(number)
        cut.lay_out(after)
        checkpoints = after / "run" / "checkpoints"
        folder.remove_unfinished(checkpoints)
        said: list[str] = []
        found = folder.choose_newest(checkpoints, said.append)
        assert not said, (cut.call, said)
        if cut.promised is not None:
            assert found is not None and found.step >= cut.promised, f"before {cut.call}"
        shutil.rmtree(after)
    print(f"\n{len(cuts)} power cuts, after each of them what was published is whole")


def train_watched(recipe: str, overrides: list[str], where: str) -> list[Cut]:
    from megatron_smol.train.run import train
    from megatron_smol.train.signals import StopFlag

    with Disk(Path(where)).watched() as disk:
        assert train(load_recipe(Path(recipe), overrides), StopFlag()) == 0
    return disk.cuts


@pytest.fixture
def watched(tiny: TinyRun) -> tuple[Path, list[Cut]]:
    where = tiny.folder / "watched"
    where.mkdir()
    [cuts] = run_ranks(train_watched, 1, str(tiny.recipe), [f"run_dir={where}/run"], str(where))
    return where / "run", cuts


def test_a_run_folder_after_a_power_cut_is_this_runs_and_has_every_row(
    tiny: TinyRun, watched: tuple[Path, list[Cut]]
) -> None:
    """Up to the newest checkpoint; what comes after it is trained again."""
    run, cuts = watched
    whole = {name: rows(run / name) for name in ("metrics.jsonl", "validation.jsonl")}
    recipe, seen = load_recipe(tiny.recipe), set[object]()
    assert len(cuts) > 400
    for number, cut in enumerate(cuts):
        after = tiny.folder / str(number)
        cut.lay_out(after, without=".distcp")
        folder.remove_unfinished(after / "run/checkpoints")
        published = folder.list_checkpoints(after / "run/checkpoints")
        if (kept := (cut.tree.get("run/recipe.yaml"), bool(published))) not in seen:
            open_run_folder(recipe.model_copy(update={"run_dir": f"{after}/run"}))
            seen.add(kept)
        for name, expected in whole.items() if published else ():
            progress = published[-1].progress
            cut_back(after / "run" / name, progress)
            wanted = [row for row in expected if (row["stage_index"], row["step"]) <= progress]
            assert rows(after / "run" / name) == wanted, f"before {cut.call}"
        shutil.rmtree(after)
    print(
        f"\n{len(cuts)} power cuts of a run, after each of them its folder is whole up to its newest checkpoint"
    )
