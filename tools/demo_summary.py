"""The figures that matter of a finished run, in eight lines; exit code 1 when the model did not learn.

Usage: python tools/demo_summary.py runs/demo
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

LEARNT = 6.5  # nats per token; ln(49152) = 10.8 at the start


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tail(run: Path) -> list[str]:
    """Held-out figures of SFT and DPO, first and last."""
    sft, dpo = (read(run / step / "validation.jsonl") for step in ("sft", "dpo"))
    return [
        f"SFT         held-out loss {sft[0]['loss']:.3f} before, {sft[-1]['loss']:.3f} after",
        f"DPO         first loss {read(run / 'dpo' / 'metrics.jsonl')[0]['loss']:.4f} (ln 2), held-out margin "
        f"{dpo[0]['margin']:.2f} before, {dpo[-1]['margin']:.2f} after",
    ]


def main(run: Path) -> int:
    rows = read(run / "metrics.jsonl")
    final = [row["loss"] for row in rows if row["stage"] == rows[-1]["stage"]][-10:]
    loss = sum(final) / len(final)
    samples = json.loads((run / "samples.json").read_text())
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    print(
        f"\nloss        {rows[0]['loss']:.2f} at the first step, {loss:.2f} over the last {len(final)} of {rows[-1]['stage']}"
    )
    print(f"speed       {median(row['tokens_per_s'] for row in rows):,.0f} tokens/s (median)")
    print(f"stages      {len(stages)} in one job: {', '.join(stages)}")
    print("\n".join(tail(run)))
    for sample in samples[:2]:
        print(f"sample      {sample['prompt']} → {' '.join(sample['text'].split())[:160]}")
    print(f"model       {run / 'hf'} (transformers loads it)")
    print(f"report      {run / 'report.html'}")
    return 0 if loss < LEARNT else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder of the demo, such as runs/demo")
    sys.exit(main(parser.parse_args().run))
