"""`smol chatdata`: conversations and preferences for SFT and DPO."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_smol.errors import UserError

_HELP = """Make chat data: let models write conversations or preferences, filter them, mix them with rows that are there.

Models are OpenAI-compatible endpoints (a vLLM or SGLang server, a paid API) or Hugging Face folders that run here. Writes
OUTPUT/train.jsonl (and test.jsonl), which `smol sft` reads, or `smol dpo` when the parts are preferences, and
OUTPUT/card.html: what each step kept and dropped, why, with examples, and what it cost. Every answer is on the disk before
it is used: given again after a kill, the same command pays again only for the requests that were in flight.

\b
  smol chatdata examples/curate/smoltalk.yaml
  smol chatdata my.yaml --url http://localhost:8000/v1 --output data/my-chat
  smol sft HF_DIR --data data/my-chat/train.jsonl --output runs/sft
"""


def chatdata(
    config: Annotated[
        Path,
        typer.Argument(
            help="Chat data file; examples/curate/ holds smoltalk, smol-smoltalk, ultrafeedback.",
            metavar="CONFIG",
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="Folder in place of the file's own.")] = None,
    url: Annotated[
        str | None, typer.Option(help="Address of all models that have one, in place of the file's own.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace rows of another configuration; answers of models are kept.")
    ] = False,
) -> None:
    try:
        from megatron_smol.curate.chat.config import load_chat_data
        from megatron_smol.curate.chat.pipeline import chat_data
    except ImportError as error:
        raise UserError(
            f"smol chatdata needs the extra `curate` ({error}): pip install 'megatron-smol[curate]'"
        ) from None
    loaded = load_chat_data(config, {"output": str(output)} if output else None)
    if url is not None:
        models = {
            name: settings.model_copy(update={"url": url}) if settings.url else settings
            for name, settings in loaded.models.items()
        }
        loaded = loaded.model_copy(update={"models": models})
    print(chat_data(loaded, overwrite=overwrite))


chatdata.__doc__ = _HELP
