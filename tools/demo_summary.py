"""The figures that matter of a finished run, in six lines; exit code 1 when the model did not learn.

Usage: python tools/demo_summary.py runs/demo
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

LEARNT = 6.5  # nats per token; ln(49152) = 10.8 at the start


def main(run: Path) -> int:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    final = [row["loss"] for row in rows if row["stage"] == rows[-1]["stage"]][-10:]
    loss = sum(final) / len(final)
    samples = json.loads((run / "samples.json").read_text())
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    print(
        f"\nloss        {rows[0]['loss']:.2f} at the first step, {loss:.2f} over the last {len(final)} of {rows[-1]['stage']}"
    )
    print(f"speed       {median(row['tokens_per_s'] for row in rows):,.0f} tokens/s (median)")
    print(f"stages      {len(stages)} in one job: {', '.join(stages)}")
    for sample in samples[:2]:
        print(f"sample      {sample['prompt']} → {' '.join(sample['text'].split())[:160]}")
    print(f"model       {run / 'hf'} (transformers loads it)")
    print(f"report      {run / 'report.html'}")
    return 0 if loss < LEARNT else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
