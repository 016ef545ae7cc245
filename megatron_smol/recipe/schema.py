"""What a recipe may say: typed, frozen, and strict about names.

`load` reads a YAML file into a `Recipe`, `plan` does the arithmetic on it, and every later module reads its
settings from here. A key that is not below is an error. docs/recipe.md is generated from these fields
(tools/make_recipe_reference.py), so a field's description is its documentation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_smol.recipe.section import (
    Float,
    Mixture,
    Name,
    Precision,
    Section,
    Shape,
    SomeTokens,
    Steps,
    StepSpan,
    Tokens,
    TokensOrSteps,
    field,
)
from megatron_smol.recipe.tail import Dpo, Sft, Tail
from megatron_smol.recipe.units import Amount

__all__ = ["Dpo", "Float", "Section", "Sft", "Tail", "TokensOrSteps"]


class Model(Section):
    """A Llama-style decoder: RMSNorm, SwiGLU, rotary positions, no biases."""

    layers: int = field("transformer layers", gt=0)
    hidden_size: int = field("width of the residual stream", gt=0)
    heads: int = field("attention heads", gt=0)
    kv_heads: int = field("key/value heads; fewer than `heads` is grouped-query attention", gt=0)
    ffn_size: int = field("inner width of the SwiGLU feed-forward", gt=0)
    vocab_size: int = field("entries of the embedding, special tokens included", 49152, gt=0)
    tied_embeddings: bool = field("use the embedding as output layer too", True)
    norm_eps: Float = field("epsilon of RMSNorm", 1e-5, gt=0)
    init_std: Float = field(
        "std of the normal initialisation; outputs of attention and feed-forward use std / sqrt(2 layers)",
        0.02,
        gt=0,
    )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.heads

    def parameters(self) -> int:
        """Exact parameter count, norms and embeddings included."""
        h, kv = self.hidden_size, self.kv_heads * self.head_dim
        layer = 2 * h * h + 2 * h * kv + 3 * h * self.ffn_size + 2 * h
        return self.layers * layer + h + self.vocab_size * h * (1 if self.tied_embeddings else 2)


class Data(Section):
    """What fixes the order of the data, together with `sources` and the mixtures."""

    seed: int = field("seed of the data order", 8, ge=0, lt=2**63)
    page_length: SomeTokens | None = field(
        "unit of shuffling; a multiple of every seq_length; default: the largest seq_length of the recipe",
        None,
        "tokens",
    )
    holdout_tokens: Tokens = field(
        "last tokens of each source: never trained on, used for validation", 0, "tokens"
    )
    over_epochs: Literal["error", "warn"] = field(
        "what a plan does when a source is read more often than its max_epochs", "error"
    )


class Source(Section):
    """One named corpus."""

    path: str = field(
        "folder with manifest.json (written by `smol preprocess`) or a Megatron .bin/.idx prefix"
    )
    tokens: SomeTokens | None = field("size used for planning while the data is not on disk", None, "tokens")
    max_epochs: Float | None = field(
        "cap on passes over this source along any lineage; absent: a warning above 4", None, "epochs", gt=0
    )


class Training(Section):
    """Settings of every stage that does not set its own."""

    seq_length: int = field("length of a training window", unit="tokens", gt=0)
    rope_base: Float = field("base (theta) of the rotary positions", 10000.0, gt=0)
    global_batch: int = field("windows per optimizer step, over all ranks", unit="windows", gt=0)
    micro_batch: int = field("windows per forward pass on one rank", unit="windows", gt=0)
    precision: Precision = field(
        "arithmetic of the matrix products; emulated-...: rounded as FP8 on a CPU, to see whether a model trains",
        "bf16",
    )
    document_mask: bool = field("hide earlier documents of the window from attention", False)


class BranchPoint(Section):
    """Where a branch leaves its parent stage."""

    stage: str = field("name of the earlier stage to leave from")
    before_end: TokensOrSteps = field(
        "how long before that stage's end", Amount(0, "tokens"), "tokens or steps"
    )


class StageLR(Section):
    """A stage's own learning rate, in place of the recipe's schedule."""

    start: Float | None = field("LR at the start; absent: the LR at that point of the parent", None, ge=0)
    end: Float = field("LR at the end of the stage", 0.0, ge=0)
    shape: Shape = field("path from start to end", "linear")


class MegatronOrder(Section):
    """The data order of an older run of Megatron-LM, from the index files in its cache, to continue it exactly.

    The mixture must say what that run mixed. The ledger counts from here on.
    """

    cache: str = field(
        "folder of the index files: the old run's --data-cache-path, or the cache beside its data"
    )
    start_sample: int = field("samples of that order that the old run consumed", 0, "samples", ge=0)
    blend: str | None = field("hash in the file names, where the cache holds several runs", None)


class Stage(Section):
    """A stretch of training with one mixture. It follows the stage before it, or branches off with `from`."""

    name: Name = field("name of the stage, used in checkpoints, logs and overrides")
    from_: BranchPoint | None = Field(
        None, alias="from", description="start from inside an earlier stage instead: a branch"
    )
    until: TokensOrSteps | None = field(
        "end, counted from the start of training along this stage's lineage", None, "tokens or steps"
    )
    tokens: TokensOrSteps | None = field("length of the stage; give this or `until`", None, "tokens or steps")
    mixture: Mixture = field(
        "weight of each source; groups {weight, of: {...}} allowed; sums to 1 (+-1e-6)",
        unit="share of windows",
    )
    megatron_order: MegatronOrder | None = field("read in the order of an older run; absent: our own", None)
    lr: StageLR | None = field("own learning rate; absent: the recipe's schedule goes on", None)
    seq_length: int | None = field("overrides training.seq_length", None, "tokens", gt=0)
    rope_base: Float | None = field("overrides training.rope_base", None, gt=0)
    global_batch: int | None = field("overrides training.global_batch", None, "windows", gt=0)
    micro_batch: int | None = field("overrides training.micro_batch", None, "windows", gt=0)
    precision: Precision | None = field("overrides training.precision", None)
    document_mask: bool | None = field("overrides training.document_mask", None)


class LearningRate(Section):
    """Linear warm-up from 0, constant, then decay. Boundaries are independent of the stages' ends."""

    peak: Float = field("LR after warm-up", gt=0)
    warmup: TokensOrSteps = field("length of the linear warm-up", Amount(0, "steps"), "tokens or steps")
    decay_start: TokensOrSteps | None = field(
        "where the decay starts; absent: never", None, "tokens or steps"
    )
    decay_end: TokensOrSteps | None = field(
        "where the decay reaches `final`; default: the end of the trunk", None, "tokens or steps"
    )
    shape: Shape = field("shape of the decay", "linear")
    final: Float = field("LR at the end of the decay", 0.0, ge=0)


class Optimizer(Section):
    """AdamW."""

    beta1: Float = field("decay of the first moment", 0.9, ge=0, lt=1)
    beta2: Float = field("decay of the second moment", 0.95, ge=0, lt=1)
    eps: Float = field("Adam's epsilon", 1e-8, gt=0)
    weight_decay: Float = field("decoupled weight decay", 0.01, ge=0)
    decay_norms: bool = field("decay norm weights too, as SmolLM2 did (Megatron alone would not)", True)
    clip: Float = field("global gradient norm limit; 0: no clipping", 1.0, ge=0)


class Parallel(Section):
    """Layout of the ranks: none of it moves the data, and losses differ by rounding only.

    Data parallel is what remains: world size / (tp * pp * cp).
    """

    tp: int = field("tensor parallel ranks", 1, gt=0)
    pp: int = field("pipeline parallel ranks", 1, gt=0)
    cp: int = field("context parallel ranks: they share the tokens of each window", 1, gt=0)
    vpp: int = field(
        "virtual pipeline: parts of the model on each pipeline rank; more parts, a smaller bubble", 1, gt=0
    )
    sequence_parallel: bool = field("split norms and residuals over the tp ranks as well", False)
    cp_comm: Literal["ring", "all_gather"] = field(
        "how keys come to the queries of other cp ranks; with document_mask always all_gather", "ring"
    )
    recompute: Literal["none", "selective", "full"] = field(
        "activations computed again in the backward pass: none, those of attention, or all but each layer's input",
        "none",
    )
    distributed_optimizer: bool = field(
        "shard the optimizer over data-parallel ranks; its checkpoints load at any layout", True
    )
    overlap: bool | None = field(
        "hide data-parallel communication behind computation; absent: on GPUs, with more than one data-parallel rank",
        None,
    )
    gpus: int | None = field("world size the plan assumes; a run takes its own from the launcher", None, gt=0)

    @property
    def model_ranks(self) -> int:
        """Ranks that share one copy of the model and one window: tp * pp * cp."""
        return self.tp * self.pp * self.cp


class Fp8(Section):
    """Which layers FP8 spares, in the stages whose precision is one of `fp8-...` or `emulated-fp8-...`."""

    bf16_first: int | None = field(
        "first layers that stay in bf16; default: 1 for tensorwise, 0 for the others", None, "layers", ge=0
    )
    bf16_last: int | None = field(
        "last layers that stay in bf16; default: 1 for tensorwise, 0 for the others", None, "layers", ge=0
    )
    gather_parameters: bool = field(
        "keep the weights in FP8 and gather them so over data-parallel ranks: half the traffic; not with blockwise",
        False,
    )

    def bf16_layers(self, precision: str) -> tuple[int, int]:
        """(first, last) layers in bf16 under a precision."""
        default = 1 if precision.endswith("fp8-tensorwise") else 0
        first, last = (default if given is None else given for given in (self.bf16_first, self.bf16_last))
        return first, last


class Save(Section):
    """Checkpoints. Stage ends and branch points are always saved and kept, whatever is set here."""

    every: Steps = field("interval of checkpoints", 2000, "steps")
    keep_last: int = field("interval checkpoints to keep", 2, ge=1)
    keep_every: SomeTokens | None = field(
        "keep for good the first interval checkpoint after every so many tokens of the lineage; absent: none",
        None,
        "tokens",
    )
    asynchronous: bool = field(
        "write beside training, from a copy in the host's memory; false: training waits until it is published",
        True,
    )


class Guard(Section):
    """Numbers, ranks and nodes that go wrong. `skip`: the step is read, counted in the ledger as skipped, and not applied. `rollback`: the run goes on from its newest checkpoint and skips the steps around. Each decision is a row of incidents.jsonl; a run in which nothing goes wrong is not changed."""

    non_finite: Literal["stop", "skip", "rollback"] = field(
        "what follows a loss or gradient norm that is not a number; it is never applied", "stop"
    )
    spike: Literal["off", "note", "skip", "rollback", "stop"] = field(
        "what follows a loss or gradient norm far above those before it; note: a row and nothing else", "note"
    )
    sigmas: Float = field(
        "how far: this many standard deviations (1.4826 x median absolute deviation) of the logarithm",
        6.0,
        gt=0,
    )
    history: int = field(
        "steps of the stage that say what is usual; spikes are looked for after a quarter of them",
        128,
        "steps",
        ge=8,
    )
    skip_before: int = field("after a roll-back: steps skipped before the spike", 10, "steps", ge=0)
    skip_after: int = field("after a roll-back: steps skipped after the spike", 100, "steps", ge=0)
    max_in_a_row: int = field("incidents in consecutive steps after which the run stops", 10, ge=1)
    max_in_total: int = field("incidents after which the run stops", 100, ge=1)
    max_rollbacks: int = field("roll-backs to one and the same checkpoint after which the run stops", 3, ge=1)
    skip_steps: dict[Name, list[StepSpan]] = field(
        "steps that are not to be applied, by stage, first and last: {stable-1: [[7000, 7200]]}", {}
    )
    replica_check: int = field(
        "how often data-parallel copies of the weights, and tensor-parallel copies of the norms, are compared bit by bit; "
        "0: never",
        100,
        "steps",
        ge=0,
    )
    step_timeout: Float | None = field(
        "a rank that stays so long in one phase of a step hangs: all ranks' stacks are written, the one that lags is named, "
        "and the run ends to be restarted; default: ten median steps, at least 120 (pause_timeout until five are known)",
        None,
        "seconds",
        gt=0,
    )
    pause_timeout: Float = field(
        "the same for starting, saving, validation and the first step of a stage", 1800.0, "seconds", gt=0
    )
    collective_timeout: Float = field(
        "what NCCL and gloo wait for other ranks; longer than what one rank may do alone",
        1800.0,
        "seconds",
        gt=0,
    )
    lr_may_change: bool = field(
        "a run may go on with another `lr` than it began with, of a stage or of all; what changed is a row of incidents.jsonl "
        "(everything else that data or weights depend on stays as it was)",
        False,
    )
    straggler: Float = field(
        "a rank that needs this many times the median rank's time for its own part of a step is named",
        1.2,
        gt=1,
    )
    straggler_every: int = field(
        "steps between comparisons; four of them in a row name a rank; 0: never",
        5,
        "steps",
        ge=0,
    )


class Eval(Section):
    """Validation loss per source at the start and the end of each stage."""

    windows_per_source: int = field("windows read from the held-out end of each source", 64, "windows", ge=0)


class InitFrom(Section):
    """Start from another model's weights: continued pretraining, annealing. Recorded in run_dir/init_from.json."""

    path: str = field("checkpoint or run folder of the same model, or a Hugging Face folder (weights only)")
    what: Literal["weights", "weights+optimizer", "all"] = field(
        "weights: data and schedule start fresh; weights+optimizer: AdamW's moments too; all: also the place in "
        "data, ledger and schedule, to go on with that run's recipe in another run_dir",
        "weights",
    )


class Recipe(Section):
    """A whole training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = field("name of the run")
    seed: int = field("seed of the weight initialisation", 42, ge=0, lt=2**63)
    run_dir: str = field("folder for checkpoints, metrics and the report")
    tokenizer: str = field("hub name or local folder with tokenizer.json")
    model: Model = field("the network")
    init_from: InitFrom | None = field("another model to start from; absent: random weights", None)
    data: Data = field("what fixes the data order", Data())
    sources: dict[Name, Source] = field("the corpora, by name", min_length=1)
    training: Training = field("settings of every stage that does not set its own")
    stages: tuple[Stage, ...] = field("the stages, in the order they run", min_length=1, strict=False)
    lr: LearningRate = field("the learning rate")
    optimizer: Optimizer = field("AdamW", Optimizer())
    parallel: Parallel = field("layout of the ranks", Parallel())
    fp8: Fp8 = field("layers that FP8 spares", Fp8())
    save: Save = field("checkpoints", Save())
    guard: Guard = field("numbers, ranks and nodes that go wrong", Guard())
    eval: Eval = field("validation", Eval())
    tail: Tail | None = field("SFT and DPO", None)

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        from megatron_smol.recipe.checks import check_recipe

        check_recipe(self)
        return self

    def training_of(self, stage: Stage) -> Training:
        """The stage's settings: its own where given, else those of `training`."""
        own = {name: value for name in Training.model_fields if (value := getattr(stage, name)) is not None}
        return self.training.model_copy(update=own)

    @property
    def page_length(self) -> int:
        """The unit of shuffling: data.page_length, or the largest seq_length of any stage."""
        return self.data.page_length or max(self.training_of(stage).seq_length for stage in self.stages)

    @property
    def run_path(self) -> Path:
        """`run_dir` as a path."""
        return Path(self.run_dir)
