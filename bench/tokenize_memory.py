"""Peak memory of `smol preprocess` on what breaks other preprocessors. By hand: `python -m bench.tokenize_memory`.

Three inputs of real text (bench/mixed_text.py, repeated): one JSON line of 1 GB, one text file of 1 GB, and 10
million documents of a few words. Memory is that of the whole process tree, sampled 20 times a second. Takes about
5 minutes and 6 GB of disk, so `make bench` leaves it out; --megabytes and --documents make it smaller.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from bench import mixed_text
from bench.common import CORES, ROOT, say
from megatron_smol.data.manifest import FOLDER_MANIFEST, read_manifest

LIMIT_BYTES = 1_500_000_000
_SAMPLE_SECONDS = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tokenize_memory", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000, help="of the long documents (default: 1000)")
    parser.add_argument("--documents", type=int, default=10_000_000, help="tiny ones (default: 10000000)")
    parser.add_argument("--workers", type=int, default=CORES, help=f"default: all cores ({CORES})")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    too_much = 0
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        text = mixed_text.make(work / "text")
        tokenizer = mixed_text.tokenizer(work / "tokenizer", text)
        cases = {
            "one JSON line": lambda: _one_line(work / "in.jsonl", text, args.megabytes),
            "one text file": lambda: _one_text(work / "in.txt", text, args.megabytes),
            "tiny documents": lambda: _tiny(work / "in.jsonl", text, args.documents),
        }
        for case, make in cases.items():
            path = make()
            say(f"{case}: {path.stat().st_size / 1e6:,.0f} MB")
            output = work / "out"
            peak, largest, seconds = _peak(
                [path, "--output", output, "--tokenizer", tokenizer, "--workers", args.workers]
            )
            made = read_manifest(output / FOLDER_MANIFEST)
            print(
                f"{case}: {path.stat().st_size / 1e6:,.0f} MB, {made.documents:,} documents, {made.tokens:,} tokens "
                f"in {seconds:.0f} s; peak {peak / 1e6:,.0f} MB in all processes, {largest / 1e6:,.0f} MB in one "
                f"({'below' if peak < LIMIT_BYTES else 'ABOVE'} {LIMIT_BYTES / 1e6:,.0f} MB)",
                flush=True,
            )
            too_much += peak >= LIMIT_BYTES
            path.unlink()
            for file in output.iterdir():
                file.unlink()
    return int(too_much > 0)


def _peak(arguments: list[object]) -> tuple[int, int, float]:
    """(bytes of all processes, of the largest one, seconds) of `smol preprocess`."""
    command = [sys.executable, "-m", "megatron_smol", "preprocess", *map(str, arguments)]
    begin = time.perf_counter()
    process = psutil.Popen(command, cwd=ROOT)
    peak = largest = 0
    while process.poll() is None:
        sizes = []
        for one in (process, *_children(process)):
            try:
                sizes.append(one.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        peak, largest = max(peak, sum(sizes)), max([largest, *sizes])
        time.sleep(_SAMPLE_SECONDS)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak, largest, time.perf_counter() - begin


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _texts(text: mixed_text.MixedText) -> Iterator[str]:
    """Over and over."""
    for file in itertools.cycle(text.files):
        with file.open(encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)


def _one_line(path: Path, text: mixed_text.MixedText, megabytes: int) -> Path:
    left = megabytes * 1_000_000
    with path.open("w", encoding="utf-8") as out:
        out.write('{"id": 1, "text": "')
        for piece in _texts(text):
            left -= out.write(json.dumps(piece)[1:-1])
            if left <= 0:
                break
        out.write('", "url": "here"}\n')
    return path


def _one_text(path: Path, text: mixed_text.MixedText, megabytes: int) -> Path:
    left = megabytes * 1_000_000
    with path.open("w", encoding="utf-8") as out:
        for piece in _texts(text):
            left -= out.write(piece)
            if left <= 0:
                return path
    raise AssertionError


def _tiny(path: Path, text: mixed_text.MixedText, documents: int) -> Path:
    lines = (line for piece in _texts(text) for line in piece.splitlines() if line.strip())
    with path.open("w", encoding="utf-8") as out:
        for number, line in enumerate(itertools.islice(lines, documents)):
            out.write(json.dumps({"id": number, "text": line[:80]}) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
