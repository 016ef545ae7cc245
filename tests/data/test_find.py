"""`smol inspect --find`: every reading of a text, no other, whatever the tokenizer made of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from megatron_smol.cli import app
from megatron_smol.data import find
from megatron_smol.data.documents import Documents
from megatron_smol.data.find import Finder, Hit, Timetable
from megatron_smol.data.indexed import IndexedWriter
from megatron_smol.data.inspect import batch_of_step, inspect_text
from megatron_smol.data.source import TokenSource, load_source
from megatron_smol.data.tokenizer import Tokenizer
from megatron_smol.errors import DataError, UserError
from megatron_smol.recipe.load import parse_recipe
from megatron_smol.recipe.plan import Plan, make_plan, resolve_sizes

from .plans import Plan as AnyPlan
from .plans import plans

RECIPE = """
name: tiny
run_dir: runs/tiny
tokenizer: {tokenizer}
model: {{layers: 1, hidden_size: 8, heads: 1, kv_heads: 1, ffn_size: 8, vocab_size: 600}}
data: {{holdout_tokens: 40}}
sources: {{prose: {{path: {root}/prose}}, code: {{path: {root}/code}}}}
training: {{seq_length: 8, global_batch: 4, micro_batch: 1, precision: fp32}}
stages:
  - {{name: stable, until: 60 steps, mixture: {{prose: 0.75, code: 0.25}}}}
  - {{name: decay, until: 100 steps, mixture: {{prose: 0.5, code: 0.5}}}}
  - name: long
    from: {{stage: decay, before_end: 20 steps}}
    tokens: 5 steps
    seq_length: 16
    mixture: {{prose: 1}}
lr: {{peak: 1.0e-3}}
"""
DOCUMENTS = [f"Chapter {n}: the café of naïve 東京 plans, 12{n} steps. Don't count!\n" * 3 for n in range(40)]


def write(prefix: Path, tokenizer: Tokenizer, documents: list[str], eod: bool = True) -> TokenSource:
    with IndexedWriter(prefix, np.uint16) as writer:
        for ids in tokenizer.encode_batch(documents):
            writer.add_document([*ids.tolist(), *([tokenizer.eod_id] if eod else [])])
        writer.finalize()
    return load_source(prefix)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    root = tmp_path_factory.mktemp("find")
    write(root / "prose", tokenizer, [*DOCUMENTS, "The very last words."])
    write(root / "code", tokenizer, [f"def step_{n}(x):\n    return {n}\n" for n in range(80)])
    return root


@pytest.fixture(scope="module")
def plan(root: Path, tokenizer_folder: Path) -> Plan:
    recipe = parse_recipe(RECIPE.format(root=root, tokenizer=tokenizer_folder))
    return make_plan(recipe, resolve_sizes(recipe))


def hits(text: str, tokenizer: Tokenizer, source: TokenSource) -> list[Hit]:
    return list(Finder(text, tokenizer).hits("prose", source, lambda _: None))


@pytest.mark.parametrize(
    "text", ["Chapter 7:", "hapter 1", "é of na", "東", "!\nChap", "Don't", "12", "steps. Don't count!\n"]
)
@pytest.mark.parametrize("stretch", [1 << 20, 7])
def test_a_text_is_found_wherever_the_tokenizer_cut(
    text: str, stretch: int, root: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find, "STRETCH_TOKENS", stretch)
    source = load_source(root / "prose")
    found = hits(text, tokenizer, source)
    assert [hit.document.document for hit in found] == [
        number for number, document in enumerate(DOCUMENTS) for _ in range(document.count(text))
    ]
    for hit in found:
        spelled = tokenizer.decode(source.read(hit.start, hit.stop - hit.start))
        assert text in spelled or "\ufffd" in spelled  # a token may end inside a character
        for start, stop in ((hit.start + 1, hit.stop), (hit.start, hit.stop - 1)):  # and not a token too many
            assert text not in tokenizer.decode(source.read(start, stop - start))


def test_nothing_is_found_across_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    apart = write(tmp_path / "a", tokenizer, ["one two", "one ", "two"])
    assert len(hits("one two", tokenizer, apart)) == 1
    assert not hits("<|endoftext|>", tokenizer, apart)  # control tokens are no text
    joined = write(tmp_path / "b", tokenizer, ["one two", "one ", "two", "one two"], eod=False)
    assert [hit.document.document for hit in hits("one two", tokenizer, joined)] == [0, 3]


def test_an_id_beyond_the_vocabulary_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with IndexedWriter(tmp_path / "s", np.uint16) as writer:
        writer.add_document([1, 60_000])
        writer.finalize()
    with pytest.raises(DataError, match="id 60000 is not in the vocabulary"):
        hits("x", tokenizer, load_source(tmp_path / "s"))


@settings(max_examples=60, deadline=None)
@given(plans(), st.data())
def test_a_timetable_names_every_read_and_no_other(plan: AnyPlan, data: st.DataObject) -> None:
    """Against the rows of all batches of all stages."""
    name = data.draw(st.sampled_from(sorted(plan.orders)))
    tokens = plan.orders[name].tokens
    start = data.draw(st.integers(0, tokens - 1))
    stop = data.draw(st.integers(start + 1, min(tokens, start + 40)))
    found = Timetable(plan.stages, plan.orders).reads(name, start, stop, [s.name for s in plan.stages])
    expected = []
    for stage in plan.stages:
        for step in range(stage.start_step + 1, stage.end_step + 1):
            rows = batch_of_step([stage], plan.orders, None, step).rows  # type: ignore[list-item]
            for row, (index, epoch, window) in enumerate(
                zip(rows.source.tolist(), rows.epoch.tolist(), rows.window.tolist(), strict=True)
            ):
                first = window * stage.seq_length
                if rows.names[index] == name and first < stop and start < first + stage.seq_length:
                    expected.append((stage.name, step, row, epoch, window))
    assert [(r.stage, r.step, r.row, r.epoch, r.window) for r in found] == expected
    for read in found:
        leaves = {
            leaf.name for leaf in plan.stages if read.step <= dict(spans(plan, leaf.name)).get(read.stage, -1)
        }
        assert set(read.lineages) <= leaves and read.lineages


def spans(plan: AnyPlan, leaf: str) -> list[tuple[str, int]]:
    """(stage, its last step that belongs to the lineage of `leaf`)."""
    path = plan.lineage(plan.stage(leaf))
    return [(stage.name, stage.start_step + samples // stage.global_batch) for stage, samples in path]


def test_lineages_share_the_trunk_up_to_their_branch(plan: Plan) -> None:
    timetable = Timetable(plan.stages, plan.orders)
    assert timetable.lineage_count == 2
    assert timetable.lineages("stable", 60) == ("decay", "long")
    assert timetable.lineages("decay", 80) == ("decay", "long")
    assert timetable.lineages("decay", 81) == ("decay",)
    assert timetable.lineages("long", 81) == ("long",)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.sampled_from([0, 1, 3, 9]), max_size=6), min_size=1, max_size=5), st.data())
def test_parts_of_documents_add_up(
    tmp_path_factory: pytest.TempPathFactory, made: list[list[int]], data: st.DataObject
) -> None:
    """Documents of several sequences, empty ones among them; counted one token at a time."""
    if not any(map(sum, made)):
        return
    prefix = tmp_path_factory.mktemp("parts") / "s"
    with IndexedWriter(prefix, np.uint16) as writer:
        for lengths in made:
            writer.add_document(np.ones(sum(lengths), np.uint16), lengths)
        writer.finalize()
    owner = [(number, i) for number, lengths in enumerate(made) for i in range(sum(lengths))]
    start = data.draw(st.integers(0, len(owner)))
    count = data.draw(st.integers(0, len(owner) - start))
    listed = []
    for part in Documents(load_source(prefix)).parts(start, count):
        assert part.document_tokens == sum(made[part.document])
        assert owner[part.first_token] == (part.document, 0)
        listed += [(part.document, part.position + i) for i in range(part.tokens)]
    assert listed == owner[start : start + count]


def test_what_is_printed(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_text(plan.recipe, "Chapter 17:", (), None, 10, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    (document,) = shown["documents"]
    assert (document["source"], document["document"]["document"]) == ("prose", 17)
    assert shown["complete"] and shown["lineages"] == 2 and document["reads"]
    assert any(read["holds_text"] for read in document["reads"])
    assert not all(read["holds_text"] for read in document["reads"])
    for read in document["reads"]:
        batch = batch_of_step(plan.stages, plan.orders, read["stage"], read["step"])
        assert batch.rows.names[batch.rows.source[read["row"]]] == "prose"
        assert (batch.rows.epoch[read["row"]], batch.rows.window[read["row"]]) == (
            read["epoch"],
            read["window"],
        )
    inspect_text(plan.recipe, "Chapter 17:", (), None, 10)
    printed = capsys.readouterr().out
    first = next(read for read in document["reads"] if read["holds_text"])
    assert "prose: document 17" in printed and "(another part of it)" in printed
    assert (
        f"stage {first['stage']}  step {first['step']}  row {first['row']}  epoch {first['epoch']}" in printed
    )


def test_limits_stages_and_sources(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_text(plan.recipe, "Chapter 1", (), "long", 3, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["documents"]) == 3 and not shown["complete"]
    assert {read["stage"] for one in shown["documents"] for read in one["reads"]} <= {"long"}
    inspect_text(plan.recipe, "Chapter 1", ["code"], None, 3)
    assert "no document of code holds 'Chapter 1'" in capsys.readouterr().out
    inspect_text(plan.recipe, "very last words", (), None, 3)
    assert "never read: in the last 40 tokens of the source, which are held out" in capsys.readouterr().out
    with pytest.raises(UserError, match="no source 'prosa' in the recipe; did you mean 'prose'"):
        inspect_text(plan.recipe, "x", ["prosa"], None, 3)
    with pytest.raises(UserError, match="no stage 'lnog' in the recipe; did you mean 'long'"):
        inspect_text(plan.recipe, "x", (), "lnog", 3)
    with pytest.raises(UserError, match="empty text"):
        inspect_text(plan.recipe, "", (), None, 3)


def test_the_command(tmp_path: Path, root: Path, tokenizer_folder: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(root=root, tokenizer=tokenizer_folder))

    def call(*arguments: str) -> object:
        result = CliRunner().invoke(app, ["inspect", str(recipe), *arguments])
        return result.exception if isinstance(result.exception, UserError) else json.loads(result.stdout)

    assert call("--find", "step_9(", "--json")["documents"][0]["document"]["document"] == 9  # type: ignore[index]
    assert call("--tokens", "1k", "--json")["step"] == 32  # type: ignore[index]
    assert call("--json")["step"] == 1  # type: ignore[index]
    assert "--step and --find ask different" in str(call("--step", "3", "--find", "x"))
    assert "--tokens: " in str(call("--tokens", "many"))
    assert "--source says where" in str(call("--source", "code"))
