"""One model under lm-eval: `Harness.ask` runs one task and gives back its row.

lm-eval builds the prompts, scores them and computes the metrics. What is added is a guard against prompts that
do not fit the model's context, which lm-eval cuts with a warning a line.
"""

from __future__ import annotations

import logging
import math
import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
import torch
import transformers
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.huggingface import HFLM

from megatron_smol.device import on_gpu
from megatron_smol.errors import CheckpointError, UserError
from megatron_smol.evals.results import FORMAT, Row
from megatron_smol.evals.tasks import Question
from megatron_smol.train.state import versions

CPU_BATCH, GPU_BATCH = 8, 32
_PREFERRED = ("acc_norm", "acc", "exact_match")  # the figure of a task that suites.yaml does not know


@dataclass(frozen=True)
class Settings:
    """How a model is asked. max_length: tokens, None for the model's own; dtype: torch's name, or auto."""

    chat_template: bool = False
    max_length: int | None = None
    dtype: str = "auto"
    batch_size: int | None = None


class GuardedLM(HFLM):
    """lm-eval's own model class, counting prompts whose beginning is cut and refusing when most are."""

    cut = 0

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise UserError(
                f"an answer of {longest:,} tokens does not fit the model's context of {self.max_length:,}; leave "
                "this task out"
            )
        self._count([len(context) + len(continuation) - 1 for _, context, continuation in requests])
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def generate_until(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        lengths = [
            len(self.tok_encode(request.args[0])) + request.args[1].get("max_gen_toks", self.max_gen_toks)
            for request in requests
        ]
        self._count(lengths)
        return super().generate_until(requests, *args, **kwargs)

    def _count(self, lengths: list[int]) -> None:
        self.cut = sum(length > self.max_length for length in lengths)
        if 2 * self.cut > len(lengths):
            raise UserError(
                f"{self.cut:,} of {len(lengths):,} prompts are longer than the context of {self.max_length:,} tokens "
                f"(the longest has {max(lengths):,} with its answer); evaluate a model with a longer context, or "
                "leave this task out"
            )


class Harness:
    """A loaded model that answers tasks."""

    def __init__(self, folder: Path, name: str, settings: Settings) -> None:
        quiet()
        cuda = on_gpu()
        self.device = "cuda" if cuda else "cpu"
        self.batch_size = settings.batch_size or (GPU_BATCH if cuda else CPU_BATCH)
        self.settings = settings
        try:
            self.lm: Any = GuardedLM(
                pretrained=str(folder),
                device=self.device,
                dtype=settings.dtype,
                batch_size=self.batch_size,
                max_length=max_length(folder, settings.max_length),
            )
        except Exception as error:  # transformers raises a dozen kinds
            text = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{name} cannot be loaded: {text}") from error

    def ask(self, question: Question) -> tuple[Row, list[Row]]:
        """Run a task with lm-eval; returns what is measured (the rest of its row is the caller's) and its samples."""
        start = time.monotonic()
        self.lm.cut = 0
        _seed(question.task)
        try:
            found: Any = lm_eval.evaluate(
                lm=self.lm,
                task_dict={"tasks": {question.label: question.task}},
                limit=question.limit,
                apply_chat_template=self.settings.chat_template,
                fewshot_as_multiturn=True,
            )
        except UserError as error:
            raise UserError(f"task {question.label}: {error}") from error
        metrics = _metrics(found["results"][question.label], found["higher_is_better"][question.label])
        row = {
            "format": FORMAT,
            "metric": main_metric(question.metric, metrics),
            "metrics": metrics,
            "n": found["n-samples"][question.label]["effective"],
            "cut": self.lm.cut,
            "shots": int(found["n-shot"].get(question.label) or 0),
            "device": self.device,
            "batch_size": self.batch_size,
            "seconds": round(time.monotonic() - start, 2),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions() | {"lm-eval": lm_eval.__version__, "datasets": datasets.__version__},
        }
        return row, [_sample(sample) for sample in found["samples"][question.label]]


def _seed(task: Any) -> None:
    """What `lm_eval.simple_evaluate` does before a task; itself it would describe the machine after every task."""
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def max_length(folder: Path, wanted: int | None) -> int:
    """Tokens of the context: the model's own, or fewer when fewer are wanted."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    own = int(getattr(config, "max_position_embeddings", 2048))
    return min(own, wanted or own)


def require_chat_template(folder: Path, name: str) -> None:
    """Refuse to apply a template that the tokenizer does not have."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {name} has no chat template, so it is a base model; evaluate it without one "
            "(--no-chat, or --suite smollm2-base)"
        )


def quiet() -> None:
    """Progress bars stay; remarks that no user can act on go."""
    for name in ("lm_eval", "datasets", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _metrics(found: dict[str, Any], higher: dict[str, bool]) -> dict[str, dict[str, Any]]:
    """lm-eval's "acc,none": 0.4 and "acc_stderr,none": 0.1 as {"acc": {"value", "stderr", "higher_is_better"}}."""
    metrics = {}
    for key, value in found.items():
        name, _, chosen = key.partition(",")
        if not chosen or name.endswith("_stderr"):
            continue
        error = found.get(f"{name}_stderr,{chosen}")
        metrics[name if chosen == "none" else f"{name}:{chosen}"] = {
            "value": float(value),
            "stderr": float(error) if isinstance(error, float) and math.isfinite(error) else None,
            "higher_is_better": bool(higher.get(name, True)),
        }
    return metrics


def main_metric(known: str | None, metrics: dict[str, Any]) -> str:
    """The figure that tables show: the suite's, or the most telling one there is."""
    wanted = (known, *_PREFERRED) if known else _PREFERRED
    return next(
        (m for name in wanted for m in metrics if m == name or m.startswith(f"{name}:")), next(iter(metrics))
    )


def _sample(sample: dict[str, Any]) -> Row:
    """A question as asked and answered. answers: [log-likelihood, greedy] of each choice, or the text."""
    chosen = sample["filter"]
    suffix = "" if chosen == "none" else f":{chosen}"
    arguments = sample["arguments"]
    return {
        "doc": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "prompt": arguments[0][0],
        "choices": [a[1] for a in arguments if isinstance(a[1], str)],
        "target": sample["target"],
        "answers": sample["filtered_resps"],
        "scores": {f"{name}{suffix}": _plain(sample[name]) for name in sample["metrics"]},
    }


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else float(value)
