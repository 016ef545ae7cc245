"""Chat rows with a rule that a tiny model can learn, and the commands on them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_smol.post.dpo import dpo
from megatron_smol.post.sft import sft
from megatron_smol.post.tail import Request

COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black"}
QUICK = ("lr=1e-2", "global_batch=8", "micro_batch=4", "seq_length=64", "save_every=2 steps")
# Until it answers rightly: more passes, and loss on the answers alone.
TUNING = ("lr=5e-3", "epochs=6", "loss_on=assistant", "packing=false", "seq_length=96", "save_every=50 steps")


def conversations(count: int) -> list[dict[str, Any]]:
    """ "The colour of 17 sky?" -> "blue": the number is noise."""
    things = list(COLOURS)
    return [
        {
            "messages": [
                {"role": "user", "content": f"Colour of {number} {things[number % 4]}?"},
                {"role": "assistant", "content": COLOURS[things[number % 4]]},
            ]
        }
        for number in range(count)
    ]


def pairs(count: int) -> list[dict[str, str]]:
    """The right colour against the next one's."""
    things = list(COLOURS)
    return [
        {
            "prompt": f"Colour of {number} {things[number % 4]}?",
            "chosen": COLOURS[things[number % 4]],
            "rejected": COLOURS[things[(number + 1) % 4]],
        }
        for number in range(count)
    ]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_sft(model: Path, data: Path, output: Path, *settings: str, **options: Any) -> int:
    return _run(sft, Request("sft", model, output, str(data), overrides=(*QUICK, *settings), **options))


def run_dpo(model: Path, data: Path, output: Path, *settings: str, **options: Any) -> int:
    return _run(dpo, Request("dpo", model, output, str(data), overrides=(*QUICK, *settings), **options))


def _run(command: Callable[[Request], int], request: Request) -> int:
    """The command in this process, whose signal handlers it changes."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        return command(request)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
