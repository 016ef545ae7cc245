"""What must fit together in a recipe beyond single fields: names, divisibility, the tree of stages.

Called by `schema` when all fields are right. Each check raises ValueError with one sentence that names the
field, what was found, and what is allowed; `load` puts the file in front. What depends on token arithmetic is
checked in `plan`.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import TYPE_CHECKING

from megatron_smol.errors import nearest

if TYPE_CHECKING:
    from megatron_smol.recipe.schema import Model, Recipe


def check_recipe(recipe: Recipe) -> None:
    """Raise ValueError for the first thing that does not fit."""
    for problem in problems(recipe):
        raise ValueError(problem)


def problems(recipe: Recipe) -> Iterator[str]:
    """Every misfit, one sentence each."""
    yield from _model(recipe.model)
    yield from _layout(recipe)
    yield from _stage_tree(recipe)
    yield from _mixtures(recipe)
    yield from _lengths_and_batches(recipe)
    yield from _precisions(recipe)


def divisors(number: int) -> list[int]:
    """All whole numbers that divide `number`, in order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def window_pieces(cp: int, tp: int) -> int:
    """How many equal parts a window is cut into: 2 * cp chunks, each over tp ranks. tp 1: no sequence parallelism."""
    return (2 * cp if cp > 1 else 1) * tp


def _model(model: Model) -> Iterator[str]:
    if model.hidden_size % model.heads:
        yield (
            f"model.hidden_size is {model.hidden_size}, which is not divisible by model.heads ({model.heads})"
        )
    elif model.head_dim % 2:
        yield f"model.hidden_size / model.heads is {model.head_dim}; rotary positions need an even head width"
    if model.heads % model.kv_heads:
        allowed = _listed(divisors(model.heads))
        yield (
            f"model.kv_heads is {model.kv_heads}, which does not divide model.heads ({model.heads}); "
            f"allowed: {allowed}"
        )


def _layout(recipe: Recipe) -> Iterator[str]:
    model, parallel = recipe.model, recipe.parallel
    tp_allowed = divisors(gcd(model.heads, model.kv_heads, model.ffn_size, model.vocab_size))
    for name in ("heads", "kv_heads", "ffn_size", "vocab_size"):
        if getattr(model, name) % parallel.tp:
            yield (
                f"parallel.tp is {parallel.tp}, which does not divide model.{name} "
                f"({getattr(model, name)}); tp allowed for this model: {_listed(tp_allowed)}"
            )
            break
    if model.layers % (parallel.pp * parallel.vpp):
        allowed = divisors(model.layers // parallel.pp) if model.layers % parallel.pp == 0 else []
        if not allowed or parallel.vpp == 1:
            yield (
                f"parallel.pp is {parallel.pp}, which does not divide model.layers ({model.layers}); pp allowed "
                f"for this model: {_listed(divisors(model.layers))}"
            )
        else:
            yield (
                f"parallel.vpp is {parallel.vpp}, which does not divide the {model.layers // parallel.pp} layers of "
                f"a pipeline rank; vpp allowed: {_listed(allowed)}"
            )
    if parallel.vpp > 1 and parallel.pp == 1:
        yield f"parallel.vpp is {parallel.vpp}, but parallel.pp is 1; set pp above 1 or vpp to 1"
    if parallel.sequence_parallel and parallel.tp == 1:
        yield (
            "parallel.sequence_parallel is true, but parallel.tp is 1; set tp above 1 or sequence_parallel "
            "to false"
        )
    if parallel.gpus is not None and parallel.gpus % parallel.model_ranks:
        yield (
            f"parallel.gpus is {parallel.gpus}, which is not divisible by tp * pp * cp ({parallel.model_ranks})"
        )


def _stage_tree(recipe: Recipe) -> Iterator[str]:
    names: list[str] = []
    for index, stage in enumerate(recipe.stages):
        where = f"stages.{stage.name}"
        if stage.name in names:
            yield (
                f"stages[{index}].name is '{stage.name}', and so is an earlier stage's; give each stage a "
                "name of its own"
            )
        if (stage.until is None) == (stage.tokens is None):
            found = "neither 'until' nor 'tokens'" if stage.until is None else "both 'until' and 'tokens'"
            yield f"{where} has {found}; give one: 'until' is where it ends, 'tokens' is how long it is"
        if stage.from_ is not None and stage.from_.stage not in names:
            later = stage.from_.stage in [other.name for other in recipe.stages]
            why = "which does not come before it" if later else "which does not exist"
            hint = nearest(stage.from_.stage, names) if names else "the first stage cannot have 'from'"
            yield f"{where}.from.stage is '{stage.from_.stage}', {why}; {hint}"
        names.append(stage.name)


def _mixtures(recipe: Recipe) -> Iterator[str]:
    for stage in recipe.stages:
        for source in stage.mixture:
            if source not in recipe.sources:
                hint = nearest(source, recipe.sources)
                yield f"stages.{stage.name}.mixture names '{source}', which is not under 'sources'; {hint}"


def _lengths_and_batches(recipe: Recipe) -> Iterator[str]:
    page_length, parallel = recipe.page_length, recipe.parallel
    for stage in recipe.stages:
        settings = recipe.training_of(stage)
        where = {
            name: f"stages.{stage.name}.{name}" if getattr(stage, name) is not None else f"training.{name}"
            for name in ("seq_length", "global_batch", "micro_batch")
        }
        if page_length % settings.seq_length:
            what = (
                "data.page_length"
                if recipe.data.page_length
                else "the largest seq_length, the unit of shuffling"
            )
            below = max(n for n in range(1, settings.seq_length + 1) if page_length % n == 0)
            yield (
                f"{where['seq_length']} is {settings.seq_length}, which does not divide {what} "
                f"({page_length}); nearest allowed below: {below}"
            )
        pieces = window_pieces(parallel.cp, parallel.tp if parallel.sequence_parallel else 1)
        if settings.seq_length % pieces:
            why = "2 * cp" if parallel.cp > 1 else ""
            why += (" * " if why else "") + "tp" if parallel.sequence_parallel else ""
            yield (
                f"{where['seq_length']} is {settings.seq_length}, not divisible by {why} ({pieces}) as "
                f"{'context' if parallel.cp > 1 else 'sequence'} parallelism needs"
            )
        ranks = 1 if parallel.gpus is None else parallel.gpus // parallel.model_ranks
        if settings.global_batch % (settings.micro_batch * max(ranks, 1)):
            by = f"{where['micro_batch']} ({settings.micro_batch})"
            if settings.global_batch % settings.micro_batch == 0:
                by += f" times the {ranks} data-parallel ranks of parallel.gpus"
            yield f"{where['global_batch']} is {settings.global_batch}, which is not divisible by {by}"


def _precisions(recipe: Recipe) -> Iterator[str]:
    """FP8's own conditions, by stage: shapes, spared layers, weights in FP8."""
    for stage in recipe.stages:
        settings = recipe.training_of(stage)
        name = settings.precision
        if "fp8" not in name:
            continue
        where = f"stages.{stage.name}" if stage.precision else "training"
        first, last = recipe.fp8.bf16_layers(name)
        if name.endswith("delayed") and first + last:
            yield (
                f"fp8.bf16_first and bf16_last are {first} and {last}, but {where}.precision is {name}, whose scaling "
                "history megatron-core keeps for all layers together; set both to 0, or use tensorwise or blockwise"
            )
        if first + last >= recipe.model.layers:
            yield (
                f"fp8.bf16_first and bf16_last spare {first + last} of {recipe.model.layers} layers, so {where}.precision "
                f"{name} would be bf16; spare fewer, or set bf16"
            )
        if recipe.fp8.gather_parameters and not name.startswith(("fp8-tensorwise", "fp8-delayed")):
            yield (
                f"fp8.gather_parameters is true, but {where}.precision is {name}; it works with fp8-tensorwise and "
                "fp8-delayed: set it to false"
            )
        if name == "emulated-fp8-delayed" and recipe.parallel.recompute == "full":
            yield (
                f"{where}.precision is {name}, and parallel.recompute is full, which would compute with another scaling "
                "history the second time; set recompute to none or selective"
            )
        if name.startswith("fp8"):
            yield from _fp8_shapes(recipe, where, name, settings.micro_batch * settings.seq_length)


def _fp8_shapes(recipe: Recipe, where: str, precision: str, tokens: int) -> Iterator[str]:
    """FP8 products want multiples of 16, blocks of 128 in all dimensions."""
    model, parallel = recipe.model, recipe.parallel
    multiple = 128 if precision.endswith("blockwise") else 16
    kv = model.kv_heads * model.head_dim
    per_rank = {
        "model.hidden_size": model.hidden_size,
        "model.hidden_size / tp": model.hidden_size / parallel.tp,
        "queries, keys and values / tp": (model.hidden_size + 2 * kv) / parallel.tp,
        "model.ffn_size / tp": model.ffn_size / parallel.tp,
        "micro_batch * seq_length / cp": tokens / parallel.cp,
    }
    for what, size in per_rank.items():
        if size % multiple:
            yield (
                f"{where}.precision is {precision}, whose products need multiples of {multiple}, but {what} is {size:g}; "
                "change the shape, or use bf16"
            )
            return


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
