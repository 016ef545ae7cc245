"""`smol classifier`: train the quality classifier that the `score` step of a curation uses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_smol.errors import DataError, UserError


def classifier(
    labels: Annotated[Path, typer.Argument(help="JSON lines with the text and its score.", metavar="LABELS")],
    output: Annotated[Path, typer.Option(help="Folder of the classifier: `model:` of a `score` step.")],
    text_key: Annotated[str, typer.Option(help="Field of the text.")] = "text",
    score_key: Annotated[str, typer.Option(help="Field of the score.")] = "score",
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face encoder, frozen (FineWeb-Edu: Snowflake/snowflake-arctic-embed-m); default: hashed words."
        ),
    ] = None,
    kind: Annotated[
        Literal["scale", "binary"],
        typer.Option(
            help="scale: scores from 0 to 5, as FineWeb-Edu; binary: 1 for wanted documents and 0 for others, as DCLM."
        ),
    ] = "scale",
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Score from which a document is good, for the F1 of each cut; default 3, of binary 1."
        ),
    ] = None,
    pooling: Annotated[
        Literal["first", "mean"] | None,
        typer.Option(
            help="Which token of the encoder stands for a document; default: as the encoder's own files say, else its "
            "first, of a language model the mean."
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a document that the encoder sees.", min=8)] = 512,
    folds: Annotated[
        int,
        typer.Option(
            help="1: a tenth is held out. More: each document is judged once, by a fit on the other parts; for a narrow "
            "interval from few labels.",
            min=1,
        ),
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of what is held out.")] = 0,
) -> None:
    """Train a quality classifier on annotated documents and judge it on documents that it did not learn from.

    Prints macro-F1 with its 95 % interval beside what the length of a document alone would give, the confusion of
    scores, F1 and share kept at each threshold, and how many documents a second it scores.

    \b
      smol annotate docs.jsonl --output labels.jsonl --scale edu --endpoint http://localhost:8000/v1 --model NAME
      smol classifier labels.jsonl --output models/edu --encoder Snowflake/snowflake-arctic-embed-m
      smol classifier pairs.jsonl --output models/dclm --kind binary
    """
    from megatron_smol.curate.classifier import Settings, train
    from megatron_smol.curate.head import MOST
    from megatron_smol.data.files import require_folder

    require_folder(output)
    texts, scores = _labelled(labels, text_key, score_key)
    settings = Settings(encoder=encoder, kind=kind, pooling=pooling, length=length)
    cut = threshold if threshold is not None else min(3, MOST[kind])
    try:
        made = train(texts, scores, settings, cut, seed, folds)
    except DataError as error:
        raise DataError(f"{labels}: {error}") from None
    made.save(output)
    report = made.report
    low, high = report["macro_f1_95"]
    print(f"{report['documents']:,} documents learned, {report['held_out']:,} held out" + _folds(folds))
    print(
        f"macro-F1 {report['macro_f1']:.3f} (95 %: {low:.3f} to {high:.3f}); by length alone {report['macro_f1_by_length_alone']:.3f}"
    )
    low, high = report["macro_f1_above_length_95"]
    print(f"above length by {low:.3f} to {high:.3f}: {'more' if low > 0 else 'NOT clearly more'} than length")
    print("rows: score given, columns: score found")
    for given, row in enumerate(report["confusion"]):
        print(f"  {given}: " + " ".join(f"{count:6,}" for count in row))
    digits = 1 if kind == "scale" else 4
    for at in report["thresholds"]:
        print(f"  keep >= {at['threshold']:.{digits}f}: F1 {at['f1']:.3f}, {at['kept']:.1%} kept")
    print(f"scores {report['documents_per_second']:,.0f} documents/s")
    print(output)


def _folds(folds: int) -> str:
    return f", each once, in {folds} parts" if folds > 1 else ""


def _labelled(path: Path, text_key: str, score_key: str) -> tuple[list[str], list[float]]:
    from megatron_smol.data.corpus import opened

    texts, scores = [], []
    if not path.is_file():
        raise UserError(f"no labels at {path}: JSON lines with `{text_key}` and `{score_key}`")
    with opened(path) as stream:
        for number, line in enumerate(stream, 1):
            if line.isspace():
                continue
            try:
                text, score = _label(line, text_key, score_key)
            except ValueError as error:
                raise DataError(f"{path} line {number}: {error}") from None
            texts.append(text)
            scores.append(score)
    return texts, scores


def _label(line: bytes, text_key: str, score_key: str) -> tuple[str, float]:
    """Raises ValueError with the reason."""
    from megatron_smol.data.records import parse

    record = parse(line)
    if not isinstance(record, dict):
        raise ValueError(f"expected one JSON object a line, found a {type(record).__name__}")
    for key in (text_key, score_key):
        if key not in record:
            raise ValueError(f"no key '{key}'; found: {', '.join(list(record)[:12]) or 'none'}")
    text, score = record[text_key], record[score_key]
    if not isinstance(text, str):
        raise ValueError(f"key '{text_key}' holds a {type(text).__name__}; expected text")
    try:
        number = float(score)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"key '{score_key}' holds {score!r}; expected a number")
    return text, number
