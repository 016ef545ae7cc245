"""`python -m bench [names]`: run the benches, each in its own process, and renew bench/results/README.md."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from bench.common import CORES, ROOT
from bench.table import write_table

BENCHES = {
    "index": "plan and data order of the 11T recipe, against megatron-core's index builders",
    "tokenize": "JSONL to .bin/.idx on one core, against one document at a time through Hugging Face",
    "loader": "samples/s, against megatron-core's BlendedDataset on the same files",
    "step": "CPU training step, against plain transformers with torch's AdamW",
    "checkpoint": "save and load, against torch.save and torch.load of the same tensors",
    "duplicates": "near duplicates, against datatrove's MinHash",
    "convert": "Hugging Face to Megatron and back, against transformers loading and saving the model",
}


def main() -> int:
    listed = "\n".join(f"  {name:<11} {what}" for name, what in BENCHES.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=listed,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", metavar="name", help="which to run (default: all, about 15 minutes)"
    )
    names = parser.parse_args().names or list(BENCHES)
    if unknown := [name for name in names if name not in BENCHES]:
        parser.error(f"no bench '{unknown[0]}'; allowed: {', '.join(BENCHES)}")
    quiet = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "SMOL_DEVICE": "cpu",
        "PYTHONWARNINGS": "ignore",
    }
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(CORES))}
    failed = []
    for name in names:
        print(f"\n{name}: {BENCHES[name]}", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        command = [sys.executable, "-m", f"bench.{name}"]
        if subprocess.run(command, cwd=ROOT, env=os.environ | quiet | threads).returncode:
            failed.append(name)
        print(f"  {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    print(f"\nwritten: {write_table(list(BENCHES)).relative_to(ROOT)}")
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
