"""What the steps on a GPU machine share: rows appended to $OUT as they are made, a time box, a dry run on the CPU.

Each step is a module with a list of rows. A row that fails (out of memory, a missing package) is written down with its error, and
the next one runs; time that runs out leaves whole lines behind. `--dry-run` does the same work with a tiny model.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_smol.errors import UserError
from megatron_smol.measure.setting import Setting, make_setting
from megatron_smol.prepare import prepare_libraries

MODEL = "smollm2_1.7b"
Row = tuple[str, Callable[[], dict[str, Any]]]


@dataclass(frozen=True)
class Options:
    dry_run: bool
    seconds: float
    rest: list[str]
    out: Path

    def setting(
        self, precision: str, seq_length: int, tokens_per_micro_batch: int, steps: int = 10, layout: str = ""
    ) -> Setting:
        """A bench of the 1.7B; in a dry run of a tiny model with an eighth of a 64th of the tokens."""
        model = "tiny" if self.dry_run else MODEL
        if self.dry_run:
            seq_length, tokens_per_micro_batch = seq_length // 64, tokens_per_micro_batch // 512
            steps = 1
        micro_batch = max(tokens_per_micro_batch // seq_length, 1)
        made = make_setting(model, precision, seq_length, micro_batch, layout, steps, 5, 1)
        return replace(made, warmup=1) if self.dry_run else made


def options(description: str | None, seconds: float) -> Options:
    """Command line of a step; a dry run is on the CPU."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--dry-run", action="store_true", help="a tiny model on the CPU: the same code, no meaning"
    )
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="no new row after so many (default: %(default)s)"
    )
    parser.add_argument("rest", nargs="*", help="what the step takes: precisions, rows or files")
    given = parser.parse_args()
    if given.dry_run:
        os.environ["SMOL_DEVICE"] = "cpu"
    prepare_libraries()
    out = Path(os.environ.get("OUT", "runs/gpu"))
    out.mkdir(parents=True, exist_ok=True)
    return Options(given.dry_run, given.seconds, given.rest, out)


def run_rows(step: str, rows: Iterable[Row], given: Options) -> None:
    """Make each row and append it to $OUT/<step>.jsonl; exit code 1 when none succeeded."""
    begin, good = time.monotonic(), 0
    for name, make in rows:
        spent = time.monotonic() - begin
        if spent > given.seconds:
            _append(given, step, {"row": name, "skipped": f"{spent:.0f} s of {given.seconds:.0f} were spent"})
            continue
        started = time.monotonic()
        try:
            row = {"row": name, "dry_run": given.dry_run, **make()}
            good += 1
        except Exception as error:  # one row must not cost the others
            row = {"row": name, "dry_run": given.dry_run, "error": f"{type(error).__name__}: {error}"}
            if not isinstance(error, UserError | ImportError):
                row["where"] = traceback.format_exc(limit=-3)
        _append(given, step, row | {"seconds": round(time.monotonic() - started, 1)})
        _free()
    sys.exit(0 if good else 1)


def quick_weights() -> None:
    """Draw weights on the device: speed does not ask for the run's own, which take 20 s on the CPU."""
    from megatron_smol.model import llama

    def draw(gpt: Any, model: Any, seed: int) -> None:
        import torch

        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in gpt.parameters():
                parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, model.init_std)

    llama.initialize_weights = draw


def _append(given: Options, step: str, row: dict[str, Any]) -> None:
    with (given.out / f"{step}.jsonl").open("a") as lines:
        lines.write(json.dumps(row, default=str) + "\n")
    print(f"{step} {row['row']}: {_short(row)}", flush=True)


def _short(row: dict[str, Any]) -> str:
    if "error" in row or "skipped" in row:
        return str(row.get("error") or row["skipped"])
    speed = row.get("tokens_per_second_per_gpu")
    if speed is None:
        return ", ".join(f"{k} {v}" for k, v in row.items() if isinstance(v, int | float))
    mfu = row.get("mfu", {}).get("bf16", {}).get("causal")
    return f"{speed['median']:,.0f} tokens/s" + (f", MFU {mfu:.1%}" if mfu else "")


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
