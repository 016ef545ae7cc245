"""The plan's memory formulas against what real CPU steps hold and allocate: every layout and precision of the table, both counted in bytes.

Not a ratio against a peer, so not among `python -m bench`: python -m bench.memory writes bench/results/memory.json. A number is estimated over
counted; 1 is exact. tests/recipe/test_estimate.py holds a tenth of it in the tests.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime

from bench.common import RESULTS, machine, say
from tests.helpers import run_ranks
from tests.recipe import memory_ranks

JOBS = [(shape, micro_batch) for shape in memory_ranks.SHAPES for micro_batch in (1, 4)]
LAYOUTS = {
    "one rank": (1, ""),
    "tp 2": (2, "tp: 2"),
    "tp 2, sp": (2, "tp: 2, sequence_parallel: true"),
    "pp 2": (2, "pp: 2"),
    "pp 2, vpp 2": (2, "pp: 2, vpp: 2"),
    "cp 2, ring": (2, "cp: 2"),
    "cp 2, all-gather": (2, "cp: 2, cp_comm: all_gather"),
    "dp 2": (2, ""),
    "recompute full": (1, "recompute: full"),
}


def main() -> int:
    rows = []
    for layout, (ranks, parallel) in LAYOUTS.items():
        for precision in ("fp32", "bf16"):
            found = run_ranks(memory_ranks.compare, ranks, JOBS, parallel, precision)
            for rank, results in enumerate(found):
                for (shape, micro_batch), one in zip(JOBS, results, strict=True):
                    ratios = {name: estimated / counted for name, (counted, estimated) in one.items()}
                    where = {"layout": layout, "precision": precision, "rank": rank}
                    rows.append(
                        {
                            **where,
                            "shape": shape,
                            "micro_batch": micro_batch,
                            "estimated_over_counted": ratios,
                        }
                    )
            worst = max(
                abs(row["estimated_over_counted"]["peak"] - 1) for row in rows if row["layout"] == layout
            )
            say(f"{layout}, {precision}: peak within {worst:.1%}")
    result = {
        "name": "memory",
        "rows": rows,
        "worst_error": {
            name: max(abs(row["estimated_over_counted"][name] - 1) for row in rows)
            for name in ("parameters", "weights", "gradients", "optimizer", "peak")
        },
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
    }
    (RESULTS / "memory.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["worst_error"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
