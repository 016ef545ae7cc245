"""The data of examples/ablation_demo.sh: real text, and openly planted among it a better source and a useless one.

    python -m megatron_smol.ablate.demo data/demo/raw data/ablation-demo

Reads the demo's raw text (tools/make_demo_data.py), cuts it to what the ablation needs, trains a tokenizer of 4,096
entries on it (with SmolLM2's 49,152 nearly all of a small model's time would go into its output layer) and tokenizes:

  docs, code, math   what a run in progress reads
  textbook           the better one: of the kind that the ablation measures; its measured end is not trained on
  rubbish            the useless one: base64 of pseudo-random bytes, as crawls hold it; a tenth of what the run reads
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from megatron_smol.data.demo_text import read_jsonl
from megatron_smol.data.files import write_whole
from megatron_smol.errors import DataError

MEGABYTES = {"docs": 3.0, "code": 2.0, "math": 1.0, "textbook": 1.2}
RUBBISH_PAGES = 200
VOCABULARY = 4096
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def texts_of(raw: Path, source: str, megabytes: float) -> Iterator[str]:
    """The first documents of a source; their order is that of hashes, so that they are a sample of it."""
    left = int(megabytes * 1e6)
    for document in read_jsonl(raw / f"{source}.jsonl"):
        left -= len(document.text)
        if left < 0:
            return
        yield document.text


def rubbish_page(number: int, hashes: int = 64) -> str:
    """Lines of base64; the bytes are SHA-256 of counters, alike on every machine."""
    content = b"".join(hashlib.sha256(f"{number} {i}".encode()).digest() for i in range(hashes))
    return base64.encodebytes(content).decode()


def train_tokenizer(texts: Iterator[str], folder: Path) -> None:
    """A byte-level BPE that splits digits, as SmolLM2's does, from the texts given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    parts = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIALS[2]}
    write_whole(folder / "tokenizer_config.json", json.dumps(config))
    write_whole(folder / "tokenizer.json", tokenizer.to_str())


def make(raw: Path, output: Path) -> None:
    """All sources below `output`; what is there already is not made again. DataError when the raw text is missing."""
    from megatron_smol.data.tokenize import preprocess

    if missing := [source for source in MEGABYTES if not (raw / f"{source}.jsonl").is_file()]:
        raise DataError(
            f"{raw} has no {missing[0]}.jsonl; make the demo's text first: python tools/make_demo_data.py"
        )
    texts = {source: list(texts_of(raw, source, size)) for source, size in MEGABYTES.items()}
    tokenizer = output / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file():
        train_tokenizer((text for own in texts.values() for text in islice(own, 100)), tokenizer)
    texts["rubbish"] = [rubbish_page(number) for number in range(RUBBISH_PAGES)]
    for source, own in texts.items():
        rows = output / f"{source}.jsonl"
        if not rows.is_file():
            write_whole(rows, "".join(json.dumps({"text": text}) + "\n" for text in own))
        manifest = preprocess([rows], output / source, tokenizer, workers=1)
        assert manifest is not None, "only a share of the work returns nothing"
        print(f"{source}: {manifest.documents:,} documents, {manifest.tokens:,} tokens", flush=True)


if __name__ == "__main__":
    try:
        make(Path(sys.argv[1]), Path(sys.argv[2]))
    except DataError as error:
        sys.exit(f"error: {error}")
