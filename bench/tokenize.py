"""JSONL to .bin/.idx on one core: `smol preprocess` against one document at a time through Hugging Face.

The peer is what Megatron-style scripts do: json.loads, tokenizer(text), an end-of-document id, megatron-core's
IndexedDatasetBuilder. Both read the same 70 MB and more of mixed real text (bench/mixed_text.py) and must write
the same bytes; ids must also be the same on a fuzz set. Ours is timed as the command runs by default: hashes of
the inputs, comparison of the tokenizers on a sample, documents shuffled, manifest written. Both load their
tokenizer within the time; imports are not counted. Two workers are then timed against one on six times the text.
Memory: bench/tokenize_memory.py. Kills: bench/tokenize_kills.py.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
import transformers
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from bench import mixed_text
from bench.common import CORES, Outcome, Seconds, Turns, digits, run, say, take_turns, timed
from megatron_smol.data.manifest import Manifest
from megatron_smol.data.tokenize import preprocess
from megatron_smol.data.tokenizer import choose_backend, load_tokenizer

LEAST_BYTES = 60_000_000
COPIES = 6  # of the text, for two workers against one: a worker takes half a second to start
FUZZ_STRINGS = 40_000


def measure() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        text = mixed_text.make(work / "text")
        if text.bytes < LEAST_BYTES:
            raise RuntimeError(f"only {text.bytes:,} bytes of text here, at least {LEAST_BYTES:,} are needed")
        tokenizer = mixed_text.tokenizer(work / "tokenizer", text)
        fuzzed = _fuzz(tokenizer)
        turns, made = _against_peer(work, text, tokenizer)
        workers = _two_workers(work, text.files, tokenizer) if CORES > 1 else None
        startup = _startup(work, tokenizer)
    our_rate, peer_rate = turns.rates(made.tokens)
    wall = Turns(turns.ours, turns.peer, "wall").ratio.median
    notes = [
        f"on the wall {digits(wall)}; {startup:.2f} s of ours are start-up whatever the size",
        f"ids are Hugging Face's on all {text.bytes / 1e6:.0f} MB (.bin and .idx byte for byte, without the "
        f"shuffle) and on {fuzzed:,} fuzzed strings",
    ]
    if workers is not None:
        two = workers.ratio
        spread = f"{digits(min(two.values))} to {digits(max(two.values))}"
        notes.append(
            f"two workers {digits(two.median)} times one ({spread}), {COPIES} x the text, on the wall"
        )
    return Outcome(
        ratio=turns.ratio,
        ratio_of=f"tokens/s of one core, {text.bytes / 1e6:.0f} MB of JSONL to .bin/.idx",
        peer_is="json.loads, tokenizer(text), IndexedDatasetBuilder",
        ours=f"{our_rate.median:,.0f} tokens/s ({text.bytes / made.tokens * our_rate.median / 1e6:.1f} MB/s)",
        peer=f"{peer_rate.median:,.0f} tokens/s ({text.bytes / made.tokens * peer_rate.median / 1e6:.1f} MB/s)",
        details={
            "tokens": made.tokens,
            "documents": made.documents,
            "bytes": text.bytes,
            "files_equal": True,
            "fuzzed_strings_equal": fuzzed,
            "our_startup_cpu_seconds": startup,
            "peer_measured": "once, in parts between the runs of ours",
            **turns.to_json(),
            "two_workers_against_one": workers.ratio.to_json() if workers else None,
        },
        settings={
            "text": text.kinds,
            "text_sha256": text.sha256[:12],
            "tokenizer": made.tokenizer.sha256[:12],
            "workers": 1,
        },
        notes=notes,
    )


def _against_peer(work: Path, text: mixed_text.MixedText, tokenizer: Path) -> tuple[Turns, Manifest]:
    made: list[Manifest] = []

    def ours() -> Seconds:
        output = work / "ours"
        shutil.rmtree(output, ignore_errors=True)
        return timed(lambda: made.append(_preprocess(text.files, output, tokenizer)))

    # The peer takes long, so it goes once, file by file with a run of ours before each and at the end.
    say("the peer takes about a minute")
    ours_runs, peer = [ours()], _OneAtATime(tokenizer, work / "peer")
    peer_parts = [timed(peer.open)]
    for path in text.files:
        peer_parts.append(timed(lambda path=path: peer.add(path)))  # type: ignore[misc]
        ours_runs.append(ours())
    peer_parts.append(timed(peer.close))
    whole = Seconds(sum(part.wall for part in peer_parts), sum(part.cpu for part in peer_parts))
    preprocess(text.files, work / "ordered", tokenizer, layout="prefix", workers=1, seed=None)
    pairs = [(work / f"ordered{end}", work / f"peer{end}") for end in (".bin", ".idx")]
    if any(one.read_bytes() != other.read_bytes() for one, other in pairs):
        raise AssertionError("ours and the peer wrote different files: the comparison means nothing")
    return Turns(tuple(ours_runs), (whole,) * len(ours_runs), "cpu"), made[0]


def _two_workers(work: Path, files: Sequence[Path], tokenizer: Path) -> Turns:
    many = []
    (work / "many").mkdir()
    for copy in range(COPIES):
        for file in files:
            many.append(work / "many" / f"{copy}-{file.name}")
            many[-1].symlink_to(file)

    def by(workers: int) -> Seconds:
        # As a command: a worker imports the main module again, and this one is heavy.
        shutil.rmtree(work / "out", ignore_errors=True)
        options = ["--output", work / "out", "--tokenizer", tokenizer, "--workers", workers]
        command = [sys.executable, "-m", "megatron_smol", "preprocess", *many, *options]
        return timed(lambda: subprocess.run(list(map(str, command)), check=True, stderr=subprocess.DEVNULL))

    return take_turns(lambda: by(2), lambda: by(1), 3, "wall")


def _preprocess(inputs: Sequence[Path], output: Path, tokenizer: Path) -> Manifest:
    made = preprocess(inputs, output, tokenizer, workers=1)
    assert made is not None
    return made


def _startup(work: Path, tokenizer: Path) -> float:
    """Processor seconds of our command for a single line."""
    small = work / "small.jsonl"
    small.write_text(json.dumps({"text": "A line of text."}) + "\n")
    return timed(lambda: _preprocess([small], work / "small", tokenizer)).cpu


def _fuzz(folder: Path) -> int:
    """Compare ids on strings that tokenizers disagree about; returns how many. Half a surrogate pair is left out:
    it is no character, Hugging Face refuses it, and `smol preprocess` drops and counts it."""
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.encode_special_tokens = True
    ours = choose_backend(load_tokenizer(folder), [])
    specials = [token.content for token in reference.get_added_tokens_decoder().values()]
    chance = random.Random(0)
    texts = [_fuzzed(chance, specials) for _ in range(FUZZ_STRINGS)]
    expected = reference.encode_batch_fast(texts, add_special_tokens=False)
    for text, found, wanted in zip(texts, ours.encode_batch(texts), expected, strict=True):
        if found.tolist() != wanted.ids:
            raise AssertionError(f"other ids than Hugging Face's for {text!r} (backend {ours.backend})")
    return len(texts)


def _fuzzed(chance: random.Random, specials: Sequence[str]) -> str:
    kinds = (
        lambda: chr(chance.choice((chance.randrange(0xD800), chance.randrange(0xE000, 0x110000)))),
        lambda: chance.choice(" \t\n\r\u00a0\u2028\u3000") * chance.randrange(1, 5),
        lambda: str(chance.randrange(10**6)),
        lambda: chr(chance.randrange(32)),
        lambda: chr(chance.randrange(32, 127)) * chance.randrange(1, 4),
        lambda: chance.choice(
            ("'s", "'LL", "don't", "e\u0301", "\U0001f468\u200d\U0001f469", "the", "Ⅷ", "٣")
        ),
        lambda: chance.choice(specials),
    )
    return "".join(chance.choice(kinds)() for _ in range(chance.randrange(30)))


class _OneAtATime:
    """The peer."""

    def __init__(self, tokenizer: Path, prefix: Path) -> None:
        self._folder, self._prefix = tokenizer, prefix

    def open(self) -> None:
        # Ours keeps `<filename>` written in a text as text; the peer's default makes it a control token. The
        # length limit only silences a warning.
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(
            self._folder, split_special_tokens=True, model_max_length=10**9
        )
        self._end = self._tokenizer.convert_tokens_to_ids(mixed_text.END)
        self._builder = IndexedDatasetBuilder(f"{self._prefix}.bin", dtype=np.uint16)

    def add(self, path: Path) -> None:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                ids = self._tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
                self._builder.add_document([*ids, self._end], [len(ids) + 1])

    def close(self) -> None:
        self._builder.finalize(f"{self._prefix}.idx")


if __name__ == "__main__":
    run("tokenize", measure)
