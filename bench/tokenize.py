"""JSONL to .bin/.idx on one core: `smol preprocess` against one document at a time through Hugging Face.

The peer is what Megatron-style scripts do: json.loads, tokenizer(text), an end-of-document id, megatron-core's
IndexedDatasetBuilder. The text is the demo's, or else the source code of Python's standard library with a
tokenizer trained on it. Both write whole files from the same JSONL, and the ids must be the same. Ours is
timed as the command runs by default: hashes of the inputs, comparison of the tokenizers on a sample, documents
shuffled, manifest written. Both load their tokenizer within the time; imports are not counted.
"""

from __future__ import annotations

import json
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import transformers
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from bench.common import ROOT, Outcome, Seconds, Turns, run, say, timed
from megatron_smol.data.manifest import Manifest
from megatron_smol.data.tokenize import preprocess

DEMO = ROOT / "data" / "demo"
STDLIB_BYTES = 12_000_000
END = "<|endoftext|>"


def measure() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        inputs, tokenizer, text = _corpus(work)
        made: list[Manifest] = []

        def ours() -> Seconds:
            output = work / f"ours-{len(made)}"
            return timed(lambda: made.append(preprocess(inputs, output, tokenizer, workers=1)))

        # The peer takes long, so it goes once, file by file with a run of ours before each and at the end.
        say("the peer takes about half a minute")
        ours_runs, peer = [ours()], _OneAtATime(tokenizer, work / "peer")
        peer_parts = [timed(peer.open)]
        for path in inputs:
            peer_parts.append(timed(lambda path=path: peer.add(path)))  # type: ignore[misc]
            ours_runs.append(ours())
        peer_parts.append(timed(peer.close))
        whole = Seconds(sum(part.wall for part in peer_parts), sum(part.cpu for part in peer_parts))
        turns = Turns(tuple(ours_runs), (whole,) * len(ours_runs), "cpu")
        startup = _startup(work, tokenizer)
        preprocess(inputs, work / "ordered", tokenizer, layout="prefix", workers=1, seed=None)
        pairs = [(work / f"ordered{end}", work / f"peer{end}") for end in (".bin", ".idx")]
        if any(one.read_bytes() != other.read_bytes() for one, other in pairs):
            raise AssertionError("ours and the peer wrote different files: the comparison means nothing")
    tokens, size = made[0].tokens, sum(record.bytes for record in made[0].inputs)
    our_rate, peer_rate = turns.rates(tokens)
    return Outcome(
        ratio=turns.ratio,
        ratio_of=f"tokens/s of one core, {size / 1e6:.0f} MB of JSONL to .bin/.idx",
        peer_is="json.loads, tokenizer(text), IndexedDatasetBuilder",
        ours=f"{our_rate.median:,.0f} tokens/s ({size / tokens * our_rate.median / 1e6:.1f} MB/s)",
        peer=f"{peer_rate.median:,.0f} tokens/s ({size / tokens * peer_rate.median / 1e6:.1f} MB/s)",
        details={
            "tokens": tokens,
            "documents": made[0].documents,
            "bytes": size,
            "files_equal": True,
            "our_startup_cpu_seconds": startup,
            "peer_measured": "once, in parts between the runs of ours",
            **turns.to_json(),
        },
        settings={"text": text, "tokenizer": made[0].tokenizer.sha256[:12], "workers": 1},
        notes=[
            f"{startup:.2f} s of ours are start-up whatever the size (two tokenizers opened and compared)",
            "without the shuffle ours writes the same bytes as the peer, .bin and .idx",
        ],
    )


def _startup(work: Path, tokenizer: Path) -> float:
    """Processor seconds of our command for a single line."""
    small = work / "small.jsonl"
    small.write_text(json.dumps({"text": "A line of text."}) + "\n")
    return timed(lambda: preprocess([small], work / "small", tokenizer, workers=1)).cpu


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
        self._end = self._tokenizer.convert_tokens_to_ids(END)
        self._builder = IndexedDatasetBuilder(f"{self._prefix}.bin", dtype=np.uint16)

    def add(self, path: Path) -> None:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                ids = self._tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
                self._builder.add_document([*ids, self._end], [len(ids) + 1])

    def close(self) -> None:
        self._builder.finalize(f"{self._prefix}.idx")


def _corpus(work: Path) -> tuple[list[Path], Path, str]:
    """JSONL files, the tokenizer's folder, and what they are."""
    raw = sorted((DEMO / "raw").glob("*.jsonl"))
    if raw and (DEMO / "tokenizer" / "tokenizer.json").is_file():
        return raw, DEMO / "tokenizer", "the demo's: " + ", ".join(path.stem for path in raw)
    path = work / "stdlib.jsonl"
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": text}) + "\n" for text in _standard_library())
    return [path], _train_tokenizer(work / "tokenizer"), "Python's standard library"


def _standard_library() -> Iterator[str]:
    total = 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in file.parts:
            continue
        text = file.read_bytes().decode(errors="ignore")
        total += len(text)
        if text.strip() and total < STDLIB_BYTES:
            yield text


def _train_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    say("no demo data here: training a tokenizer on the standard library")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=16_384, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(_standard_library(), trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    run("tokenize", measure)
