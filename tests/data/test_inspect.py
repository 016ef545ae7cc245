"""`smol inspect`: the right rows for a step, with their text, and no file read when none is asked for."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatron_smol.data.documents import DocumentPart
from megatron_smol.data.indexed import IndexedWriter
from megatron_smol.data.inspect import _listed, batch_of_step, inspect_batch
from megatron_smol.data.order import SourceOrder
from megatron_smol.data.stream import StageStream
from megatron_smol.errors import DataError, UserError
from megatron_smol.recipe.load import load_recipe
from megatron_smol.recipe.schema import Recipe

from .plans import Plan

RECIPE = """
name: tiny
run_dir: runs/tiny
tokenizer: {root}/tokenizer
model: {{layers: 1, hidden_size: 8, heads: 1, kv_heads: 1, ffn_size: 8, vocab_size: 256}}
sources:
  prose: {{path: {root}/prose, tokens: 4000}}
  code: {{path: {root}/code, tokens: 4000}}
training: {{seq_length: 8, global_batch: 4, micro_batch: 1, precision: fp32}}
stages:
  - {{name: stable, until: 10 steps, mixture: {{prose: 0.75, code: 0.25}}}}
  - {{name: decay, until: 20 steps, mixture: {{prose: 0.5, code: 0.5}}}}
  - name: long
    from: {{stage: decay, before_end: 5 steps}}
    tokens: 5 steps
    seq_length: 16
    mixture: {{code: 1}}
lr: {{peak: 1.0e-3}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe without any data."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(root=tmp_path))
    return load_recipe(path)


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    """The same sources as files: one character a token, so a window's text is a slice of the source's."""
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()))
    vocab = {symbol: number for number, symbol in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    made = {
        "prose": "".join(f"[line {i:3}] words. " for i in range(250)),
        "code": "".join(f"[b] {i:3}\n" for i in range(500)),  # looks like markup of the terminal
    }
    for name, text in made.items():
        writer = IndexedWriter(tmp_path / name, np.dtype(np.uint16))
        writer.add_document(tokenizer.encode(text).ids)
        writer.finalize()
    return made


def shown_json(capsys: pytest.CaptureFixture[str], *arguments: object, **options: int) -> dict[str, object]:
    inspect_batch(*arguments, as_json=True, **options)  # type: ignore[arg-type]
    shown: dict[str, object] = json.loads(capsys.readouterr().out)
    return shown


def test_index_only_needs_no_data(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    shown = shown_json(capsys, recipe, None, 3, True)
    assert (shown["stage"], shown["step"], shown["first_sample"], shown["also_in"]) == ("stable", 3, 8, [])
    assert isinstance(shown["seconds_to_order"], float) and shown["seconds_to_order"] > 0
    rows = shown["rows"]
    assert isinstance(rows, list) and len(rows) == 4
    assert [set(row) for row in rows] == [{"source", "epoch", "window"}] * 4
    assert sorted(row["source"] for row in rows) == ["code", "prose", "prose", "prose"]


def test_every_row_says_what_its_window_holds(
    recipe: Recipe, texts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for stage, step, length in (("stable", 10, 8), ("decay", 11, 8), ("long", 17, 16)):
        shown = shown_json(capsys, recipe, stage, step)
        rows = shown["rows"]
        assert isinstance(rows, list) and len(rows) == 4
        for row in rows:
            start = row["window"] * length
            assert row["text"] == texts[row["source"]][start : start + length]


def test_terminal_output_names_sources_and_keeps_brackets(
    recipe: Recipe, texts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    inspect_batch(recipe, "long", 16)
    shown = capsys.readouterr().out
    assert "stage long, step 16" in shown and "step 16 is also in decay: choose with --stage" in shown
    row = json.loads(json.dumps(shown_json(capsys, recipe, "long", 16)))["rows"][0]
    assert f"code  epoch 0  window {row['window']}\n" in shown
    (document,) = row["documents"]
    start = row["window"] * 16
    assert f"code: document 0 (tokens {start:,}..{start + 15:,} of 4,000)" in shown
    assert (document["shard"], document["document"], document["position"]) == ("code", 0, start)
    assert row["text"] in shown


def test_the_step_of_a_token(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps of 32 tokens, 64 in `long`, which leaves `decay` after 15 steps."""
    for token, expected in (
        (1, ("stable", 1)),
        (32, ("stable", 1)),
        (33, ("stable", 2)),
        (321, ("decay", 11)),
    ):
        shown = shown_json(capsys, recipe, None, 1, True, tokens=token)
        assert (shown["stage"], shown["step"]) == expected
    assert shown_json(capsys, recipe, "long", 1, True, tokens=15 * 32 + 65)["step"] == 17
    with pytest.raises(
        UserError, match=r"token 801 is not in the plan; allowed: stable 0\.\.320, .*long 480\.\.800"
    ):
        inspect_batch(recipe, None, 1, index_only=True, tokens=801)


def test_a_long_list_of_documents_is_cut_in_the_middle() -> None:
    parts = [DocumentPart("a", 7, 3, 5, 8, 0), *(DocumentPart("a", n, 0, 2, 2, 9) for n in (8, 9))]
    assert _listed(parts) == "a: document 7 (tokens 3..7 of 8), 8, 9"
    parts += [DocumentPart("b", 0, 0, 1, 1, 0), DocumentPart("b", 1, 0, 4, 9000, 0)]
    assert (
        _listed(parts)
        == "a: document 7 (tokens 3..7 of 8), 8, 9, ... 1 more ..., b: document 1 (tokens 0..3 of 9,000)"
    )


def test_text_of_missing_data_is_an_error(recipe: Recipe, texts: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "code.bin").unlink()
    with pytest.raises(DataError, match=r"code\.bin"):
        inspect_batch(recipe, None, 1)


def test_steps_run_from_one_to_the_end_of_their_stage() -> None:
    plan = Plan({name: SourceOrder(name, 4001, 16, 8) for name in ("a", "b")})
    first = plan.add({"a": Fraction(1)}, 8, 10, 4)
    plan.add({"b": Fraction(1)}, 8, 10, 2, first)
    plan.add({"b": Fraction(1)}, 16, 10, 3, first, branch_step=5)
    taken = []
    for step in range(1, 21):
        batch = batch_of_step(plan.stages, plan.orders, None, step)
        stage = plan.stage(batch.stage)
        assert len(batch.rows) == stage.global_batch
        whole = StageStream(stage, plan.orders).rows(0, stage.samples)
        assert np.array_equal(batch.rows.window, whole.window[batch.sample : batch.sample + len(batch.rows)])
        taken.append((batch.stage, batch.sample, batch.also_in))
    assert taken[0] == ("stage-0", 0, ())
    assert taken[5] == ("stage-0", 20, ("stage-2",))
    assert taken[9] == ("stage-0", 36, ("stage-2",))
    assert taken[10] == ("stage-1", 0, ("stage-2",))
    assert batch_of_step(plan.stages, plan.orders, "stage-2", 6).sample == 0


def test_steps_and_stages_that_do_not_exist(recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"step 0 .*stable 1\.\.10, decay 11\.\.20, long 16\.\.20"):
        inspect_batch(recipe, None, 0, index_only=True)
    with pytest.raises(UserError, match=r"step 21 is not in the plan"):
        inspect_batch(recipe, None, 21, index_only=True)
    with pytest.raises(UserError, match=r"step 11 is not in the plan; allowed: stable 1\.\.10$"):
        inspect_batch(recipe, "stable", 11, index_only=True)
    with pytest.raises(UserError, match="no stage 'stabel' in the recipe; did you mean 'stable'"):
        inspect_batch(recipe, "stabel", 1, index_only=True)
