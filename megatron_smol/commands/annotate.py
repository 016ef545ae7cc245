"""`smol annotate`: a language model's scores for a sample of documents, for `smol classifier`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_smol.errors import UserError


def annotate(
    inputs: Annotated[
        list[str],
        typer.Argument(help="JSON lines, parquet, WARC: files, folders or globs.", metavar="INPUT..."),
    ],
    output: Annotated[
        Path, typer.Option(help="JSON lines with text, score and reasons: LABELS of `smol classifier`.")
    ],
    model: Annotated[str, typer.Option(help="Name of the model at the endpoint.")],
    scale: Annotated[
        str, typer.Option(help="What is judged: edu, maths-page (0 to 3), maths, code.")
    ] = "edu",
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="OpenAI-compatible address, as http://localhost:8000/v1; without it MODEL is a folder and runs here."
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="Documents, drawn evenly from the input.", min=1)] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    characters: Annotated[int, typer.Option(help="Of a document that the model is shown.", min=100)] = 4000,
    reasons: Annotated[
        bool,
        typer.Option(
            help="Have it reason before it scores, as FineWeb-Edu did; --no-reasons: the score alone, for a tenth of the "
            "tokens."
        ),
    ] = True,
    begin: Annotated[
        str,
        typer.Option(
            help="Words that the answer is made to begin with, for models too small to keep to a form: 'Score:' (vLLM, SGLang "
            "and models of this machine)."
        ),
    ] = "",
    text_key: Annotated[str, typer.Option(help="Field of the text.")] = "text",
    code: Annotated[bool, typer.Option(help="Of folders, source files in place of JSON lines.")] = False,
    concurrency: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 120.0,
    retries: Annotated[int, typer.Option(help="After time-outs, 429 and 5xx; pauses double.", min=0)] = 5,
    retry_pause: Annotated[float, typer.Option(help="Seconds of the first pause.", min=0)] = 1.0,
    price_in: Annotated[float, typer.Option(help="Dollars for a million prompt tokens.", min=0)] = 0.0,
    price_out: Annotated[float, typer.Option(help="Dollars for a million tokens of answers.", min=0)] = 0.0,
) -> None:
    """Have a language model score documents on an additive scale, for a classifier to learn from.

    The key is taken from OPENAI_API_KEY. Every answer is kept in OUTPUT.answers before it is used: given again after a
    kill, the same command pays only for what had no answer. Time-outs, other failures and answers without a score are
    counted and left out.

    \b
      smol annotate 'data/web/documents' --output labels.jsonl --scale edu --count 50000 \\
        --endpoint http://localhost:8000/v1 --model meta-llama/Llama-3.1-70B-Instruct
      smol classifier labels.jsonl --output models/edu --encoder Snowflake/snowflake-arctic-embed-m
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from megatron_smol.curate import annotate as work
    from megatron_smol.curate.config import Inputs
    from megatron_smol.curate.endpoint import Endpoint, EndpointSettings
    from megatron_smol.curate.pipeline import input_files
    from megatron_smol.curate.reading import ReadInputs

    if scale not in work.SCALES:
        raise UserError(f"--scale is '{scale}'; allowed: {', '.join(work.SCALES)}")
    settings = EndpointSettings.model_validate(
        {
            "model": model, "url": endpoint, "concurrency": concurrency, "timeout_seconds": timeout, "retries": retries,
            "retry_seconds": retry_pause, "dollars_per_million_prompt_tokens": price_in,
            "dollars_per_million_completion_tokens": price_out,
        }
    )  # fmt: skip
    given = Inputs.model_validate({"paths": inputs, "text_key": text_key, "code": code})
    reader = ReadInputs(input_files(given), text_key, given.extract)
    documents = work.sampled(iter(reader.run(None)), count, seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Endpoint(settings, output.with_name(output.name + ".answers")) as asked,
        Progress(*columns, console=(console := Console(stderr=True)), disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("documents", total=len(documents))
        outcome = work.annotate(
            documents,
            asked,
            work.SCALES[scale],
            output,
            characters,
            lambda: bar.advance(task),
            reasons,
            begin,
        )
        _tell(outcome, asked.usage())
    print(output)


def _tell(outcome: object, usage: dict[str, object]) -> None:
    from megatron_smol.curate.annotate import Outcome

    assert isinstance(outcome, Outcome)
    print(
        f"{outcome.scores.total():,} documents scored: "
        + ", ".join(f"{s}: {n:,}" for s, n in sorted(outcome.scores.items()))
    )
    for what, counts in (("without a score", outcome.failed), ("tried again", usage["retried"])):
        if counts:
            print(f"{what}: " + ", ".join(f"{why} {n:,}" for why, n in dict(counts).items()))  # type: ignore[call-overload]
    print(
        f"{usage['prompt_tokens']:,} tokens in, {usage['completion_tokens']:,} out, {usage['dollars']} dollars in all runs; "
        f"{usage['from_disk']:,} answers were on the disk"
    )
