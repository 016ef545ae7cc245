#!/usr/bin/env python3
"""Checkpoints to Hugging Face folders and back, under Megatron's argument names.

A thin door to megatron_smol.checkpoint.convert; `smol convert` is the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_smol.errors import UserError, leave
from megatron_smol.prepare import prepare_libraries

EXAMPLES = """
examples:
  python tools/convert_checkpoint.py --to hf --load-dir runs/demo/checkpoints/decay-00000146 --save-dir out
  python tools/convert_checkpoint.py --to megatron --load-dir HuggingFaceTB/SmolLM2-135M --save-dir imported

A checkpoint of any tensor-, pipeline- and data-parallel layout is read in this one process. The result is
written only when transformers and megatron-core compute the same logits, loss and greedy text with it."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description="Convert checkpoints between megatron-core and Hugging Face, logits compared.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = top.add_argument
    add("--to", choices=["hf", "megatron"], required=True, help="what to write")
    add("--load-dir", required=True, help="checkpoint folder, or Hugging Face folder or hub name")
    add("--save-dir", type=Path, required=True, help="folder to write")
    add("--tokenizer-model", help="hub name or folder with tokenizer.json (default: the model's own)")
    add("--target-params-dtype", choices=["fp32", "bf16"], help="with --to hf (default: as trained)")
    add("--text", type=Path, help="text to compare on (default: a page that comes along)")
    add("--overwrite", action="store_true", help="replace --save-dir if it holds a model")
    return top


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    prepare_libraries()
    from megatron_smol.checkpoint.convert import from_hf, to_hf

    try:
        if args.to == "hf":
            to_hf(
                Path(args.load_dir),
                args.save_dir,
                tokenizer=args.tokenizer_model,
                dtype=args.target_params_dtype,
                text=args.text,
                overwrite=args.overwrite,
            )
        elif args.target_params_dtype:
            raise UserError(
                "--target-params-dtype goes with --to hf; an import keeps the weights as they are"
            )
        else:
            from_hf(
                args.load_dir,
                args.save_dir,
                tokenizer=args.tokenizer_model,
                text=args.text,
                overwrite=args.overwrite,
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    leave(main())
