"""Near duplicates: our `minhash` step against datatrove's four MinHash stages, on the same documents, one core.

Real text of the tokenization bench, as prose as it comes (docstrings and READMEs), with planted copies: some exact,
some with one word in 200 changed. Both use the same n-grams, bands and rows, and both count what stays. Documents are
in memory on both sides; the peer's stages write their signatures to files, as they must, and so do ours.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
from datatrove.data import Document
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from loguru import logger

from bench import mixed_text
from bench.common import Outcome, Seconds, run, say, take_turns, timed
from megatron_smol.curate.duplicates import DropGrouped, Group, WriteKeys
from megatron_smol.curate.kept import FewDropped

SHAPES = {"14 bands of 8 (FineWeb)": (14, 8), "1 band of 10 (FineMath)": (1, 10)}
NGRAM, MEGABYTES, COPIES, TURNS = 5, 4, 200, 3


def measure() -> Outcome:
    logger.disable("datatrove")
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        texts, planted = _texts(folder / "text")
        size = sum(len(text.encode()) for text in texts) / 1e6
        turns, kept = {}, {}
        for name, (bands, rows) in SHAPES.items():
            say(f"{name}: {len(texts):,} documents, {size:.1f} MB")
            found: dict[str, set[str]] = {}
            turns[name] = take_turns(
                lambda: _timed("ours", lambda: _ours(texts, folder / "ours", bands, rows), found),  # noqa: B023
                lambda: _timed("peer", lambda: _peer(texts, folder / "peer", bands, rows), found),  # noqa: B023
                TURNS,
                "cpu",
            )
            kept[name] = found
    headline, *others = SHAPES
    ours, peer = turns[headline].rates(size)
    return Outcome(
        ratio=turns[headline].ratio,
        ratio_of=f"MB/s of one core, signatures to survivors, {headline}",
        peer_is="datatrove's MinHash stages",
        ours=f"{ours.median:.1f} MB/s",
        peer=f"{peer.median:.2f} MB/s",
        details={name: turn.to_json() for name, turn in turns.items()},
        settings={
            "ngram": NGRAM,
            "megabytes": round(size, 1),
            "documents": len(texts),
            "planted": len(planted),
        },
        notes=[
            *(f"{name}: ratio {turns[name].ratio.median:.1f}" for name in others),
            *(_agreement(name, kept[name], len(texts), planted) for name in SHAPES),
            "the peer finds words with spaCy, ours are runs of letters: that is most of the peer's time, and why survivors can differ",
        ],
    )


def _timed(who: str, work: Callable[[], set[str]], found: dict[str, set[str]]) -> Seconds:
    return timed(lambda: found.__setitem__(who, work()))


def _agreement(name: str, kept: dict[str, set[str]], documents: int, planted: set[str]) -> str:
    ours, peer = kept["ours"], kept["peer"]
    return (
        f"{name}: ours drops {documents - len(ours):,}, the peer {documents - len(peer):,}, both alike but for {len(ours ^ peer):,}; "
        f"of {len(planted):,} planted copies ours drops {len(planted - ours):,}, the peer {len(planted - peer):,}"
    )


def _texts(folder: Path) -> tuple[list[str], set[str]]:
    """Documents, and the numbers (as ids) of the planted copies at their end."""
    made = mixed_text.make(folder)
    chance, texts = random.Random(0), []
    for file in made.files:
        if file.stem in ("docstrings", "readmes"):
            size = 0
            for line in file.read_bytes().splitlines():
                text = orjson.loads(line)["text"]
                size += len(text)
                if size > MEGABYTES * 1e6:
                    break
                texts.append(text)
    originals = len(texts)
    for number in chance.sample(range(originals), COPIES):
        words = texts[number].split(" ")
        if number % 2:
            for place in range(0, len(words), 200):
                words[place] = "changed"
        texts.append(" ".join(words))
    return texts, {str(number) for number in range(originals, len(texts))}


def _documents(texts: list[str]) -> list[Document]:
    return [Document(text=text, id=str(number)) for number, text in enumerate(texts)]


def _ours(texts: list[str], folder: Path, bands: int, rows: int) -> set[str]:
    shutil.rmtree(folder, ignore_errors=True)
    documents = _documents(texts)
    for _ in WriteKeys(folder / "keys", NGRAM, bands, rows, 0).run(iter(documents)):
        pass
    _drain(Group(folder / "keys", folder / "drop", 1).run(None))
    kept = DropGrouped(folder / "drop", "near", FewDropped(folder / "few")).run(iter(documents))
    return {str(document.id) for document in kept}


def _peer(texts: list[str], folder: Path, bands: int, rows: int) -> set[str]:
    shutil.rmtree(folder, ignore_errors=True)
    documents = _documents(texts)
    config = MinhashConfig(n_grams=NGRAM, num_buckets=bands, hashes_per_bucket=rows)
    names = {name: str(folder / name) for name in ("signatures", "buckets", "remove")}
    _drain(MinhashDedupSignature(names["signatures"], config).run(iter(documents)))
    for bucket in range(bands):
        _drain(
            MinhashDedupBuckets(names["signatures"], names["buckets"], config=config).run(None, bucket, bands)
        )
    _drain(MinhashDedupCluster(names["buckets"], names["remove"], config).run(None))
    return {str(document.id) for document in MinhashDedupFilter(names["remove"]).run(iter(documents))}


def _drain(steps: Any) -> None:
    for _ in steps or ():
        pass


if __name__ == "__main__":
    run("duplicates", measure)
