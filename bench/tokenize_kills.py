"""kill -9 of `smol preprocess` at random moments, restarted each time. By hand: `python -m bench.tokenize_kills`.

Kills the command, or now and then one of its workers, and gives the same command again, until it was killed 20
times; when it finishes before a kill, it begins again with an empty folder. Every output must be byte for byte
that of a run which nobody killed. The moments are random but recorded: --seed repeats them (as far as the machine
is as fast as before). Takes about 3 minutes on a quiet machine. tests/data/test_tokenize.py has a short version.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from bench import mixed_text
from bench.common import ROOT, say

_WORKER_KILLS = 0.3


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tokenize_kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="default: 20")
    parser.add_argument("--workers", type=int, default=2, help="default: 2")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--copies", type=int, default=4, help="of the text, 70 MB each (default: 4)")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        inputs, tokenizer = _inputs(work, args.copies)
        options = ["--tokenizer", tokenizer, "--workers", args.workers, "--source", "text"]
        begin = time.monotonic()
        subprocess.run(_command(inputs, work / "whole", options), check=True, cwd=ROOT, capture_output=True)
        seconds = time.monotonic() - begin
        say(f"nobody kills it: {seconds:.1f} s")
        whole, out = _contents(work / "whole"), work / "out"
        kills = {"command": 0, "worker": 0}
        finished = 0
        while sum(kills.values()) < args.kills or out.exists():
            wanted = sum(kills.values()) < args.kills
            after = chance.uniform(0, seconds)
            victim = "worker" if chance.random() < _WORKER_KILLS else "command"
            if _run(_command(inputs, out, options), after if wanted else None, victim):
                kills[victim] += 1
                say(f"killed the {victim} after {after:.2f} s; {_blocks(out)} blocks are kept")
                continue
            if _contents(out) != whole:
                print(f"error: {out} differs from what nobody killed", file=sys.stderr)
                return 1
            finished += 1
            shutil.rmtree(out)
    print(
        f"killed {kills['command']} times the command and {kills['worker']} times a worker; {finished} outputs, "
        f"each byte for byte that of a run which nobody killed"
    )
    return 0


def _run(command: list[str], kill_after: float | None, victim: str) -> bool:
    """Run the command; returns whether it was killed before its end."""
    process = psutil.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        _, log = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        target = _worker(process) if victim == "worker" else process
        target.kill()
        _, log = process.communicate()
        if target is not process and "a worker process was killed" not in log and process.returncode:
            raise RuntimeError(f"a killed worker was not told: {log}") from None
        return bool(process.returncode)
    if process.returncode:
        raise RuntimeError(f"it failed by itself: {log}")
    return False


def _worker(process: psutil.Popen) -> psutil.Process:
    """One of its workers, or itself while there is none."""
    workers = [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
    return workers[0] if workers else process


def _inputs(work: Path, copies: int) -> tuple[list[Path], Path]:
    text = mixed_text.make(work / "text")
    inputs = []
    (work / "many").mkdir()
    for copy in range(copies):
        for file in text.files:
            inputs.append(work / "many" / f"{copy}-{file.name}")
            inputs[-1].symlink_to(file)
    return inputs, mixed_text.tokenizer(work / "tokenizer", text)


def _command(inputs: list[Path], out: Path, options: list[object]) -> list[str]:
    return [
        sys.executable,
        "-m",
        "megatron_smol",
        "preprocess",
        *map(str, [*inputs, "--output", out, *options]),
    ]


def _blocks(out: Path) -> int:
    return len(list(out.rglob("block-*.json")))


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


if __name__ == "__main__":
    sys.exit(main())
