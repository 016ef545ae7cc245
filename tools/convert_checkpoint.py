#!/usr/bin/env python3
"""Checkpoints to Hugging Face folders and back, under Megatron's argument names.

A thin door to megatron_smol.checkpoint.convert; `smol convert` is the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_smol.errors import UserError, leave
from megatron_smol.prepare import prepare_libraries

EXAMPLES = """
examples:
  python tools/convert_checkpoint.py --to hf --load-dir runs/demo/checkpoints/decay-00000527 --save-dir out
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
    add("--load-dir", required=True, help="checkpoint folder; or Hugging Face folder, hub name or .gguf file")
    add("--save-dir", type=Path, required=True, help="folder to write")
    add("--tokenizer-model", help="hub name or folder with tokenizer.json (default: the model's own)")
    add("--target-params-dtype", choices=["fp32", "bf16"], help="with --to hf (default: as trained)")
    add("--max-shard-size", help="with --to hf: largest safetensors file (default: 50GB)")
    add(
        "--rotary-interleaved", action="store_true", help="the checkpoint's rotary rows are interleaved pairs"
    )
    add("--text", type=Path, help="text to compare on (default: a page that comes along)")
    add("--report", type=Path, help="JSON of what was compared; a .txt is written beside it")
    add("--overwrite", action="store_true", help="replace --save-dir if it holds a model")
    return top


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    prepare_libraries()
    from megatron_smol.checkpoint.convert import from_hf, to_hf

    common: dict[str, Any] = {
        "tokenizer": args.tokenizer_model,
        "rope_interleaved": args.rotary_interleaved,
        "text": args.text,
        "report": args.report,
        "overwrite": args.overwrite,
    }
    try:
        if args.to == "hf":
            size = {"max_shard_size": args.max_shard_size} if args.max_shard_size else {}
            to_hf(Path(args.load_dir), args.save_dir, dtype=args.target_params_dtype, **size, **common)
        elif args.target_params_dtype or args.max_shard_size:
            option = "--target-params-dtype" if args.target_params_dtype else "--max-shard-size"
            raise UserError(f"{option} goes with --to hf; an import keeps the weights as they are")
        else:
            from_hf(args.load_dir, args.save_dir, **common)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    leave(main())
