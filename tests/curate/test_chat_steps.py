"""Constraints, checks of answers, semantic duplicates, contamination, shares of categories; and a model on this machine."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from megatron_smol.curate.chat.constraints import CONSTRAINTS, draw, unkept
from megatron_smol.curate.chat.judge import final_answer, number_of, same_answer
from megatron_smol.curate.chat.magpie import SHARES, Magpie
from megatron_smol.curate.chat.rows import Row, Stage
from megatron_smol.curate.chat.semantic import near_equal
from megatron_smol.curate.chat.steps import Decontaminate, Judge, Match, Step, Turns
from megatron_smol.curate.chat.tools import NoAnswer, Tools
from megatron_smol.curate.endpoint import Answer, Endpoint, EndpointSettings, Failed, chat, completion
from megatron_smol.errors import UserError

TOOLS = Tools({}, "test", 0)


def ran(step: Step, rows: list[Row]) -> tuple[list[Row], Stage]:
    stage = Stage("test")
    return list(stage.passed(step.run(iter(rows), TOOLS))), stage


def talk(*said: str, **more: Any) -> Row:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    return {"id": said[0], "source": "test", "messages": turns} | more


KEPT_AND_BROKEN = [
    ("punctuation:no_comma", {}, "one two", "one, two"),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 3}, "a b c", "a b"),
    ("length_constraints:number_words", {"relation": "less than", "num_words": 3}, "a b", "a b c"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n\n***\n\nb\n", "a\n***\n***\nb"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", "* a\n* b\n* c"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b c**", "*a* and **"),
    ("detectable_format:title", {}, "<<Home>>\ntext", "<< >>\ntext"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "text\nP.S. more", "text"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a] b"),
    ("change_case:english_lowercase", {}, "only small.", "Only small."),
    ("change_case:english_capital", {}, "ONLY LARGE.", "ONLY large."),
    ("change_case:capital_word_frequency", {"relation": "at least", "capital_frequency": 2}, "A NEW day", "A new day"),
    ("startend:end_checker", {"end_phrase": "The end."}, "So. the end.", "The end. Or not"),
    ("startend:quotation", {}, '"all of it"', '"all" of it'),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    ("keywords:existence", {"keywords": ["sun", "sea"]}, "Sun and sea.", "Sunday and sea"),
    ("keywords:forbidden_words", {"forbidden_words": ["sun", "sea"]}, "Sunday", "the Sea"),
    ("keywords:frequency", {"keyword": "sun", "relation": "at least", "frequency": 2}, "sun, Sun", "sun, sunny"),
    ("keywords:letter_frequency", {"letter": "z", "relation": "less than", "let_frequency": 2}, "zoo", "zoo Z"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), KEPT_AND_BROKEN)
def test_constraints_are_checked(name: str, arguments: dict[str, Any], good: str, bad: str) -> None:
    assert unkept(good, [(name, arguments)]) == []
    assert unkept(bad, [(name, arguments)]) == [name]


def test_every_constraint_has_a_test_words_and_draws_that_go_together() -> None:
    assert {name for name, *_ in KEPT_AND_BROKEN} == set(CONSTRAINTS)
    seen = Counter[str]()
    for seed in range(300):
        drawn = draw(Random(seed), 3)
        assert 1 <= len(drawn) <= 3
        touched = [part for name, _ in drawn for part in CONSTRAINTS[name].touches]
        assert len(touched) == len(set(touched)), f"{drawn} cannot be kept together"
        for name, arguments in drawn:
            assert "{" not in CONSTRAINTS[name].words(arguments)
            assert json.loads(json.dumps(arguments)) == arguments
            seen[name] += 1
    assert set(seen) == set(CONSTRAINTS) and draw(Random(5), 3) == draw(Random(5), 3)


@pytest.mark.parametrize(
    ("text", "right", "same"),
    [
        ("so 3 + 4 = 7.", "#### 7", True),
        ("it is $1,200.00 in all", "1200", True),
        (r"hence \boxed{12}, not 13", "12", True),
        ("12 and then #### 13", "12", False),
        ("Thus the answer is\nParis.", "paris", True),
        ("7 apples and 8 pears", "7", False),
        ("", "7", False),
        (r"\boxed{\frac{1}{2}}", r"\boxed{\frac{3}{2}}", False),
        (r"so it is \boxed{\dfrac{2}{4}}.", "1/2", True),
        (r"\boxed{3\frac{1}{2}}", "1/2", False),
        (r"\boxed{12\text{ cm}}", "12", True),
        (r"\boxed{\text{Paris}}", "Paris", True),
        (r"\boxed{2^{10}}", "2^10", True),
        (r"\boxed{1} or \boxed{\{1, 2\}}", "2", False),
        (r"that is 8, \boxed{\frac{1}{2", "8", False),
        ("The answer is 1/4", "3/4", False),
        ("The answer is 2/8.", "1/4", True),
        ("The answer is **2 1/4**", "1/4", False),
        ("The answer is .5", "5", False),
        ("The answer is .50.", "0.5", True),
        ("The answer is **-0.5**.", "-1/2", True),
        ("x = 2^{10}", "10", False),
        ("x=2^{10}", "2^10", True),
        (r"$x = \sqrt{2}$", "2", False),
        ("3+4=7.", "7", True),
        ("she has 5kg", "5", True),
        ("1/0", "0", True),
    ],
)
def test_final_answers(text: str, right: str, same: bool) -> None:
    assert same_answer(text, right) is same
    assert final_answer(right) == final_answer(final_answer(right))


def test_scores_that_rows_have() -> None:
    assert (number_of("Very Hard"), number_of("3.5"), number_of(2)) == (5.0, 3.5, 2.0)
    with pytest.raises(NoAnswer):
        number_of("splendid")
    rows = [talk("a", "b", quality=q) for q in ("poor", "good", "excellent", None, "odd", 3)]
    kept, stage = ran(Judge(ask="quality", at_least=3, at_most=4), rows)
    assert [row["quality"] for row in kept] == [4.0, 3.0]
    assert stage.reasons == {
        "quality below 3": 1, "quality above 4": 1, "no 'quality' in the row": 1, "score 'odd' is no number": 1,
    }  # fmt: skip


def test_turns_are_cut_where_an_answer_ends() -> None:
    rows = [talk(*"abcdef"), talk(*"ab")]
    rows[0]["messages"].insert(0, {"role": "system", "content": "s"})
    kept, _ = ran(Turns(at_most=2, cut=True), rows)
    assert ["".join(turn["content"] for turn in row["messages"]) for row in kept] == ["sabcd", "ab"]
    kept, stage = ran(Turns(at_least=2, at_most=2), rows)
    assert kept == [] and stage.reasons == {"more than 2 turns": 1, "fewer than 2 turns": 1}


def test_match_drops_or_keeps() -> None:
    rows = [talk("one", "two"), talk("three", "four")]
    assert [row["id"] for row in ran(Match(pattern="tw"), rows)[0]] == ["three"]
    assert [row["id"] for row in ran(Match(pattern="tw", keep=True), rows)[0]] == ["one"]


def test_near_equal_in_meaning_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_smol.curate.chat.semantic._BLOCK", 4)
    base = "please explain to me how the tides of the sea follow the moon"
    texts = [base, "write a poem about winter in the old town", f"{base} today", "count from one to ten in Welsh",
             "what is a good name for a black cat", base, f"kindly {base}", "sort a list of numbers in Python"]  # fmt: skip
    drop = list(near_equal(iter(texts), None, 0.8))
    assert drop == [False, False, True, False, False, True, True, False]
    assert list(near_equal(iter(texts), None, 1.0)) == [False] * 5 + [True, False, False]


def test_contamination_by_any_ten_words(tmp_path: Path) -> None:
    item = "write a poem about the moon over the harbour without using any commas at all"
    (tmp_path / "ifeval.jsonl").write_text(json.dumps({"prompt": item}) + "\n")
    words = item.split()
    step = Decontaminate(files=(str(tmp_path / "ifeval.jsonl"),))
    rows = [
        talk(" ".join(words[2:12]) + " now", "yes"),
        talk(" ".join(words[2:11]) + " and", "yes"),
        talk("x", item.title()),
    ]
    kept, stage = ran(step, rows)
    assert [row["id"] for row in kept] == [rows[1]["id"]] and stage.reasons == {"ifeval.jsonl": 2}
    kept, _ = ran(step.model_copy(update={"ratio": 0.9}), rows)
    assert len(kept) == 2, "ten of fifteen words are not the item"


def test_categories_have_their_shares() -> None:
    magpie = Magpie(model="m", rows=4000)
    seen = Counter(magpie.category(number) for number in range(4000))
    for name, share in SHARES.items():
        assert abs(seen[name] / 4000 - share) < 0.002
        assert name not in magpie.system(name) or magpie.system(name)
    assert len({magpie.system(name) for name in SHARES}) == len(SHARES) == 11
    first = Counter(magpie.category(number) for number in range(80))
    assert all(abs(first[name] - 80 * share) <= 2 for name, share in SHARES.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model of a few thousand weights that never learned anything."""
    import torch
    import transformers

    from megatron_smol.post.template import load_chat_tokenizer
    from tests.data.conftest import train_tokenizer

    folder = train_tokenizer(tmp_path_factory.mktemp("model"))
    load_chat_tokenizer(folder).save_pretrained(folder)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=640, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, eos_token_id=2, initializer_range=0.5,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_model_of_this_machine_writes_rows(tmp_path: Path, folder: Path) -> None:
    settings = EndpointSettings(model=str(folder), concurrency=2)
    with Endpoint(settings, tmp_path / "a.jsonl") as model:
        asked = [completion("one two", max_tokens=6, seed=seed) for seed in (1, 2, 1)]
        first, second, again = model.map(model.ask, asked)
        assert isinstance(first, Answer) and first == again != second
        assert first.finish_reason == "length" and first.completion_tokens == 6
        said = model.ask(chat([{"role": "user", "content": "hi"}], max_tokens=4, temperature=0.0))
        assert isinstance(said, Answer) and said.prompt_tokens > 10 and said.completion_tokens <= 4
        assert model.ask(completion("one " * 200, max_tokens=6)) == Failed("prompt too long")
        with pytest.raises(UserError, match="knows no logit_bias"):
            model.ask(completion("one", logit_bias={}))
