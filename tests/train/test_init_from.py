"""`init_from`: a run that starts from another one's weights, optimizer, or place; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.checkpoint.convert import from_hf, to_hf
from megatron_smol.checkpoint.folder import COMPLETE, read_checkpoint, write_json
from megatron_smol.errors import CheckpointError, UserError
from megatron_smol.recipe.load import load_recipe
from megatron_smol.recipe.schema import InitFrom
from megatron_smol.train import init_from
from tests.tiny import TinyRun, rows, write_recipe


def quiet(_: str) -> None: ...


@pytest.fixture(scope="module")
def base(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; its checkpoints of step 6 (end of stage one) and later are kept."""
    folder = tmp_path_factory.mktemp("base")
    done = TinyRun(write_recipe(tiny_data, folder), tiny_data, folder).train()
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def hf_folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "hf"
    to_hf(base / "checkpoints" / "one-00000006", out, say=quiet)
    return out


def started(tiny: TinyRun, path: Path, what: str = "weights") -> TinyRun:
    tiny.recipe.write_text(f"{tiny.recipe.read_text()}init_from: {{path: {path}, what: {what}}}\n")
    return tiny


def losses(run: Path) -> list[tuple[Any, ...]]:
    return [(row["stage"], row["step"], row["loss"], row["grad_norm"]) for row in rows(run / "metrics.jsonl")]


def test_all_goes_on_as_if_nothing_had_happened(base: Path, tiny: TinyRun) -> None:
    checkpoint = base / "checkpoints" / "one-00000006"
    # Without the branch, which would start before this checkpoint.
    text = tiny.recipe.read_text()
    branch = text[text.index("  - name: anneal") : text.index("  - name: long")]
    tiny.recipe.write_text(text.replace(branch, ""))
    done = started(tiny, checkpoint, "all").train()
    assert done.returncode == 0, done.stderr
    after = [row for row in losses(base) if row[0] == "two"]
    assert [row for row in losses(tiny.run) if row[0] == "two"] == after and len(after) == 6
    record = json.loads((tiny.run / init_from.RECORD).read_text())
    assert (record["what"], record["stage"], record["step"]) == ("all", "one", 6)
    assert record["path"] == str(checkpoint.resolve()) and COMPLETE in record["sha256"]


def test_weights_of_a_hugging_face_folder_at_two_tensor_parallel_ranks(
    base: Path, hf_folder: Path, tiny: TinyRun, tiny_data: Path, tmp_path: Path
) -> None:
    short = ("stages.one.until=2 steps", "stages.two.until=4 steps", "stages.long.tokens=1 steps",
             "stages.long.from.before_end=1 steps", "stages.anneal.from.before_end=1 steps")  # fmt: skip
    (tmp_path / "other").mkdir()
    single = TinyRun(write_recipe(tiny_data, tmp_path / "other"), tiny_data, tmp_path / "other")
    # In bf16 the optimizer has a copy of the weights of its own, which must be the new ones too.
    layout = ("parallel.tp=2", "training.precision=bf16")
    first = started(single, base / "checkpoints" / "one-00000006").train(*short, *layout, ranks=2)
    assert first.returncode == 0, first.stderr
    second = started(tiny, hf_folder).train(*short, *layout, ranks=2)
    assert second.returncode == 0, second.stderr
    assert "took the weights; optimizer, data and schedule start fresh" in second.stdout
    found, expected = losses(tiny.run), losses(single.run)
    assert [row[:2] for row in found] == [row[:2] for row in expected] and found[0][1] == 1
    assert [row[2] for row in found] == pytest.approx([row[2] for row in expected], rel=1e-5)
    untrained = next(row[2] for row in losses(base) if row[1] == 1)
    assert found[0][2] < untrained - 0.1  # the first batch is the base run's first, the weights are not


@pytest.mark.parametrize(
    ("what", "change", "message"),
    [
        ("all", None, r"what is 'all', but .* is a Hugging Face folder, which holds weights only"),
        (
            "weights",
            "ffn_size=96",
            r"a model with ffn_size 64, the recipe's model.ffn_size is 96; set it to 64",
        ),
        ("weights", "norm_eps=1e-6", r"a model with norm_eps 1e-05, the recipe's model.norm_eps is 1e-06"),
    ],
)
def test_a_hugging_face_folder_that_does_not_fit(
    hf_folder: Path, tiny: TinyRun, what: Any, change: str | None, message: str
) -> None:
    recipe = load_recipe(tiny.recipe, [f"model.{change}"] if change else [])
    with pytest.raises(UserError, match=message):
        init_from._open(hf_folder, InitFrom(path=str(hf_folder), what=what), recipe)


def test_checkpoints_that_do_not_fit(base: Path, hf_folder: Path, tiny: TinyRun, tmp_path: Path) -> None:
    recipe = load_recipe(tiny.recipe, [])
    imported = tmp_path / "imported"
    from_hf(str(hf_folder), imported, say=quiet)
    weights, everything = (InitFrom(path="x", what=what) for what in ("weights", "all"))
    assert init_from._open(imported, weights, recipe).stage == "imported"  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=r"what is 'all', but .*imported holds weights only"):
        init_from._open(imported, everything, recipe)
    state = json.loads((imported / "state.json").read_text())
    write_json(imported / "state.json", state | {"rope_interleaved": True})
    with pytest.raises(CheckpointError, match="interleaved rotary rows, and this trainer's are half-split"):
        init_from._open(imported, weights, recipe)
    one = base / "checkpoints" / "one-00000006"
    other = recipe.model_copy(update={"stages": recipe.stages[1:2]})
    with pytest.raises(
        CheckpointError, match=r"stands in stage 'one', which this recipe does not have \(two\)"
    ):
        init_from._open(one, everything, other)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        init_from._open(tmp_path / "gone", weights, recipe)


def test_another_tokenizer_is_refused(base: Path, hf_folder: Path, tiny: TinyRun, tmp_path: Path) -> None:
    shutil.copytree(tiny.data / "tokenizer", tmp_path / "other")
    document = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    document["model"]["merges"].pop()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(document))
    recipe = load_recipe(tiny.recipe, [f"tokenizer={tmp_path / 'other'}"])
    one = base / "checkpoints" / "one-00000006"
    for path in (one, hf_folder):
        init = InitFrom(path=str(path))
        found = init_from._open(path, init, recipe)
        with pytest.raises(CheckpointError, match=r"was trained with another tokenizer .* set tokenizer to"):
            init_from._check(found, init, recipe)
    bare = tmp_path / "bare"
    shutil.copytree(hf_folder, bare)
    (bare / "tokenizer.json").unlink()
    found = init_from._open(bare, InitFrom(path=str(bare)), recipe)
    with pytest.raises(CheckpointError, match="is not there, so it cannot be compared"):
        init_from._check(found, InitFrom(path=str(bare)), recipe)
    assert read_checkpoint(one).stage == "one"
