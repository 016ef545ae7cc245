"""Rows into tokens: what is cut where, what is skipped, what is held out, and the words about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_smol.errors import DataError
from megatron_smol.post.prepare import Summary, prepare, split
from megatron_smol.post.settings import fill
from megatron_smol.post.template import load_chat_tokenizer
from megatron_smol.recipe.schema import Dpo, Sft
from tests.post.conftest import rows_of
from tests.post.made import conversations, pairs, write_rows

QUIET = Console(quiet=True)
USER, ASSISTANT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}


def made(
    base: Path, work: Path, section: Sft | Dpo, rows: list[Any], strict: bool = False
) -> tuple[Summary, Any]:
    """The summary and the training rows, with nothing held out."""
    section, _ = fill(section.model_copy(update={"heldout_rows": 0}), 100_000, 128, on_gpu=False)
    work.mkdir()
    source = write_rows(work / "rows.jsonl", rows)
    summary = prepare(
        str(source), section, load_chat_tokenizer(base), work, work / "bad.jsonl", strict, QUIET
    )
    return summary, split(work, section)[0]


def text(base: Path, ids: list[int]) -> str:
    return str(load_chat_tokenizer(base).decode(ids))


def test_loss_is_on_all_tokens_or_on_the_assistants(base: Path, tmp_path: Path) -> None:
    rows = [{"messages": [USER, ASSISTANT]}]
    _, everything = made(base, tmp_path / "a", Sft(packing=False), rows)
    assert everything[0]["labels"] == everything[0]["input_ids"]
    _, answers = made(base, tmp_path / "b", Sft(packing=False, loss_on="assistant"), rows)
    assert answers[0]["input_ids"] == everything[0]["input_ids"]
    assert text(base, [label for label in answers[0]["labels"] if label >= 0]) == "Hello.<|im_end|>"


def test_packed_conversations_are_joined_by_the_end_token(base: Path, tmp_path: Path) -> None:
    _, rows = made(base, tmp_path / "a", Sft(), [{"messages": [USER, ASSISTANT]}])
    assert text(base, rows[0]["input_ids"]).endswith("Hello.<|im_end|>\n<|im_end|>")


def test_long_conversations_are_cut_or_go_on(base: Path, tmp_path: Path) -> None:
    rows = [{"messages": [USER, {"role": "assistant", "content": "Hello. " * 200}]}]
    summary, cut = made(base, tmp_path / "a", Sft(packing=False, seq_length=64), rows)
    assert len(cut[0]["input_ids"]) == 64 and summary.cut == {"cut at the end to 64 tokens": 1}
    summary, whole = made(base, tmp_path / "b", Sft(seq_length=64), rows)
    assert len(whole[0]["input_ids"]) == summary.longest + 1 > 64
    assert "go on in the next sequence" in next(iter(summary.cut))
    rows = [{"messages": [{"role": "user", "content": "Hi? " * 200}, ASSISTANT]}]
    with pytest.raises(DataError, match="no assistant token within 64 tokens"):
        made(base, tmp_path / "c", Sft(packing=False, seq_length=64, loss_on="assistant"), rows)


def test_prompts_are_cut_from_the_left_and_answers_at_the_end(base: Path, tmp_path: Path) -> None:
    long = " ".join(str(number) for number in range(100))
    rows = [
        {"prompt": f"{long} last?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "Hi?", "chosen": f"A {long}", "rejected": f"B {long}"},
        {"prompt": "Hi?", "chosen": f"{long} A", "rejected": f"{long} B"},
    ]
    summary, _ = made(base, tmp_path / "a", Dpo(seq_length=100, prompt_length=40), rows)
    by_order = sorted(split_rows(tmp_path / "a"), key=lambda row: len(row["chosen_ids"]))
    prompt = text(base, by_order[0]["prompt_ids"])
    assert len(by_order[0]["prompt_ids"]) == 40
    assert prompt.endswith("99 last?<|im_end|>\n<|im_start|>assistant\n") and "Hi?" not in prompt
    assert text(base, by_order[0]["chosen_ids"]) == "Yes.<|im_end|>"
    assert len(by_order[1]["prompt_ids"]) + len(by_order[1]["chosen_ids"]) == 100
    assert summary.bad_count == {"chosen equals rejected within 100 tokens": 1}
    # The default system turn alone fills the 40 tokens of a prompt.
    assert list(summary.cut.values()) == [2, 1]


def split_rows(work: Path) -> Any:
    return split(work, Dpo(heldout_rows=0))[0]


def test_the_answer_follows_the_prompt_as_at_inference(base: Path, tmp_path: Path) -> None:
    _, rows = made(base, tmp_path / "a", Dpo(prompt_length=100), pairs(1))
    tokenizer = load_chat_tokenizer(base)
    turns = [{"role": "user", "content": pairs(1)[0]["prompt"]}]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert rows[0]["prompt_ids"] == asked["input_ids"]


def test_bad_rows_are_counted_and_named(base: Path, tmp_path: Path) -> None:
    bad = [{"messages": [USER]}, {"messages": [USER, {"role": "bot", "content": "x"}]}]
    summary, _ = made(base, tmp_path / "a", Sft(), [*conversations(3), *bad, *bad[:1] * 4])
    assert (summary.rows, summary.kept) == (9, 3)
    assert summary.bad_count == {"no assistant turn": 5, "unknown role 'bot'": 1}
    named = rows_of(tmp_path / "a" / "bad.jsonl")
    assert (
        named[0] == {"row": f"{tmp_path}/a/rows.jsonl:4", "reason": "no assistant turn"} and len(named) == 6
    )
    said = "\n".join(summary.lines("conversations"))
    assert "3 of 9 rows kept" in said and "skipped 5: no assistant turn" in said and "rows.jsonl:4" in said


def test_strict_refuses_the_first_bad_row(base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"rows\.jsonl:4: no assistant turn; mend the row, or leave --strict out"
    ):
        made(base, tmp_path / "a", Sft(), [*conversations(3), {"messages": [USER]}], strict=True)
    assert not list((tmp_path / "a").glob("tokens*"))


def test_nothing_to_learn_from_is_an_error(base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no row of .* can be used: 2 are bad, the first is .*:1: no assistant turn"
    ):
        made(base, tmp_path / "a", Sft(), [{"messages": [USER]}] * 2)
    with pytest.raises(DataError, match="can be used: it is empty"):
        made(base, tmp_path / "b", Sft(), [])


def test_held_out_rows_are_never_trained_on(base: Path, tmp_path: Path) -> None:
    section, _ = fill(Sft(packing=False, heldout_rows=7), 100_000, 128, on_gpu=False)
    source = write_rows(tmp_path / "rows.jsonl", conversations(100))
    prepare(str(source), section, load_chat_tokenizer(base), tmp_path, tmp_path / "bad", False, QUIET)
    training, heldout = split(tmp_path, section)
    rows = [{tuple(row["input_ids"]) for row in part} for part in (training, heldout)]
    assert (len(rows[0]), len(rows[1])) == (93, 7) and not rows[0] & rows[1]
    again = split(tmp_path, section)
    assert again[0]["input_ids"][:] == training["input_ids"][:]
    other = split(tmp_path, section.model_copy(update={"seed": 1}))
    assert other[0]["input_ids"][:] != training["input_ids"][:]
    assert len(split(tmp_path, section.model_copy(update={"heldout_rows": 500}))[1] or []) == 10  # a tenth
