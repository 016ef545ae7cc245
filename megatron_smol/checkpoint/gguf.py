"""A GGUF file as a Hugging Face folder: weights by transformers, tokenizer by data/gguf_tokenizer.py.

transformers dequantises the weights to fp32 but refuses to save a model that it loaded so, and rebuilds a
tokenizer that gives other ids; here both are put right once, and the rest of the package sees a usual folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from megatron_smol.data.gguf_tokenizer import tokenizer_from_gguf
from megatron_smol.data.tokenizer import TOKENIZER_FILES
from megatron_smol.errors import DataError, UserError

TOKENIZER = "tokenizer"  # folder inside an imported checkpoint


@contextmanager
def as_folder(source: str, checkpoint: Path, say: Callable[[str], None]) -> Iterator[Path | None]:
    """For a GGUF file, a temporary Hugging Face folder, its tokenizer kept in `checkpoint`; None for anything else."""
    path = Path(source).expanduser()
    if path.suffix != ".gguf":
        yield None
        return
    with TemporaryDirectory(dir=checkpoint.parent, prefix=".gguf-") as folder:
        say(f"reading {path} through transformers; its weights come out in fp32")
        write_hf_folder(path, Path(folder))
        kept = checkpoint / TOKENIZER
        kept.mkdir()
        for file in TOKENIZER_FILES:
            if (Path(folder) / file).is_file():
                shutil.copy(Path(folder) / file, kept / file)
        yield Path(folder)


def write_hf_folder(gguf_path: Path, folder: Path) -> None:
    """Write `gguf_path` (SmolLM2's tokenizer only) as a Hugging Face folder with fp32 weights.

    The whole model is in memory, about 9 bytes a parameter at the peak. UserError or DataError when it cannot be.
    """
    if not gguf_path.is_file():
        raise UserError(f"no file {gguf_path}: give a GGUF file, a Hugging Face model folder, or a hub name")
    tokenizer_from_gguf(gguf_path, folder, roles="stored")
    import transformers

    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32
        )
    except Exception as error:  # transformers and gguf raise a dozen kinds
        text = str(error).strip().splitlines()
        raise DataError(
            f"{gguf_path}: transformers cannot read this GGUF file: {text[0] if text else type(error).__name__}"
        ) from error
    config: Any = loaded.config
    if config.model_type != "llama":
        raise DataError(f"{gguf_path} holds a model of type {config.model_type}; this trainer has llama only")
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # stored as a 32-bit float: 9.99999974e-06
    del config.quantization_config
    fresh = transformers.LlamaForCausalLM(config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(folder)
