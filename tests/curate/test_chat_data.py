"""`smol chatdata` on the shipped files, made small: models are a real server that answers by rules."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_smol.commands.chatdata import chatdata
from megatron_smol.curate.chat.config import load_chat_data
from megatron_smol.curate.chat.constraints import unkept
from megatron_smol.curate.chat.pipeline import chat_data
from megatron_smol.errors import DataError, RunError, UserError
from megatron_smol.post.rows import conversation, preference
from tests.curate.language_server import Body, Reply, serving

EXAMPLES = Path(__file__).parents[2] / "examples/curate"
NAMES = ("tar", "gold", "rain", "moss", "clay", "reed", "lime", "salt")
Raw = dict[str, Any]


def author(path: str, body: Body) -> Reply | str:
    """A model that asks questions, answers them, rewrites, summarises and judges; what it says depends on the seed."""
    seed = body.get("seed", 0)
    if path == "completions":
        thing = NAMES[seed % len(NAMES)]
        if body["prompt"].endswith(("user\n", "user<|end_header_id|>\n\n")):
            return (
                f"# {thing}" if seed % 11 == 0 else f"Why is {thing} number {seed % 99991} so {thing}-like?"
            )
        return "" if seed % 7 == 0 else f"Because {thing} is made of {thing}, {seed} times."
    asked = body["messages"][-1]["content"]
    if asked.startswith("Judge"):
        most = int(re.search(r"from 1 to (\d+)\.$", asked).group(1))  # type: ignore[union-attr]
        place = int(re.findall(r"\d+", asked.split("----")[1])[-1])
        return "no idea" if place % 9 == 0 else f"It is fine.\nScore: {1 + place % most}"
    if asked.startswith("Write "):
        return f"Dear reader, this is {asked[6:20]} number {seed}. Yours, {NAMES[seed % 8]}."
    if body["messages"][0]["role"] == "system":
        return f"Shorter: {asked[:20]}"
    return f"An answer without that mark and with {seed} in it. P.S. {NAMES[seed % 8]}"


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def talk(text: str, turns: int = 1, **more: Any) -> Raw:
    said = [("user", f"{text}, question {n}?") for n in range(turns)]
    pairs = [turn for question in said for turn in (question, ("assistant", f"answer to {question[1]}"))]
    return {"messages": [{"role": role, "content": content} for role, content in pairs]} | more


def example(name: str, folder: Path, url: str, data: Callable[[str], list[Any]]) -> Raw:
    """A shipped file with few rows; what it would read from the hub is `data(part)` in a local file."""
    raw: Raw = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    raw["output"] = str(folder / "out")
    for settings in raw.get("models", {}).values():
        settings |= {"url": url, "concurrency": 4, "retry_seconds": 0}
    for part in raw["parts"]:
        for kind in ("magpie", "constraints", "rewrite"):
            for count in {"rows", "write"} & set(part.get(kind, ())):
                part[kind][count] = 40
        for kind, field in (("given", "data"), ("summarize", "inputs"), ("preferences", "prompts")):
            if kind in part:
                part[kind][field] = write(folder / f"{part['name']}.jsonl", data(part["name"]))
        for step in part.get("steps", ()):
            if "semantic" in step:
                del step["semantic"]["encoder"]
            if "decontaminate" in step:
                step["decontaminate"]["files"] = [write(folder / "ifeval.jsonl", [{"prompt": PROMPT}])]
    return raw


PROMPT = "Write a long poem about the moon over the harbour and do not use any commas at all"


def made(raw: Raw, folder: Path, **options: Any) -> tuple[list[Raw], Raw]:
    """The rows of train.jsonl and test.jsonl, and the card."""
    config = folder / "chat.yaml"
    config.write_text(yaml.safe_dump(raw))
    card = chat_data(load_chat_data(config), **options)
    assert card.read_text().startswith("<!doctype html>")
    output = Path(raw["output"])
    rows = [
        json.loads(line)
        for name in ("train.jsonl", "test.jsonl")
        if (output / name).is_file()
        for line in (output / name).read_text().splitlines()
    ]
    return rows, json.loads((output / "card.json").read_text())


def small(folder: Path, url: str | None = None, **parts: Raw) -> Raw:
    models = {"m": {"url": url, "model": "m", "concurrency": 4, "retry_seconds": 0}} if url else {}
    named = [{"name": name} | part for name, part in parts.items()]
    return {"name": "small", "output": str(folder / "out"), "models": models, "parts": named}


def funnel(card: Raw) -> dict[str, Raw]:
    return {row["step"]: row for row in card["funnel"]}


# --- the three shipped pipelines -----------------------------------------------------------------------------


def test_smoltalk(tmp_path: Path) -> None:
    def data(part: str) -> list[Any]:
        if part == "smol-summarize":
            return [{"article": f"{part} article {n} about {NAMES[n % 8]}"} for n in range(12)] + [{"no": 1}]
        extra = [talk("x def has_close_elements(a)")] if part.startswith("self-oss") else []
        return [talk(f"{part} {n}", 1 + n % 3) for n in range(10)] + [{"messages": []}, "not json\n", *extra]

    with serving(author) as server:
        raw = example("smoltalk", tmp_path, server.url, data)
        rows, card = made(raw, tmp_path)
        asked = len(server.seen)
        assert made(raw, tmp_path)[0] == rows and len(server.seen) == asked, "a finished run asks for nothing"
    for row in rows:
        conversation(row)
    parts = Counter(row["id"].rsplit("-", 1)[0] for row in rows)
    assert set(parts) == {part["name"] for part in raw["parts"]}
    steps = funnel(card)
    magpie = steps["smol-magpie-ultra: made"]
    assert magpie["documents_in"] == 40 and magpie["reasons"]["empty answer"] > 0
    assert magpie["reasons"]["question begins with Markdown"] > 0
    kept = [row for row in rows if row["source"] == "smol-magpie-ultra"]
    assert all([t["role"] for t in row["messages"]] == ["user", "assistant"] * 3 for row in kept)
    assert all(row["quality"] >= 4 and row["difficulty"] >= 2 and row["reward"] >= 7 for row in kept)
    constrained = [row for row in rows if row["source"] == "smol-constraints"]
    for row in constrained:
        pairs = list(zip(row["instruction_id_list"], row["kwargs"], strict=True))
        assert unkept(row["messages"][-1]["content"], pairs) == []
    broken = steps["smol-constraints: made"]["reasons"]
    assert any(reason.startswith("constraint not kept: ") for reason in broken)
    assert len({row["messages"][0]["content"] for row in rows if row["source"] == "smol-rewrite"}) == 3
    assert steps["smol-summarize: made"]["reasons"] == {"no text in 'article'": 1}
    for name in ("numina-cot-100k", "self-oss-instruct"):
        assert steps[f"{name}: read"]["reasons"] == {"no turns": 1, "not JSON": 1}
    assert steps["all: match"]["dropped"] == 1
    assert len(rows) == steps["mix"]["kept"] == card["rows"]["train"] + card["rows"]["test"]
    assert card["rows"]["test"] == round(0.05 * len(rows))
    used = card["models"]
    assert sum(model["answers"] for model in used.values()) == asked
    assert all(model["prompt_tokens"] > 0 for model in used.values())
    page = (tmp_path / "out/card.html").read_text()
    assert "question begins with Markdown" in page and "model qwen: " in page


def test_smol_smoltalk(tmp_path: Path) -> None:
    def data(part: str) -> list[Any]:
        categories = ("math", "planning", "data-analysis", "coding")
        rows = [talk(f"{part} {n}", 1 + n % 4, category=categories[n % 4], source=part) for n in range(40)]
        return [*rows, rows[1], talk("long " * 2000)]

    raw = example("smol-smoltalk", tmp_path, "unused", data)
    next(part for part in raw["parts"] if part["name"] == "smol-rewrite")["take"] = 7
    rows, card = made(raw, tmp_path)
    steps = funnel(card)
    short = [row for row in rows if row["source"] == "smol-magpie-ultra-short" or "magpie" in row["id"]]
    assert len(short) == 20, "of four categories two go, one row is there twice, one is too long"
    assert all(len(row["messages"]) <= 4 for row in short)
    assert {row["category"] for row in short} == {"planning", "coding"}
    assert steps["smol-magpie-ultra-short: field"]["reasons"] == {
        "category is math": 10,
        "category is data-analysis": 10,
    }
    assert steps["smol-magpie-ultra-short: length"]["reasons"] == {"longer than 6,000 characters": 1}
    assert sum(row["id"].startswith("smol-rewrite") for row in rows) == 7
    assert steps["mix"]["reasons"]["more than asked for of smol-rewrite"] == steps["mix"]["dropped"]
    assert any("smol-summarize has 4" in note and "35,000 were asked for" in note for note in card["notes"])
    assert card["rows"]["test"] == round(0.05 * len(rows))
    assert not any("apigen" in row["id"] or "numina" in row["id"] for row in rows)


def test_ultrafeedback(tmp_path: Path) -> None:
    def rule(path: str, body: Body) -> Reply | str:
        asked = body["messages"][-1]["content"]
        if asked.startswith("Judge") or "sum" not in asked:
            return author(path, body)
        right = int(re.search(r"\d+", asked).group())  # type: ignore[union-attr]
        return f"Let us see.\nIt is ${right + body['seed'] % 2}.0" if right else "always 5"

    def data(part: str) -> list[Any]:
        if part == "checked":
            return [
                {"question": f"What is the sum of {n} and 0?", "answer": f"so #### {n}"} for n in range(8)
            ]
        return [{"instruction": f"Say {n}"} for n in range(8)] + [{"messages": []}, talk("deep", 2)]

    with serving(rule) as server:
        rows, card = made(example("ultrafeedback", tmp_path, server.url, data), tmp_path)
    steps = funnel(card)
    rated = [row for row in rows if row["source"] == "rated"]
    assert rated and all(1 <= row["margin"] <= 9 for row in rated)
    assert {row["model_chosen"] for row in rated} == {"small", "large"}
    assert steps["rated: made"]["reasons"]["no question in the row"] == 1
    for row in rows:
        pair = preference(row)
        assert pair.prompt[-1]["content"] == row["prompt"]
        assert row["margin"] == row["score_chosen"] - row["score_rejected"] > 0
    checked = [row for row in rows if row["source"] == "checked"]
    assert {(row["score_chosen"], row["score_rejected"]) for row in checked} == {(1.0, 0.0)}
    for row in checked:
        right = re.search(r"\d+", row["prompt"]).group()  # type: ignore[union-attr]
        assert row["chosen"][-1]["content"].endswith(f"${right}.0")
        assert not row["rejected"][-1]["content"].endswith(f"${right}.0")
    assert steps["checked: made"]["reasons"]["all answers are the same"] == 1, "always 5 for 0"


@pytest.mark.parametrize("rejected", ["random", "worst"])
def test_answers_that_are_equally_good_are_no_pair(tmp_path: Path, rejected: str) -> None:
    def rule(path: str, body: Body) -> Reply | str:
        asked = body["messages"][-1]["content"]
        if not asked.startswith("Judge"):
            return f"to {asked}: {body['seed'] % 3}"
        mark = int(re.findall(r": (\d)", asked)[-1])
        return "Score: 5" if "even" in asked else f"Score: {(8, 8, 2)[mark]}"

    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"{('even', 'odd')[n % 2]} {n}"} for n in range(12)])
    part = {"prompts": prompts, "writers": ["m"], "judge": "m", "completions": 6, "rejected": rejected}
    with serving(rule) as server:
        rows, card = made(small(tmp_path, server.url, p={"preferences": part}), tmp_path)
    assert {row["prompt"][:3] for row in rows} == {"odd"}
    assert {(row["score_chosen"], row["score_rejected"], row["margin"]) for row in rows} == {(8.0, 2.0, 6.0)}
    reasons = funnel(card)["p: made"]["reasons"]
    assert reasons["no answer is better than another"] >= 5 and len(rows) + sum(reasons.values()) == 12


# --- kills, failures, mistakes -------------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_what_was_paid_is_not_paid_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends after any number of answers, then the same command: the rows of a run in one go."""
    parts: dict[str, Raw] = {
        "talk": {"magpie": {"model": "m", "rows": 12, "turns": 2}, "steps": [{"score": {"ask": "reward", "model": "m"}}]},
        "mail": {"rewrite": {"model": "m", "write": 6}},
    }  # fmt: skip
    with serving(author) as server:
        whole, _ = made(small(tmp_path / "a", server.url, **parts), _made_folder(tmp_path / "a"))
        needed = len(server.seen)
        from megatron_smol.curate.answers import AnswerFile

        add = AnswerFile.add
        server.seen.clear()
        for answers in (1, 5, 17):
            left = [answers]

            def dying(self: Any, *of: Any, left: list[int] = left) -> None:
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                add(self, *of)

            monkeypatch.setattr(AnswerFile, "add", dying)
            with pytest.raises(Killed):
                made(small(tmp_path / "b", server.url, **parts), _made_folder(tmp_path / "b"))
            assert not (tmp_path / "b/out/train.jsonl").exists()
        monkeypatch.setattr(AnswerFile, "add", add)
        rows, card = made(small(tmp_path / "b", server.url, **parts), _made_folder(tmp_path / "b"))
    assert rows == whole
    assert card["models"]["m"]["answers"] == needed
    lines = (tmp_path / "b/out/work/answers-m.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == needed


def _made_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def test_an_endpoint_that_hangs_or_talks_nonsense_is_counted_and_asked_again_later(tmp_path: Path) -> None:
    broken = True

    def rule(path: str, body: Body) -> Reply | str:
        if not broken:
            return author(path, body)
        number = int(re.search(r"number (\d+)", body["messages"][-1]["content"]).group(1))  # type: ignore[union-attr]
        bad = {
            2: Reply(body=b"<p>busy</p>"),
            3: Reply(status=503),
            4: Reply(""),
            5: Reply("on and", finish_reason="length"),
        }
        return Reply(hang=True) if body["model"] == "asleep" else bad.get(number) or author(path, body)

    texts = write(tmp_path / "texts.jsonl", [{"text": f"text number {n}"} for n in range(8)])
    with serving(rule) as server:
        parts = {name: {"rewrite": {"model": name, "inputs": texts}} for name in ("m", "asleep")}
        parts["asleep"]["rewrite"]["rows"] = 2  # type: ignore[assignment]
        raw = small(tmp_path, server.url, **parts)
        raw["models"]["asleep"] = raw["models"]["m"] | {"model": "asleep", "timeout_seconds": 0.3}
        for settings in raw["models"].values():
            settings["retries"] = 1
        rows, card = made(raw, tmp_path)
        reasons = funnel(card)["m: made"]["reasons"]
        assert reasons == {
            "request failed: no answer in the response": 1, "request failed: status 503": 1,
            "empty answer": 1, "answer cut off at max_tokens": 1,
        }  # fmt: skip
        assert funnel(card)["asleep: made"]["reasons"] == {"request failed: timed out": 2}
        assert len(rows) == 4
        used = card["models"]
        assert used["asleep"]["retried"] == used["asleep"]["failed"] == {"timed out": 2}
        assert "retried: timed out 2; failed: timed out 2" in " ".join(card["notes"])
        broken = False
        raw["models"]["asleep"]["timeout_seconds"] = 60
        server.seen.clear()
        rows, card = made(raw, tmp_path)
        assert len(rows) == 8 and len(server.seen) == 4, "only what had failed is asked for again"
        assert funnel(card)["m: made"]["reasons"] == {"empty answer": 1, "answer cut off at max_tokens": 1}


def test_nobody_answers(tmp_path: Path) -> None:
    with serving(lambda path, body: Reply(status=500)) as server:
        raw = small(tmp_path, server.url, t={"magpie": {"model": "m", "rows": 50}})
        raw["models"]["m"] |= {"retries": 0, "give_up_after": 6}
        with pytest.raises(RunError, match=r"\d+ requests in a row"):
            made(raw, tmp_path)
    assert not (tmp_path / "out/train.jsonl").exists()


def test_another_configuration_is_not_mixed_in_and_answers_stay(tmp_path: Path) -> None:
    with serving(author) as server:
        part = {"magpie": {"model": "m", "rows": 6, "turns": 1}}
        made(small(tmp_path, server.url, t=part), tmp_path)
        asked = len(server.seen)
        other = small(tmp_path, server.url, t=part | {"steps": [{"length": {"at_least": 10}}]})
        with pytest.raises(UserError, match="use --overwrite"):
            made(other, tmp_path)
        rows, _ = made(other, tmp_path, overwrite=True)
        assert rows and len(server.seen) == asked
        other["models"]["m"] |= {"url": server.url + "/", "concurrency": 2}
        assert made(other, tmp_path)[0] == rows, "where the model is served changes no row"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "chat.yaml"
    raw = small(tmp_path, "http://nobody.invalid/v1", t={"magpie": {"model": "m", "rows": 4, "turns": 1}})
    config.write_text(yaml.safe_dump(raw))
    with serving(author) as server:
        chatdata(config, tmp_path / "elsewhere", server.url)
    told = capsys.readouterr()
    assert told.out.strip() == str(tmp_path / "elsewhere/card.html")
    assert re.search(r"t: 4 rows made, \d kept; \d answers, \d+ tokens", told.err)
    assert (tmp_path / "elsewhere/train.jsonl").is_file() and not (tmp_path / "out").exists()


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match=r"the output .*out is a file; give a folder"):
        made(small(tmp_path, a=GIVEN), tmp_path)


def test_shares_are_kept_whatever_is_there(tmp_path: Path) -> None:
    data = {name: write(tmp_path / f"{name}.jsonl", [talk(f"{name} {n}") for n in range(count)])
            for name, count in (("a", 40), ("b", 9))}  # fmt: skip
    parts = {
        name: {"given": {"data": data[name]}, "share": share} for name, share in (("a", 0.7), ("b", 0.3))
    }
    rows, _ = made(small(tmp_path, **parts), tmp_path)
    assert Counter(row["source"] for row in rows) == {"a": 21, "b": 9}
    assert [row["source"] for row in rows] != ["a"] * 21 + ["b"] * 9, "in random order"
    raw = small(tmp_path, **parts) | {"rows": 10}
    rows, _ = made(raw, tmp_path, overwrite=True)
    assert Counter(row["source"] for row in rows) == {"a": 7, "b": 3}


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [{"messages": []}, {"text": 1}, 7])
    with pytest.raises(DataError, match="not one row stayed"):
        made(small(tmp_path, a={"given": {"data": data}}), tmp_path)
    assert not (tmp_path / "out/train.jsonl").exists()


GIVEN = {"given": {"data": "x.jsonl"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": [{"name": "a"} | GIVEN, {"name": "a"} | GIVEN]}, "part 'a' is there twice"),
        ({"parts": [{"name": "a"}]}, "is to be given, found none"),
        ({"parts": [{"name": "a", "magpie": {"model": "m", "rows": 1}} | GIVEN]}, "found magpie and given"),
        ({"parts": [{"name": "a", "magpie": {"model": "n", "rows": 1}}]}, "model 'n' is not among `models`"),
        ({"parts": [{"name": "a", "magpie": {"model": "m", "rows": 1, "categories": {"x": 0.5}}}]}, "add up to 0.5"),
        ({"parts": [{"name": "a", "rewrite": {"model": "m"}}]}, "either `inputs`"),
        ({"parts": [{"name": "a", "share": 0.5} | GIVEN]}, "add up to 1"),
        ({"parts": [{"name": "a", "steps": [{"match": {"pattern": "("}}]} | GIVEN]}, "'(' is no regular expression"),
        ({"parts": [{"name": "a", "steps": ["exakt"]} | GIVEN]}, "'exakt' is not known here; did you mean 'exact'?"),
        ({"parts": [{"name": "a", "magpie": {"model": "m", "row": 3}}]}, "parts.0.magpie: 'row' is not known here; did you mean 'rows'?"),
        ({"parts": [{"name": "a", "preferences": {"prompts": "x", "writers": ["m"]}}]}, "either `judge`"),
        ({"parts": [{"name": "a"} | GIVEN]}, "there is no data file x.jsonl"),
    ],
)  # fmt: skip
def test_mistakes_in_the_file(tmp_path: Path, change: Raw, message: str) -> None:
    with pytest.raises(UserError) as found:
        made(small(tmp_path, "http://localhost:1/v1") | change, tmp_path)
    assert message in str(found.value) and "\n" not in str(found.value)
