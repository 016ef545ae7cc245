"""SmolTalk's kinds of rows, written by SmolLM2-135M-Instruct behind an OpenAI-compatible endpoint; `smol sft` reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from bench.common import say
from bench.curation.place import Place, rows_of, write_rows

ROWS = {"magpie": 8, "constraints": 16, "rewrite": 6, "summarize": 8}
_SHORT = {"max_tokens": 160}


def smoltalk(place: Place) -> dict[str, Any]:
    """The generated parts of smoltalk.yaml with a small model's numbers of rows; then SFT on them, once."""
    folder = place.folder / "chat"
    asked = {part: place.part(count, 2) for part, count in ROWS.items()}
    texts = [{"text": row["text"][:1200]} for row in rows_of(place.labels / "edu.jsonl")][
        : asked["summarize"]
    ]
    write_rows(folder / "texts.jsonl", texts)
    with _endpoint(place) as url:
        settings = {
            "name": "smoltalk", "output": str(folder / "out"), "test_share": 0.1,
            "models": {"smollm2": {"url": url, "model": "SmolLM2-135M-Instruct", "concurrency": 2, "timeout_seconds": 600}},
            "parts": [
                {"name": "magpie", "magpie": {"model": "smollm2", "rows": asked["magpie"], "turns": 2, "sampling": _SHORT}},
                {"name": "constraints", "constraints": {"model": "smollm2", "rows": asked["constraints"], "most": 1, "sampling": _SHORT}},
                {"name": "rewrite", "rewrite": {"model": "smollm2", "write": asked["rewrite"], "writing": _SHORT, "sampling": _SHORT}},
                {"name": "summarize", "summarize": {"model": "smollm2", "inputs": str(folder / "texts.jsonl"), "sampling": _SHORT}},
            ],
            "steps": ["exact", {"decontaminate": {"files": [str(place.inputs / "leaks.jsonl")], "fields": ["question"], "ngram": 10}}],
        }  # fmt: skip
        config = folder / "smoltalk.yaml"
        config.write_text(yaml.safe_dump(settings, sort_keys=False))
        say("smol chatdata: conversations by SmolLM2-135M-Instruct")
        _, seconds = place.smol("chatdata", config, "--overwrite")
    rows = list(rows_of(folder / "out" / "train.jsonl"))
    card = json.loads((folder / "out" / "card.json").read_text())
    say(f"smol sft on {len(rows)} rows")
    place.smol(
        "sft", place.smollm2, "epochs=1", "global_batch=8", "micro_batch=1", "seq_length=256", "packing=false",
        "--data", folder / "out" / "train.jsonl", "--output", folder / "sft", "--overwrite",
    )  # fmt: skip
    return {"asked": asked, "rows": len(rows), "seconds": seconds, "models": card.get("models")}


@contextmanager
def _endpoint(place: Place) -> Iterator[str]:
    """The one that was given, or a server on this machine in front of the model's folder."""
    if place.endpoint:
        yield place.endpoint
        return
    from megatron_smol.curate.endpoint import Request
    from megatron_smol.curate.local_model import LocalModel
    from tests.curate.language_server import Body, Reply, serving

    model = LocalModel(place.smollm2)

    def answer(path: str, body: Body) -> Reply:
        said = model(Request(path, {name: value for name, value in body.items() if name != "model"}))
        return Reply(said.text, finish_reason=said.finish_reason)

    with serving(answer) as server:
        yield server.url
