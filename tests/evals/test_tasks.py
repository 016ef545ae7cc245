"""Prompts and choices of our YAML files, local data, and golds that are missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_smol.errors import DataError, UserError
from megatron_smol.evals.suites import OURS, formulation, listed_tasks, named_suite, suite_names
from megatron_smol.evals.tasks import load_tasks
from tests.evals.conftest import arc_rows, gsm8k_rows, piqa_rows, write_rows

HELLASWAG = {
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof. [header] He",
    "ctx_b": "he",
    "endings": ["is using wrap.", "is [step] ripping  tiles.", " pulls.", "starts [title] it."],
    "label": "3",
}
# One row of each data set, and what SmolLM2's harness makes of it: prompt, choices with the space before, gold.
FORMULATIONS: dict[str, tuple[str, dict[str, Any], str, list[str], int]] = {
    "smollm2_hellaswag": (
        "validation",
        HELLASWAG,
        "Roof shingle removal: A man is sitting on a roof. He He ",
        [" is using wrap.", " is ripping tiles.", "  pulls.", " starts. it."],
        3,
    ),
    "smollm2_commonsense_qa": (
        "validation",
        {"question": "Where is a key?", "choices": {"label": ["A", "B"], "text": ["in bed", "door"]}, "answerKey": "B"},
        "Where is a key?",
        [" in bed", " door"],
        1,
    ),
    "smollm2_winogrande": (
        "validation",
        {"sentence": "The cup fell off the table as the _ was wet. ", "option1": "cup", "option2": "table", "answer": "2"},
        "The cup fell off the table as the ",
        ["cup was wet.", "table was wet."],
        1,
    ),
    "smollm2_siqa": (
        "validation",
        {"context": "Kim ran.", "question": "Why?", "answerA": "fun", "answerB": "fear", "answerC": "rain", "label": "3"},
        "Kim ran. Why?",
        [" fun", " fear", " rain"],
        2,
    ),
    "smollm2_mmlu_cloze": (
        "test",
        {"question": "2 + 2 =", "subject": "abstract_algebra", "choices": ["1", "2", "3", "4"], "answer": 3},
        "The following are questions about abstract algebra.\nQuestion: 2 + 2 =\nAnswer:",
        [" 1", " 2", " 3", " 4"],
        3,
    ),
    "smollm2_mmlu_letter": (
        "test",
        {"question": "2 + 2 =", "subject": "abstract_algebra", "choices": ["1", "2", "3", "4"], "answer": 3},
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n2 + 2 =\n"
        "A. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
        [" A", " B", " C", " D"],
        3,
    ),
    "smollm2_mmlu_pro": (
        "test",
        {"question": "Why?", "category": "computer science", "options": ["x", "y", "z"], "answer_index": 2},
        "The following are multiple choice questions (with answers) about computer science.\n\nWhy?\n"
        "A. x\nB. y\nC. z\nAnswer:",
        ["A", "B", "C"],
        2,
    ),
}  # fmt: skip


def load(task: str, data: Path) -> Any:
    (question,) = load_tasks(listed_tasks([task]).items, data)
    return question


def requests(task: Any, **how: Any) -> list[tuple[str, Any]]:
    task.set_config(key="num_fewshot", value=task.get_config("num_fewshot") or 0)
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests(limit=None, rank=0, world_size=1, **how)
    return [instance.args for instance in task.instances]


@pytest.mark.parametrize("name", sorted(FORMULATIONS))
def test_multiple_choice_is_asked_as_smollm2_did(name: str, tmp_path: Path) -> None:
    split, row, prompt, choices, gold = FORMULATIONS[name]
    write_rows(tmp_path / name / f"{split}.jsonl", [row])
    task = load(name, tmp_path).task
    assert requests(task) == [(prompt, choice) for choice in choices]
    target = task.doc_to_target(task.eval_docs[0])
    assert (
        task.doc_to_choice(task.eval_docs[0]).index(target) if isinstance(target, str) else target
    ) == gold


def test_generated_answers_are_asked_and_judged_as_smollm2_did(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "smollm2_trivia_qa" / "validation.jsonl",
        [{"question": "Who?", "answer": {"aliases": ["The Who", "U.N."]}}],
    )
    write_rows(tmp_path / "smollm2_gsm8k" / "test.jsonl", gsm8k_rows(1))
    write_rows(tmp_path / "smollm2_gsm8k" / "train.jsonl", gsm8k_rows())
    write_rows(
        tmp_path / "smollm2_bbh" / "snarks" / "test.jsonl",
        [{"input": f"{i}?", "target": f"({i})"} for i in range(5)],
    )
    trivia, gsm8k = load("smollm2_trivia_qa", tmp_path).task, load("smollm2_gsm8k", tmp_path).task
    bbh = load("smollm2_bbh:snarks", tmp_path)
    assert bbh.label == "smollm2_bbh:snarks"
    assert requests(trivia)[0] == (
        "Question: Who?\nAnswer:",
        {"until": ["Question"], "max_gen_toks": 20, "do_sample": False},
    )
    prompt, how = requests(gsm8k)[0]
    assert prompt.endswith("\n\nQuestion: 0 and 1?\nAnswer:") and prompt.count("\n#### ") == 5
    assert how == {"until": ["Question"], "max_gen_toks": 256, "do_sample": False}
    prompt = requests(bbh.task)[0][0]
    assert prompt.endswith("\n\nQuestion: 0?\nAnswer: ") and prompt.count("Answer: (") == 3

    def score(task: Any, answer: str) -> float:
        for instance in task.instances:
            instance.resps = [answer]
        task.apply_filters()
        return float(
            task.process_results(task.eval_docs[0], [task.instances[0].filtered_resps["none"]])["exact_match"]
        )

    assert [score(trivia, a) for a in (" the who\n", " UN", " The Who.", " The Who, and more", "")] == [
        1,
        1,
        1,
        0,
        0,
    ]
    assert [score(gsm8k, a) for a in (" so\n#### 1", "#### 1,", "#### 2", "1", "#### 1 Then\n#### 2")] == [
        1,
        1,
        0,
        0,
        1,
    ]
    assert [score(bbh.task, a) for a in ("(0)", " (0) \n\n", "(0) or (1)")] == [1, 1, 0]


def test_every_task_of_every_suite_is_known() -> None:
    ours = {path.stem for path in OURS.glob("*.yaml")}
    for name in suite_names():
        suite = named_suite(name)
        assert suite.items and all(formulation(item.name) and item.metric for item in suite.items)
        labels = {item.label for item in suite.items}
        assert all(set(parts) <= labels for parts in suite.means.values())
        assert {item.name.removeprefix("smollm2_") for item in suite.items if "smollm2" in item.name} <= ours
    assert named_suite("smollm2-instruct").chat_template and not named_suite("smollm2-base").chat_template
    limits = {item.name: item.limit for item in named_suite("early-signal").items}
    assert limits["piqa"] == 1000 and limits["smollm2_mmlu_cloze"] is None
    assert {item.limit for item in named_suite("early-signal", limit=5).items} == {5}
    assert len(named_suite("smollm2-instruct").means["smollm2_bbh"]) == 27


# --- local data --------------------------------------------------------------------------------------------


def test_downloaded_hub_data_is_found(tmp_path: Path) -> None:
    for folder in ("allenai/ai2_arc/ARC-Easy", "ai2_arc/ARC-Challenge"):
        path = tmp_path / folder / "test-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(arc_rows()), path)
    easy, challenge = (load(name, tmp_path) for name in ("arc_easy", "arc_challenge"))
    assert easy.count == challenge.count == 6 and easy.data == challenge.data  # by content
    assert easy.definition == challenge.definition != load_piqa(tmp_path).definition


def load_piqa(folder: Path) -> Any:
    write_rows(folder / "piqa" / "validation.jsonl", piqa_rows())
    return load("piqa", folder)


def test_a_group_and_a_yaml_file_of_the_user(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_rows(data / "arc_easy" / "test.jsonl", arc_rows())
    for split in ("train", "validation"):
        write_rows(data / "piqa" / f"{split}.jsonl", piqa_rows())
    (tmp_path / "pair.yaml").write_text("group: pair\ntask: [arc_easy, {task: piqa, num_fewshot: 2}]\n")
    (tmp_path / "mine.yaml").write_text("task: mine\ninclude: piqa_like\n")
    found = load_tasks(listed_tasks([str(tmp_path / "pair.yaml")]).items, data)
    assert [(q.label, q.task.get_config("num_fewshot")) for q in found] == [("arc_easy", None), ("piqa", 2)]
    with pytest.raises(UserError, match=r"mine.yaml is not the YAML file of an lm-eval task"):
        load_tasks(listed_tasks([str(tmp_path / "mine.yaml")]).items, data)


def test_what_is_not_there(tmp_path: Path, data: Path) -> None:
    with pytest.raises(UserError, match=r"there is no suite 'smollm2-bas'; did you mean 'smollm2-base'\?"):
        named_suite("smollm2-bas")
    with pytest.raises(UserError, match=r"task 'smollm2_bbh' has no part 'snark'; did you mean 'snarks'\?"):
        listed_tasks(["smollm2_bbh:snark"])
    with pytest.raises(UserError, match=r"there is no task 'arc_eazy'; did you mean arc_easy"):
        load("arc_eazy", data)
    with pytest.raises(
        DataError, match=r"no data for task openbookqa in .*: test.jsonl, .json or .parquet is expected in"
    ):
        load("openbookqa", data)
    write_rows(tmp_path / "smollm2_gsm8k" / "test.jsonl", gsm8k_rows())
    with pytest.raises(
        DataError, match=r"shows 5 examples from the split 'train', and .* has no train.jsonl"
    ):
        load("smollm2_gsm8k", tmp_path)
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "arc_easy" / "test.jsonl").write_text("{not json\n")
    with pytest.raises(DataError, match=r"task arc_easy: its local data cannot be read"):
        load("arc_easy", tmp_path)


# --- golds -------------------------------------------------------------------------------------------------


def damaged(rows: list[dict[str, Any]], at: int, **changes: Any) -> list[dict[str, Any]]:
    return [row | changes if index == at else row for index, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("task", "file", "rows", "message"),
    [
        ("arc_easy", "test", damaged(arc_rows(), 4, answerKey=None), r"question 5 of 6: no gold answer \(answerKey is empty"),
        ("arc_easy", "test", damaged(arc_rows(), 0, answerKey=""), r"question 1: no gold answer \(answerKey is empty"),
        ("arc_easy", "test", damaged(arc_rows(), 3, answerKey="E"), r"question 4 of 6: no gold answer \('E' is not in list"),
        ("arc_easy", "test", [{k: v for k, v in row.items() if k != "answerKey"} for row in arc_rows()],
         r"question 1: no gold answer \(answerKey is empty or missing"),
        ("piqa", "validation", damaged(piqa_rows(), 1, label=-1), r"question 2 of 4: no gold answer \(-1 is none of its 2 choices"),
        ("piqa", "validation", damaged(piqa_rows(), 2, label=2), r"question 3 of 4: no gold answer \(2 is none of its 2 choices"),
        ("piqa", "validation", damaged(piqa_rows(), 2, label=None), r"question 3 of 4: no gold answer \(label is empty"),
        ("smollm2_hellaswag", "validation", [HELLASWAG, HELLASWAG | {"label": ""}], r"question 2 of 2: no gold answer \(label is empty"),
        ("smollm2_bbh:snarks", "test", damaged([{"input": "x", "target": "y"}] * 5, 3, target=" "),
         r"question 4 of 5: no gold answer \(it is empty"),
    ],
)  # fmt: skip
def test_a_missing_gold_is_an_error(
    task: str, file: str, rows: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    write_rows(tmp_path.joinpath(*task.split(":")) / f"{file}.jsonl", rows)
    with pytest.raises(DataError, match=f"^task {task}, {message}"):
        load(task, tmp_path)


def test_a_gold_beyond_the_limit_is_not_asked_for(tmp_path: Path) -> None:
    write_rows(tmp_path / "arc_easy" / "test.json", [])
    (tmp_path / "arc_easy" / "test.json").write_text(json.dumps(damaged(arc_rows(), 4, answerKey=None)))
    (question,) = load_tasks(listed_tasks(["arc_easy"], limit=4).items, tmp_path)
    assert question.count == 4
