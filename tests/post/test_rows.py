"""Chat rows: what is read, from what, and the reason why a row cannot be used."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from megatron_smol.errors import DataError, UserError
from megatron_smol.post.rows import NotJson, RowError, conversation, preference, read_rows
from tests.data.test_corpus import damaged_files
from tests.post.made import conversations, write_rows

USER, ASSISTANT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be brief."}


def test_a_conversation_is_taken_as_it_is() -> None:
    turns = [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]
    assert conversation({"messages": [{**turn, "extra": 1} for turn in turns]}) == turns


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "empty content"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
        ({"messages": [USER, SYSTEM, ASSISTANT]}, "a system turn that is not the first"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "content that is not text"),
        (
            {"messages": [USER, {"role": "assistant", "content": "x<|im_end|>"}]},
            "content holds the control token <|im_end|>",
        ),
        ({"messages": [USER, {"role": "assistant"}]}, "a turn without role and content"),
        ({"messages": []}, "no turns"),
        ({"text": "x"}, "no 'messages'"),
        (["x"], "not a JSON object"),
        (NotJson("not JSON"), "not JSON"),
    ],
)
def test_a_bad_conversation_has_a_reason(row: Any, reason: str) -> None:
    with pytest.raises(RowError) as error:
        conversation(row)
    assert str(error.value) == reason


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "chosen": "Hello.", "rejected": "No."},
        {"prompt": [USER], "chosen": "Hello.", "rejected": "No."},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{**ASSISTANT, "content": "No."}]},
        # UltraFeedback: whole conversations, the prompt once more as text.
        {"prompt": "Hi?", "chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "No."}]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "No."}]},
    ],
)
def test_every_form_of_a_preference_is_the_same(row: Any) -> None:
    assert preference(row) == ([USER], "Hello.", "No.")


def test_a_system_turn_comes_before_the_prompt() -> None:
    worse = {"role": "assistant", "content": "No."}
    row = {"prompt": "Hi?", "chosen": [SYSTEM, ASSISTANT], "rejected": [SYSTEM, worse]}
    assert preference(row).prompt == [SYSTEM, USER]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi?", "chosen": "Same. ", "rejected": "Same."}, "chosen equals rejected"),
        ({"prompt": "Hi?", "chosen": "a", "rejected": ""}, "empty content"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty content"),
        ({"chosen": "a", "rejected": "b"}, "no 'prompt'"),
        ({"prompt": "Hi?", "chosen": "a"}, "no 'rejected'"),
        (
            {"prompt": [USER, ASSISTANT], "chosen": "a", "rejected": "b"},
            "the prompt does not end with a user turn",
        ),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER]}, "no assistant turn at the end"),
        (
            {"chosen": [USER, ASSISTANT], "rejected": [{**USER, "content": "Ho?"}, ASSISTANT]},
            "chosen and rejected answer different prompts",
        ),
    ],
)
def test_a_bad_preference_has_a_reason(row: Any, reason: str) -> None:
    with pytest.raises(RowError) as error:
        preference(row)
    assert str(error.value) == reason


def test_all_kinds_of_files_give_the_same_rows(tmp_path: Path) -> None:
    made = conversations(5)
    plain = write_rows(tmp_path / "a.jsonl", made)
    packed, table = tmp_path / "a.jsonl.gz", tmp_path / "a.parquet"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    curated = tmp_path / "a.jsonl.zst"  # as `smol curate` writes
    curated.write_bytes(zstandard.compress(plain.read_bytes()))
    pyarrow.parquet.write_table(pa.Table.from_pylist(made), table)
    for path in (plain, packed, curated, table):
        assert [row for _, row in read_rows(str(path))] == made


def test_a_row_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n')
    assert list(read_rows(str(path))) == [(f"{path}:1", {"a": 1}), (f"{path}:3", NotJson("not JSON"))]


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps({"a": list(range(500))}).encode())[:-20])
    with pytest.raises(DataError, match="cannot be decompressed"):
        list(read_rows(str(packed)))
    for path in damaged_files(tmp_path):
        with pytest.raises(DataError, match=rf"{re.escape(path.name)} cannot be decompressed"):
            list(read_rows(str(path)))
    table = tmp_path / "a.parquet"
    table.write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="not a whole parquet file"):
        list(read_rows(str(table)))


def test_what_is_no_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data file .*chat\.jsonl; give a file"):
        list(read_rows(str(tmp_path / "chat.jsonl")))
    with pytest.raises(UserError, match=r"no data file data/chat\.jsonl"):
        list(read_rows("data/chat.jsonl"))
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="of no known kind"):
        list(read_rows(str(tmp_path / "a.csv")))
