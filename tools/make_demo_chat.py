#!/usr/bin/env python3
"""Write the demo's chat data: problems of the package reasoning-gym, answered rightly and wrongly.

Writes, under --out (default data/demo/chat):

  sft.jsonl                 {"messages": [question, right answer]}: conversations for `smol sft`
  dpo.jsonl                 {"prompt", "chosen": right answer, "rejected": wrong answer}: pairs for `smol dpo`
  demo_answers/test.jsonl   {"question", "choices", "answer": its index}: questions for `smol eval`

Every answer is put to the task's own verifier first: a right one scores 1, a wrong one less. A rejected answer is a
word, which no question here asks for, and the choices of a question are answers of every kind (a number, a weekday, a
fraction, ...): to tell these from right ones is what the demo's model of 7 million parameters can learn in a minute, to
calculate is not. The same seed gives the same bytes, and no problem is in two files. reasoning-gym is Apache-2.0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_smol.data.files import write_whole
from megatron_smol.errors import UserError

# Short problems with answers of different kinds (a number, a weekday, a fraction, a complex number), so that a
# small model meets many in a minute; task -> its settings.
TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"max_terms": 3, "max_digits": 2},
    "calendar_arithmetic": {"tasks": ["weekday_of_date"]},
    "fraction_simplification": {"max_value": 20, "max_factor": 5, "styles": ["plain"]},
    "complex_arithmetic": {"operations_weights": [0.5, 0.5, 0.0, 0.0]},
}
WRONG_TASK = "spell_backward"  # its answers are words
SEED = 8
SFT, DPO, EVAL = "sft.jsonl", "dpo.jsonl", "demo_answers/test.jsonl"


@dataclass(frozen=True)
class Problem:
    """A question, its right answer, and whether another answer would do."""

    question: str
    answer: str
    is_right: Callable[[str], bool]


def problems(task: str, count: int) -> list[Problem]:
    """The first `count` different problems of a task."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(task, seed=SEED, size=4 * count, **TASKS.get(task, {}))
    entries = list({entry["question"]: entry for entry in dataset}.values())
    if len(entries) < count:
        raise UserError(
            f"{task} has only {len(entries)} different problems and {count} are asked for; ask for fewer rows"
        )
    return [
        Problem(
            entry["question"].strip(),
            str(entry["answer"]),
            lambda answer, entry=entry: bool(dataset.score_answer(answer, entry) == 1),
        )
        for entry in entries[:count]
    ]


def rows(conversations: int, pairs: int, questions: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file, row) of all files, task by task in turn; a problem goes to one file."""
    each = [-(-count // len(TASKS)) for count in (conversations, pairs, questions)]
    ends = [sum(each[: part + 1]) for part in range(len(each))]
    by_task = {task: problems(task, ends[-1]) for task in TASKS}
    words = iter(problems(WRONG_TASK, len(TASKS) * ends[1]))
    for index in range(ends[-1]):
        for place, task in enumerate(TASKS):
            problem = by_task[task][index]
            if index < ends[0]:
                _require_right_and_wrong(problem, [next(words).answer])
                asked = {"role": "user", "content": problem.question}
                told = {"role": "assistant", "content": sentence(problem.answer)}
                yield SFT, {"messages": [asked, told]}
            elif index < ends[1]:
                wrong = next(words).answer
                _require_right_and_wrong(problem, [wrong])
                answers = {"chosen": sentence(problem.answer), "rejected": sentence(wrong)}
                yield DPO, {"prompt": problem.question, **answers}
            else:
                kinds = [by_task[other][index].answer for other in TASKS]
                _require_right_and_wrong(problem, kinds[:place] + kinds[place + 1 :])
                first = index % len(kinds)
                asks = {
                    "question": problem.question,
                    "choices": [sentence(answer) for answer in kinds[first:] + kinds[:first]],
                }
                yield EVAL, asks | {"answer": (place - first) % len(kinds)}


def _require_right_and_wrong(problem: Problem, wrong: list[str]) -> None:
    if not problem.is_right(problem.answer) or any(problem.is_right(answer) for answer in wrong):
        raise UserError(f"the verifier does not tell right from wrong for {problem.question!r}")


def sentence(answer: str) -> str:
    return f"The answer is {answer}."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("data/demo/chat"), help="folder to write")
    parser.add_argument("--conversations", type=int, default=240, help="rows of sft.jsonl (default: 240)")
    parser.add_argument("--pairs", type=int, default=120, help="rows of dpo.jsonl (default: 120)")
    parser.add_argument("--questions", type=int, default=100, help=f"rows of {EVAL} (default: 100)")
    options = parser.parse_args(arguments)
    files: dict[str, list[str]] = {SFT: [], DPO: [], EVAL: []}
    try:
        for name, row in rows(options.conversations, options.pairs, options.questions):
            files[name].append(json.dumps(row, ensure_ascii=False) + "\n")
    except ImportError as error:
        print(f"error: {error.name} is missing: pip install 'megatron-smol[demo]'", file=sys.stderr)
        return UserError.exit_code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for name, lines in files.items():
        (options.out / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.out / name, "".join(lines))
    print(f"{', '.join(f'{len(lines)} rows in {options.out / name}' for name, lines in files.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
