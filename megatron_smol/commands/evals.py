"""`smol eval`: what a model knows, before and after every stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megatron_smol.errors import UserError

if TYPE_CHECKING:
    from megatron_smol.evals.suites import Suite


def eval(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A checkpoint, a run folder (its newest one), a Hugging Face folder, or a hub name.",
            metavar="MODEL",
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="smollm2-base, smollm2-instruct or early-signal; --list shows what they ask."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks instead of a suite, such as arc_easy,piqa: lm-eval's, ours, YAML files."),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Read all data here, not from the hub: DIR/TASK/SPLIT.jsonl, or downloaded hub data sets."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The first N questions of each task only.", min=1)] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Where rows go; default: evals.jsonl in the run folder, or beside the model."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Evaluate also what has a result.")] = False,
    stages: Annotated[
        bool,
        typer.Option(
            "--stages",
            help="MODEL is a run folder: evaluate the end of every stage that has no result yet, and RUN/sft, RUN/dpo.",
        ),
    ] = False,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            help="Compare two results: evals files, run folders, or models evaluated before.", metavar="A B"
        ),
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="Only list: the suites, or with --stages the checkpoints.")
    ] = False,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Apply the chat template; default: as the suite says."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Longest prompt in tokens; default: the suite's, else the model's context.", min=1),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="Precision of the model; auto: as it was saved."),
    ] = "auto",
    batch_size: Annotated[
        int | None, typer.Option(help="Prompts at a time; default 8 on a CPU, 32 on a GPU.", min=1)
    ] = None,
) -> None:
    """Evaluate a model with lm-eval, or compare two: [bold]smol eval runs/demo --suite smollm2-base[/].

    Results are kept in evals.jsonl with the tokens the model was trained on, every answer beside it; what has a
    result is not asked again, and a killed evaluation goes on with the next task. After every stage:
    smol eval RUN --stages --suite early-signal, or examples/eval.sh as one Slurm job a checkpoint.
    """
    from megatron_smol.evals.evaluate import be_offline, print_suites, require_lm_eval
    from megatron_smol.evals.target import find_target, stage_ends

    if compare:
        return _compare(*compare, output)
    if list_ and not stages:
        return print_suites()
    if model is None:
        raise UserError("name a MODEL to evaluate, or use --compare A B, or --list for the suites")
    if list_:
        for target in stage_ends(model):
            typer.echo(target.name)
        return None
    asked = _suite(suite, tasks, limit)
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir} is no folder; it holds TASK/SPLIT.jsonl for each task")
    targets = stage_ends(model) if stages else [find_target(model)]
    if data_dir is not None:  # the model is a folder by now
        be_offline()
    require_lm_eval()
    from megatron_smol.evals.evaluate import evaluate as run
    from megatron_smol.evals.harness import Settings

    chat = asked.chat_template if chat is None else chat
    settings = Settings(chat, max_length or asked.max_length, dtype, batch_size)
    run(targets, asked, settings, data_dir, output, again)
    return None


def _suite(suite: str | None, tasks: str | None, limit: int | None) -> Suite:
    from megatron_smol.evals.suites import listed_tasks, named_suite, suite_names

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if bool(suite) == bool(names):
        raise UserError(f"say what to ask: either --suite ({', '.join(suite_names())}) or --tasks a,b")
    return named_suite(suite, limit) if suite else listed_tasks(names, limit)


def _compare(a: str, b: str, output: Path | None) -> None:
    from megatron_smol.evals.compare import compare, open_side, print_comparison

    sides = open_side(a, output), open_side(b, output)
    print_comparison(*sides, compare(*sides))
