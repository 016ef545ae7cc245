#!/usr/bin/env python3
"""Megatron's preprocessing command, by its own argument names: text in, <prefix>_<key>_document.bin/.idx out.

A Megatron command line works unchanged; the files open in megatron-core's IndexedDataset and in recipes
(`sources: {prose: {path: data/prose}}`). megatron_smol.data.tokenize does the work; `smol preprocess` is the
same with shards and a document shuffle.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_smol.data.array_job import share_of
from megatron_smol.data.card import write_card
from megatron_smol.data.tokenize import preprocess
from megatron_smol.errors import UserError

TOKENIZER_TYPES = ("HuggingFaceTokenizer",)

EXAMPLES = """
examples:
  one source, as in Megatron:
    python tools/preprocess_data.py --input prose.jsonl --output-prefix data/prose --append-eod --workers 8 \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model HuggingFaceTB/SmolLM2-135M
    -> data/prose_text_document.bin, .idx and .manifest.json

  several compressed files, another key, a tokenizer folder (no network):
    python tools/preprocess_data.py --input 'web/*.jsonl.gz' --json-keys content --output-prefix data/web \\
        --append-eod --workers 8 --tokenizer-model tokenizers/smollm2

  one of 64 tasks of a Slurm array job over the same output (the one that ends last writes the files):
    python tools/preprocess_data.py --input 'web/*.jsonl.gz' --output-prefix data/web --append-eod --workers 8 \\
        --tokenizer-model tokenizers/smollm2 --rank slurm --world-size 64

A command that was interrupted continues where it stopped when it is given again.
Unlike Megatron's: documents without text are left out, `<|im_start|>` in the text stays text, and existing
files are replaced only with --overwrite."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description="Tokenize JSON lines, text or parquet into Megatron's .bin/.idx.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = top.add_argument_group("input data").add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        help="files, folders, globs or URLs (s3://, ...): .jsonl(.gz|.zst), .txt, .parquet",
    )
    add("--json-keys", nargs="+", default=["text"], help="each makes its own <prefix>_<key>_document pair")
    add("--skip-bad", action="store_true", help="skip and count unreadable lines; else the first one stops")

    add("--min-doc-tokens", type=int, help="leave out shorter documents (tokens of the text, without EOD)")
    add("--max-doc-tokens", type=int, help="leave out longer documents")

    add = top.add_argument_group("sentences (BERT-style data)").add_argument
    add("--split-sentences", action="store_true", help="one sequence a sentence, split by nltk")
    add("--keep-newlines", action="store_true", help="sentences keep the white space after them")
    add("--lang", default="english", help="language of the sentence splitter (default: english)")

    add = top.add_argument_group("tokenizer").add_argument
    add("--tokenizer-type", default=TOKENIZER_TYPES[0], help="only HuggingFaceTokenizer (any tokenizer.json)")
    add("--tokenizer-model", required=True, help="hub name, or a local folder with tokenizer.json")
    add(
        "--append-eod",
        action="store_true",
        help="end each document with the tokenizer's end-of-document token",
    )
    add(
        "--backend", choices=["auto", "hf"], default="auto", help="auto: the fast one if its ids are the same"
    )

    add = top.add_argument_group("output").add_argument
    add("--output-prefix", required=True, help="path without the ending")
    add("--overwrite", action="store_true", help="replace existing output")
    add("--no-provenance", action="store_true", help="no .docs.npy (input and row of each document)")

    add = top.add_argument_group("runtime").add_argument
    add(
        "--workers",
        type=int,
        help="processes, one core each (default: all cores); does not change the output",
    )
    add("--rank", help="this task of an array job, from 0; 'slurm': SLURM_ARRAY_TASK_ID")
    add("--world-size", help="tasks of the array job; 'slurm': SLURM_ARRAY_TASK_COUNT")
    add("--log-interval", type=int, default=10_000, help="documents a log line, where there is no terminal")

    add = top.add_argument_group("accepted for Megatron's command lines, not needed here").add_argument
    add("--partitions", type=int, help="inputs are always cut into blocks")
    add("--keep-sequential-samples", action="store_true", help="the input's order is always kept")
    add("--trust-remote-code", action="store_true", help="no code of a tokenizer is ever run")
    add("--vocab-size", type=int, help="the tokenizer's own size is used")
    add("--make-vocab-size-divisible-by", type=int, help="padding the vocabulary is the model's matter")
    return top


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        if args.tokenizer_type not in TOKENIZER_TYPES:
            raise UserError(
                f"--tokenizer-type {args.tokenizer_type} is not supported (allowed: "
                f"{', '.join(TOKENIZER_TYPES)}); point --tokenizer-model to a folder with tokenizer.json"
            )
        level = "sentence" if args.split_sentences else "document"
        for key in args.json_keys:
            output = f"{args.output_prefix}_{key}_{level}"
            manifest = preprocess(
                args.input,
                output,
                args.tokenizer_model,
                layout="prefix",
                json_key=key,
                source=Path(args.output_prefix).name,
                append_eod=args.append_eod,
                min_doc_tokens=args.min_doc_tokens,
                max_doc_tokens=args.max_doc_tokens,
                provenance=not args.no_provenance,
                workers=args.workers,
                share=share_of(args.rank, args.world_size),
                seed=None,
                backend=args.backend,
                split_sentences=args.split_sentences,
                keep_newlines=args.keep_newlines,
                language=args.lang,
                skip_bad=args.skip_bad,
                overwrite=args.overwrite,
                log_interval=args.log_interval,
            )
            if manifest is not None:
                write_card(output, args.tokenizer_model)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
