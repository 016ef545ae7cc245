"""`smol submit`, `status`, `simulate`: a long run on a Slurm cluster, before, during and on paper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_smol.commands.arguments import Overrides, RecipePath

if TYPE_CHECKING:
    from megatron_smol.slurm.status import Status

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def submit(
    recipe: RecipePath,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="Nodes that train.", min=1)] = 1,
    gpus_per_node: Annotated[
        int, typer.Option(help="GPUs, and ranks, of a node; 0: one CPU rank.", min=0)
    ] = 8,
    cpus_per_task: Annotated[int, typer.Option(help="Cores of a rank.", min=1)] = 12,
    time: Annotated[
        str, typer.Option(help="Limit of one leg; the job requeues itself before it.")
    ] = "24:00:00",
    partition: Annotated[str | None, typer.Option(help="Slurm's partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm's account.")] = None,
    spares: Annotated[
        int, typer.Option(help="More nodes that wait in the job to replace one that is lost or unfit.", min=0)
    ] = 0,
    save_lead: Annotated[
        int,
        typer.Option(
            help="Seconds before the limit at which all ranks save: a save's time and a minute.", min=30
        ),
    ] = 300,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the script, submit nothing, write nothing.")
    ] = False,
) -> None:
    """Give a recipe to Slurm: plans it first, writes RUN/slurm/job.sh, submits it, records job and code version.

    The job checks its nodes, trains, saves before its limit, requeues itself, and stops for good when restarts do not
    help. `smol status RUN` says how it is doing; `touch RUN/stop` saves and ends it.
    """
    from megatron_smol.recipe.load import load_recipe
    from megatron_smol.recipe.plan import make_plan, resolve_sizes
    from megatron_smol.slurm import submit as slurm

    loaded = load_recipe(recipe, overrides or [])
    make_plan(loaded, resolve_sizes(loaded)).require_no_errors()
    shape = slurm.Shape(nodes, gpus_per_node, cpus_per_task, time, partition, account, spares, save_lead)
    slurm.require_layout(loaded, shape)
    if dry_run:
        print(slurm.render(loaded, shape), end="")
        return
    job = slurm.submit(loaded, shape)
    print(f"job {job} was submitted; its log: {loaded.run_path}/slurm/{loaded.name}-{job}.log")
    print(f"smol status {loaded.run_path}")


def status(
    run: Annotated[Path, typer.Argument(help="A run folder, such as runs/demo.", metavar="RUN")],
    json: AsJson = False,
) -> None:
    """Where a run stands: state, stage, progress, speed, time left, last checkpoint, restarts, goodput, last incident.

    Works while it trains and on a log of millions of steps; reads files only, and asks Slurm for the job's state.
    """
    import sys
    from json import dumps

    from megatron_smol.slurm import status as slurm

    found = slurm.status(run)
    if json:
        sys.stdout.write(dumps(slurm.to_json(found), indent=1) + "\n")
    else:
        _print_status(found)


def _print_status(found: Status) -> None:
    from rich.console import Console
    from rich.table import Table

    from megatron_smol.recipe.units import format_tokens

    table = Table.grid(padding=(0, 2))
    state = found.state + (f", job {found.job}" if found.job else "")
    table.add_row(
        "state",
        f"[bold]{state}[/]" + (f", last step {_ago(found.last_step_age)}" if found.steps_done else ""),
    )
    steps = f"{found.steps_done:,} of {found.steps_total:,} steps, {found.progress:.1%}"
    table.add_row(
        "progress",
        f"{steps}; stage '{found.stage}' at step {found.step:,}, {format_tokens(found.tokens)} tokens",
    )
    if found.tokens_per_second:
        table.add_row("speed", f"{found.tokens_per_second:,.0f} tokens/s")
    if found.eta_seconds:
        table.add_row("left", f"{_span(found.eta_seconds)} of training at this speed")
    table.add_row(
        "checkpoint", f"{found.checkpoint}, {_ago(found.checkpoint_age)}" if found.checkpoint else "none yet"
    )
    table.add_row("restarts", str(found.restarts))
    if found.goodput is not None:
        table.add_row(
            "goodput", f"{found.goodput:.1%} = kept steps x mean step time / time since the first start"
        )
    skipped = format_tokens(found.skipped_tokens)
    kinds = f"{found.hangs} hangs, {found.lost_ranks} lost ranks"
    table.add_row("incidents", f"{found.incidents} ({kinds}), {skipped} tokens skipped")
    if found.stragglers:
        table.add_row("slow", ", ".join(found.stragglers))
    table.add_row("last incident", found.last_incident or "none")
    Console(highlight=False, soft_wrap=True).print(table)


def _ago(seconds: float | None) -> str:
    return "never" if seconds is None else f"{_span(seconds)} ago"


def _span(seconds: float) -> str:
    for limit, unit, size in (
        (120, "s", 1),
        (7200, "min", 60),
        (172800, "h", 3600),
        (float("inf"), "days", 86400),
    ):
        if seconds < limit:
            return f"{seconds / size:.{0 if size == 1 else 1}f} {unit}"
    raise AssertionError("the last limit is infinite")


def simulate(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="GPUs of the run.", min=1)] = 256,
    mtbf: Annotated[
        str, typer.Option(help="Mean time between interruptions of one GPU and its share of the rest.")
    ] = "50000h",
    save_seconds: Annotated[float | None, typer.Option(help="One checkpoint, measured.", min=0.001)] = None,
    load_seconds: Annotated[float | None, typer.Option(help="Loading one, measured.", min=0)] = None,
    start_seconds: Annotated[
        float, typer.Option(help="Detect, requeue, start, imports: until ranks can load.", min=0)
    ] = 300,
    measured: Annotated[
        Path | None,
        typer.Option(
            help="bench/results/checkpoint.json of this file system, for save and load: its rates a process, times tp x pp."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the drawn failures.")] = 0,
    json: AsJson = False,
) -> None:
    """How often to save on hardware that fails: goodput against the checkpoint interval, with the best one.

    By Young's and Daly's formulas and by drawing failures. Published rates: one interruption per 50,700 GPU-hours
    (Llama 3: 419 in 54 days on 16,384 GPUs), one per 8,100 (Meta's research clusters, 7.9 h at 1,024).
    """
    import sys
    from json import dumps

    from megatron_smol.errors import UserError
    from megatron_smol.recipe import estimate
    from megatron_smol.recipe.load import load_recipe
    from megatron_smol.recipe.plan import make_plan, resolve_sizes
    from megatron_smol.slurm import simulate as slurm

    loaded = load_recipe(recipe, overrides or [])
    plan = make_plan(loaded, resolve_sizes(loaded))
    size = estimate.disk(plan).bytes_each
    basis = "as given"
    if measured is not None:
        saved, read = slurm.measured_rates(measured)
        # One rank of each tensor- and pipeline-parallel position writes, for all its copies. On the way back all ranks read, and
        # share the file system's rate: taken to be no faster than that.
        writers = loaded.parallel.tp * loaded.parallel.pp
        save_seconds = size / (saved * writers) if save_seconds is None else save_seconds
        load_seconds = size / (read * writers) if load_seconds is None else load_seconds
        basis = f"a save over {writers} writing ranks, tp x pp: {size / 1e9:.1f} GB at the {saved / 1e6:,.0f} and {read / 1e6:,.0f} MB/s a process in {measured}"
    if save_seconds is None or load_seconds is None:
        raise UserError(
            f"a checkpoint of this recipe has {size / 1e9:.1f} GB; say how long one takes with --save-seconds and "
            "--load-seconds, or give --measured bench/results/checkpoint.json"
        )
    costs = slurm.Costs(slurm.hours(mtbf) * 3600 / gpus, save_seconds, load_seconds + start_seconds)
    rows, optimum = slurm.table(costs, seed)
    longest = max(plan.stages, key=lambda stage: stage.tokens)
    cost = estimate.compute(plan)
    step_seconds = longest.tokens_per_step / (cost.tokens_per_second_per_gpu * gpus)
    document = slurm.to_json(costs, gpus, rows, optimum) | {
        "step_seconds": step_seconds,
        "device": cost.device,
        "save_and_load": basis,
    }
    if json:
        sys.stdout.write(dumps(document, indent=1) + "\n")
    else:
        _print_simulation(document, loaded.save.every)


def _print_simulation(document: dict, every: int) -> None:  # type: ignore[type-arg]
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console, costs, step = (
        Console(highlight=False, soft_wrap=True),
        document["seconds"],
        document["step_seconds"],
    )
    console.print(
        f"{document['gpus']} GPUs: an interruption every [bold]{_span(costs['mtbf'])}[/], "
        f"{document['failures_per_30_days']:.1f} in 30 days; a save {costs['save']:.2f} s, back to training "
        f"{costs['back']:.0f} s ({document['save_and_load']})"
    )
    table = Table(
        "interval", "steps", "goodput", "drawn", "work lost a failure", box=SIMPLE_HEAD, show_edge=False
    )
    for row in document["rows"]:
        drawn = f"{row['simulated']:.3%} ± {row['standard_error']:.3%}"
        cells = (_span(row["interval"]), f"{row['interval'] / step:,.0f}", f"{row['expected']:.3%}", drawn)
        table.add_row(*cells, _span(row["lost_per_failure"]))
    console.print(table)
    best = document["best_interval_seconds"]
    for name, interval in best.items():
        goodput = document["goodput_at_best"][name]
        console.print(
            f"best interval, {name:<10} {_span(interval):>9} = {interval / step:6,.0f} steps, goodput {goodput:.3%}"
        )
    console.print(
        f"this recipe saves every {every:,} steps = {_span(every * step)}; a step is taken as {step:.3f} s "
        f"(the plan's speed, modelled for {document['device']})"
    )
