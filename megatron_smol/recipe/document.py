"""A plan as a stable JSON document: what `smol plan --json` prints and a run keeps as plan.json.

Keys only get added; a change of meaning raises PLAN_VERSION. JSON_FIELDS documents them and is printed in
docs/recipe.md.
"""

from __future__ import annotations

from typing import Any

from megatron_smol.recipe import estimate
from megatron_smol.recipe.plan import ROUNDING_RULE, Plan, StagePlan
from megatron_smol.train.schedule import WarmupStableDecay

PLAN_VERSION = 1
JSON_FIELDS = {
    "plan_version": "version of this document; keys may be added within a version",
    "name": "name of the recipe",
    "rounding_rule": "how boundaries in tokens become steps",
    "model": "parameters, embedding_parameters, layers, hidden_size, heads, kv_heads, ffn_size, vocab_size",
    "parallel": "tp, pp, dp, gpus (null where the recipe does not say)",
    "trunk": "steps and tokens at the end of the last stage that is not a branch",
    "run": "steps and tokens of all stages, branches included",
    "stages": (
        "list in the order they run: name, parent, is_branch, start_step, end_step, steps, start_tokens, "
        "end_tokens, tokens (all along the lineage), seq_length, global_batch, micro_batch, "
        "tokens_per_step, rope_base, precision, document_mask, megatron_order (null: our own), lr_start (of the first step), lr_end (of a "
        "step that would follow the last), checkpoints (written), memory_per_gpu (peak bytes of the fullest rank: weights, "
        "gradients, optimizer, activations, logits, workspace, total), sent_per_step (bytes that a rank sends: tensor, "
        "pipeline, context, gradients, parameters, total), sources"
    ),
    "stages[].sources": (
        "by name, for sources of the mixture: weight, weight_exact (fraction as text), windows, tokens, "
        "epochs (in this stage), skipped_tokens (left unread at the stage's start), lineage_tokens and "
        "lineage_epochs (at its end)"
    ),
    "lr_boundaries": "list: what, tokens, step (along the trunk, null beyond it), lr, stage",
    "sources": (
        "by name: path, tokens, tokens_per_epoch (without held-out tokens and the remainder of a page), "
        "tokens_read (all stages), epochs (the most of any lineage), max_epochs (null: no cap)"
    ),
    "checkpoints": "written, kept (stage ends and branch points), bytes_each, bytes_at_once, save_points",
    "compute": (
        "flops (causal attention counted half), flops_full (all of it), flops_per_gpu (of `flops`; null without gpus), "
        "gpu_hours, days (null without gpus), tokens_per_second_per_gpu, assumed (true: no speed was given, it is modelled "
        "for `device`), device"
    ),
    "problems": "list: level (warning or error), message",
}


def to_json(plan: Plan, tokens_per_second_per_gpu: float | None = None) -> dict[str, Any]:
    """The plan as the document that JSON_FIELDS describes."""
    recipe, model, parallel = plan.recipe, plan.recipe.model, plan.recipe.parallel
    cost, disk = estimate.compute(plan, tokens_per_second_per_gpu), estimate.disk(plan)
    end, epochs = plan.trunk[-1], plan.epochs()
    shape = ("layers", "hidden_size", "heads", "kv_heads", "ffn_size", "vocab_size")
    return {
        "plan_version": PLAN_VERSION,
        "name": recipe.name,
        "rounding_rule": ROUNDING_RULE,
        "model": {
            "parameters": model.parameters(),
            "embedding_parameters": estimate.embedding_parameters(model),
            **{field: getattr(model, field) for field in shape},
        },
        "parallel": {
            **parallel.model_dump(include={"tp", "pp", "gpus"}),
            "dp": estimate.data_parallel(parallel),
        },
        "trunk": {"steps": end.end_step, "tokens": end.end_tokens},
        "run": {"steps": sum(s.steps for s in plan.stages), "tokens": sum(s.tokens for s in plan.stages)},
        "stages": [_stage_json(plan, stage) for stage in plan.stages],
        "lr_boundaries": lr_boundaries(plan),
        "sources": {
            name: {
                "path": source.path,
                "tokens": plan.sizes[name],
                "tokens_per_epoch": plan.orders[name].tokens_per_epoch,
                "tokens_read": sum(stage.tokens_drawn(name) for stage in plan.stages),
                "epochs": epochs[name],
                "max_epochs": source.max_epochs,
            }
            for name, source in recipe.sources.items()
        },
        "checkpoints": {
            "written": disk.written,
            "kept": disk.kept,
            "bytes_each": disk.bytes_each,
            "bytes_at_once": disk.bytes_at_once,
            "save_points": [{"stage": name, "step": step} for name, step in sorted(plan.save_points())],
        },
        "compute": {
            "flops": cost.flops,
            "flops_full": cost.flops_full,
            "flops_per_gpu": cost.flops / parallel.gpus if parallel.gpus else None,
            "gpu_hours": cost.gpu_hours,
            "days": cost.gpu_hours / parallel.gpus / 24 if parallel.gpus else None,
            "tokens_per_second_per_gpu": cost.tokens_per_second_per_gpu,
            "assumed": cost.assumed,
            "device": cost.device if cost.assumed else None,
        },
        "problems": [{"level": problem.level, "message": problem.message} for problem in plan.problems],
    }


def lr_boundaries(plan: Plan) -> list[dict[str, Any]]:
    """Where the rate changes course: warm-up and decay of the recipe, and stages with a rate of their own."""
    rows: list[dict[str, Any]] = []
    base = next((schedule for schedule in plan.schedules if isinstance(schedule, WarmupStableDecay)), None)
    marks = (
        {"warm-up ends": base.warmup, "decay starts": base.decay_start, "decay ends": base.decay_end}
        if base
        else {}
    )
    if base and base.decay_start is None:
        marks.pop("decay ends")
    for what, tokens in marks.items():
        if tokens is None or base is None:
            continue
        stage = next((stage for stage in plan.trunk if tokens <= stage.end_tokens), None)
        # The first step that starts at or behind the boundary.
        step = stage and stage.start_step - (stage.start_tokens - tokens) // stage.tokens_per_step
        rows.append(
            {"what": what, "tokens": tokens, "step": step, "lr": base(tokens), "stage": stage and stage.name}
        )
    for stage, own in zip(plan.stages, (stage.lr for stage in plan.recipe.stages), strict=True):
        if own is not None:
            for what, step in (("starts", stage.start_step), ("ends", stage.end_step)):
                row = {"what": f"{stage.name} {what}", "tokens": stage.tokens_at(step), "step": step}
                rows.append({**row, "lr": plan.lr(stage.index, step), "stage": stage.name})
    return rows


def _stage_json(plan: Plan, stage: StagePlan) -> dict[str, Any]:
    memory = estimate.memory_per_gpu(plan.recipe.model, plan.recipe.parallel, stage)
    sent = estimate.stage_traffic(plan.recipe.model, plan.recipe.parallel, stage)
    order = plan.recipe.stages[stage.index].megatron_order
    plain = (
        "name",
        "parent",
        "is_branch",
        "start_step",
        "end_step",
        "steps",
        "start_tokens",
        "end_tokens",
        "tokens",
    )
    settings = (
        "seq_length",
        "global_batch",
        "micro_batch",
        "tokens_per_step",
        "rope_base",
        "precision",
        "document_mask",
    )
    return {
        **{field: getattr(stage, field) for field in plain + settings},
        "megatron_order": order and order.model_dump(),
        "lr_start": plan.lr(stage.index, stage.start_step),
        "lr_end": plan.lr(stage.index, stage.end_step),
        "checkpoints": estimate.saves_in(plan, stage),
        "memory_per_gpu": {
            part: round(getattr(memory, part))
            for part in ("weights", "gradients", "optimizer", "activations", "logits", "workspace", "total")
        },
        "sent_per_step": {
            part: round(getattr(sent, part))
            for part in ("tensor", "pipeline", "context", "gradients", "parameters", "total")
        },
        "sources": {
            name: {
                "weight": float(weight),
                "weight_exact": str(weight),
                "windows": stage.draws[name],
                "tokens": stage.tokens_drawn(name),
                "epochs": stage.tokens_drawn(name) / plan.orders[name].tokens_per_epoch,
                "skipped_tokens": stage.skipped_tokens[name],
                "lineage_tokens": stage.tokens_after(name),
                "lineage_epochs": plan.epochs(stage)[name],
            }
            for name, weight in stage.weights.items()
        },
    }
