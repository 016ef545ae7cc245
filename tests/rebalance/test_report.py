"""`smol rebalance` on a run and its ablation: what it proposes, why, and when it cannot know."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from megatron_smol import cli
from megatron_smol.errors import DataError, UserError
from megatron_smol.evals.results import FORMAT
from megatron_smol.rebalance.evidence import category_of, gather
from megatron_smol.rebalance.report import Proposal, make_proposal
from megatron_smol.rebalance.run import open_subject
from megatron_smol.recipe.load import load_recipe
from megatron_smol.recipe.plan import make_plan
from tests.rebalance.runs import RECIPE, planted, write_ablation, write_run


def proposal_of(folder: Path, stage: str = "next", tokens: str | None = None, **more: Any) -> Proposal:
    subject = open_subject(folder / "run", stage, tokens, folder / "recipe.yaml")
    evidence = gather(folder / "run", subject.plan, more.pop("ablations", []))
    return make_proposal(subject, evidence, more.pop("step", 0.1))


@pytest.fixture
def ablated(tmp_path: Path) -> Path:
    write_ablation(tmp_path, write_run(tmp_path), planted, shares=[0.3, 0.6])
    return tmp_path


def test_more_of_the_better_less_of_the_useless_and_every_cap_kept(ablated: Path) -> None:
    proposal = proposal_of(ablated)
    lines = {line.source: line for line in proposal.lines}
    assert lines["maths"].proposed > lines["maths"].planned and lines["rubbish"].proposed < 0.02
    assert sum(line.proposed for line in proposal.lines) == pytest.approx(1)
    # 1 M tokens: the plan leaves room for 150 k of maths (2 epochs of 199 k, less the 250 k of the last stage)
    assert lines["maths"].basis == "cap" and 0.14 < lines["maths"].proposed < 0.15
    assert lines["maths"].proposed == lines["maths"].highest and lines["maths"].epochs_after <= 2
    assert lines["web"].basis == "guess" and "no ablation tried it" in lines["web"].reasons[0]
    told = " ".join(lines["rubbish"].reasons)
    assert "worse: 'rubbish' at a share of 0.6 changed loss:maths by +0." in told and "p <" in told
    assert "fixed by a cap" in lines["maths"].reasons[0]


def applied(text: str, diff: str) -> str:
    """What `patch` makes of one file; the lines that it takes away must be there."""
    old, new, at = text.splitlines(keepends=True), list[str](), 0
    for line in diff.splitlines(keepends=True)[2:]:
        if line.startswith("@@"):
            start = int(line.split()[1].partition(",")[0].removeprefix("-")) - 1
            new += old[at:start]
            at = start
        elif line[0] == "+":
            new.append(line[1:])
        else:
            assert old[at] == line[1:]
            new += [line[1:]] if line[0] == " " else []
            at += 1
    return "".join(new + old[at:])


def test_the_diff_is_the_recipe_with_the_proposal_and_nothing_else(ablated: Path) -> None:
    proposal = proposal_of(ablated)
    before = (ablated / "recipe.yaml").read_text()
    after = applied(before, proposal.diff)
    (ablated / "recipe.yaml").write_text(after)
    assert [line for line in before.splitlines() if line not in after.splitlines()] == [
        "    mixture: {web: 0.6, code: 0.2, maths: 0.1, rubbish: 0.1}"
    ]
    loaded = load_recipe(ablated / "recipe.yaml")
    wanted = {
        line.source: Fraction(round(line.proposed * 10_000), 10_000)
        for line in proposal.lines
        if line.proposed
    }
    assert loaded.stages[1].mixture == wanted
    make_plan(loaded).require_no_errors()
    assert proposal.override is not None
    again = load_recipe(ablated / "run/recipe.yaml", [proposal.override])
    assert again.stages[1].mixture == wanted, "the override says the same"


def test_laws_and_their_errors_where_shares_make_arms_enough(ablated: Path) -> None:
    laws = {own.metric: own for own in proposal_of(ablated).laws}
    assert set(laws) == {"loss:maths", "loss:web", "loss:code", "loss:mean"}
    assert laws["loss:maths"].law.arms == 7 and laws["loss:maths"].law.holds
    assert laws["loss:maths"].proposed < laws["loss:maths"].planned, "more maths, less rubbish"
    assert 0 < laws["loss:maths"].law.left_out_error < 0.01


def test_one_share_makes_no_law_and_still_ranks(tmp_path: Path) -> None:
    write_ablation(tmp_path, write_run(tmp_path), planted)
    proposal = proposal_of(tmp_path)
    assert proposal.laws == ()
    assert {own.source: own.basis for own in proposal.lines}["rubbish"] == "ablation"


def test_what_seeds_cannot_tell_moves_nothing(tmp_path: Path) -> None:
    write_ablation(tmp_path, write_run(tmp_path), planted, seeds=[0])
    proposal = proposal_of(tmp_path)
    assert [line.proposed for line in proposal.lines] == [line.planned for line in proposal.lines]
    assert all(line.basis == "guess" for line in proposal.lines)
    assert any("no ablation could tell" in note for note in proposal.notes)
    assert any("one seed, no error" in reason for line in proposal.lines for reason in line.reasons)


def test_nothing_measured_cannot_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path)
    with pytest.raises(DataError, match="no evaluations, and no ablation has started from it"):
        proposal_of(tmp_path)
    assert smol("rebalance", run, "--next", "next") == 3
    assert "can be argued for" in capsys.readouterr().err
    assert not list(run.glob("*.diff")), "nothing is written"


def smol(*arguments: object) -> int:
    before, sys.argv = sys.argv, ["smol", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as left:
            cli.main()
    finally:
        sys.argv = before
    return int(left.value.code or 0)


def test_the_command_writes_the_diff_and_prints_the_reasons(
    ablated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ablated / "run"
    assert smol("rebalance", run, "--next", "next") == 0
    out = capsys.readouterr().out
    assert "a proposal" in out and "mixture laws" in out and "nothing was changed" in out and "+++" in out
    written = (run / "rebalance-next.diff").read_text()
    assert written.startswith("# Proposed mixture of stage 'next'") and "--- " in written
    assert smol("rebalance", run, "--next", "next", "--json", "--output", ablated / "x.diff") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sources"]["maths"]["proposed"] > found["sources"]["maths"]["planned"]
    assert found["diff"] in (ablated / "x.diff").read_text() and found["laws"][0]["left_out_error"] >= 0


def row(stage: str, step: int, task: str, value: float) -> str:
    found = {
        "format": FORMAT, "fingerprint": stage, "model": stage, "stage": stage, "step": step, "tokens": step * 512,
        "task": task, "metric": "acc", "metrics": {"acc": {"value": value, "stderr": 0.01, "higher_is_better": True}},
        "n": 1000, "samples": None, "definition": "d", "data": "d", "limit": None, "chat_template": False,
        "max_length": 128, "dtype": "float32",
    }  # fmt: skip
    return json.dumps(found) + "\n"


def test_evaluations_are_told_by_category_and_move_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    steps = {stage.name: stage.end_step for stage in make_plan(load_recipe(tmp_path / "recipe.yaml")).stages}
    (run / "evals.jsonl").write_text(
        row("stable", steps["stable"], "smollm2_gsm8k", 0.30)
        + row("next", steps["next"], "smollm2_gsm8k", 0.20)
        + row("next", steps["next"], "arc_easy", 0.40)
    )
    rows = {"stage": "next", "stage_index": 1, "step": steps["next"], "tokens": 1}
    (run / "metrics.jsonl").write_text(json.dumps(rows) + "\n")
    proposal = proposal_of(tmp_path, "last")
    gsm, arc = proposal.evidence.evaluations
    assert (gsm.category, gsm.value, gsm.stage) == ("maths", 0.2, "next") and arc.category == category_of(
        "arc_easy"
    )
    assert gsm.change is not None and gsm.change.verdict == "worse" and arc.change is None
    assert all(line.proposed == line.planned for line in proposal.lines)
    assert any("all of them are guesses" in note for note in proposal.notes)
    assert any("smollm2_gsm8k (maths) fell by 0.1000 ± 0.0141" in note for note in proposal.notes)


def test_a_stage_that_the_recipe_does_not_have_is_added(ablated: Path) -> None:
    proposal = proposal_of(ablated, "more", "300k")
    assert (
        "+  - name: more" in proposal.diff
        and proposal.override is None
        and proposal.subject.stage.steps == 586
    )
    assert {line.source: line.planned for line in proposal.lines}["web"] == 0.5, "the last stage's mixture"


def test_an_anchor_that_others_share_is_told(tmp_path: Path) -> None:
    recipe = RECIPE.replace("mixture: {{web: 0.6,", "mixture: &next {{web: 0.6,")
    recipe = recipe.replace("mixture: {{web: 0.5, maths: 0.5}}", "mixture: {{n: {{weight: 1, of: *next}}}}")
    write_ablation(tmp_path, write_run(tmp_path, recipe.replace("max_epochs: 2", "max_epochs: 9")), planted)
    assert any(
        "stage 'last' shares the mixture through an anchor" in note for note in proposal_of(tmp_path).notes
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nxt", None), "has no stage 'nxt'; did you mean 'next'?, or give --tokens to add one"),
        (("next", "5M"), "already says how long stage 'next' is"),
        (("stable", None), "has come to stage 'stable' already"),
    ],
)
def test_mistakes(ablated: Path, arguments: tuple[str, str | None], message: str) -> None:
    with pytest.raises(UserError) as found:
        proposal_of(ablated, *arguments)
    assert message in str(found.value)


def test_folders_that_are_none(ablated: Path) -> None:
    with pytest.raises(UserError, match=r"no plan\.json"):
        open_subject(ablated, "next", None, None)
    with pytest.raises(UserError, match=r"has no results\.json"):
        proposal_of(ablated, ablations=[ablated])
    file = ablated / "ablated/results.json"
    whole = json.loads(file.read_text())
    for field in ("content", "cells", "rank_by", "name", "arms"):
        file.write_text(json.dumps({key: value for key, value in whole.items() if key != field}))
        with pytest.raises(DataError, match="damaged or of an older version"):
            proposal_of(ablated)
    file.write_text("{")
    with pytest.raises(DataError, match=r"is damaged: .* smol ablate CONFIG --results"):
        proposal_of(ablated)


def test_only_ablations_of_this_run_are_found_beside_it(ablated: Path) -> None:
    plan = open_subject(ablated / "run", "next", None, None).plan
    assert [own.folder.name for own in gather(ablated / "run", plan, []).ablations] == ["ablated"]
    file = ablated / "ablated/results.json"
    found = json.loads(file.read_text())
    found["started_from"]["run"] = str(ablated / "another")
    file.write_text(json.dumps(found))
    assert gather(ablated / "run", plan, []).ablations == ()
    given = gather(ablated / "run", plan, [ablated / "ablated"]).ablations
    assert [own.rank_by for own in given] == ["loss:maths"], "named, it is read"
