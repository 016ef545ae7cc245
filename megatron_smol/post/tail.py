"""What SFT and DPO share: model in, settings, data, resumable training by TRL, a chat model out.

    settings ─► model and tokenizer ─ prepare ─► TRL's trainer (sft.py, dpo.py) ─► OUTPUT

One process on a CPU or GPU, or several ranks under `accelerate launch`; the first rank prepares and writes.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_smol.checkpoint.folder import COMPLETE
from megatron_smol.device import on_gpu
from megatron_smol.errors import EXIT_RESTART_ME, CheckpointError, RunError, UserError
from megatron_smol.post.settings import Kind, accumulation, fill, read_tail
from megatron_smol.post.template import load_chat_tokenizer, set_roles
from megatron_smol.recipe.schema import Dpo, Sft
from megatron_smol.train.signals import StopFlag
from megatron_smol.train.state import versions


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    kind: Kind
    model: Path
    output: Path
    data: str | None = None
    recipe: Path | None = None
    overrides: Sequence[str] = ()
    strict: bool = False
    overwrite: bool = False


# (settings for the trainer's own configuration class, model, tokenizer, training rows, held-out rows,
# callbacks) -> the trainer
MakeTrainer = Callable[..., Any]


def run_tail(request: Request, make_trainer: MakeTrainer) -> int:
    """Carry a request out; returns the exit code: 0, or 75 after a signal (saved; the same command goes on)."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    _require_model_folder(request.model)
    section = read_tail(request.kind, request.recipe, request.overrides)
    if request.data is not None:
        section = section.model_copy(update={"dataset": request.data})
    _import_libraries()
    if not on_gpu():
        _keep_freed_memory()
    config = _read_config(request.model)
    section, notes = fill(section, _parameters(config), config.max_position_embeddings, on_gpu())
    job = _Job(request, section, console)
    for note in notes:
        job.say(f"note: {note}")
    return job.run(make_trainer)


class _Job:
    """One run of SFT or DPO in this process."""

    def __init__(self, request: Request, section: Sft | Dpo, console: Console) -> None:
        from accelerate import PartialState

        from megatron_smol.post.output import Output

        self.request, self.section = request, section
        # What is wrong here is found by all ranks, and told by one as long as they have not met.
        self.tokenizer = load_chat_tokenizer(request.model)
        self.accumulation = accumulation(section, int(os.environ.get("WORLD_SIZE", "1")))
        # The other ranks wait while the first one tokenizes, which may take longer than the 10 minutes of NCCL.
        self.state = PartialState(cpu=not on_gpu(), timeout=timedelta(hours=4))
        self.console = console if self.state.is_main_process else Console(quiet=True)
        self.output = Output(request.output)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def run(self, make_trainer: MakeTrainer) -> int:
        with self.state.main_process_first():
            self._open_output()
            if self.output.complete:
                self.say(f"{self.output.folder} is complete, made from this model, data and settings")
                return 0
            self._prepare_data()
        from megatron_smol.post.monitor import Monitor
        from megatron_smol.post.prepare import split

        training, heldout = split(self.output.work, self.section)
        stop = StopFlag()
        monitor = Monitor(self.output, self.request.kind, self.console, stop)
        resume = self._begin()
        settings = self._trainer_settings(evaluates=heldout is not None)
        settings["eval_on_start"] = heldout is not None and resume is None
        trainer = make_trainer(
            self.request.model, self.section, settings, self.tokenizer, training, heldout, [monitor]
        )
        self._announce(trainer, training, heldout)
        try:
            stop.install()  # before this there is nothing to save
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            if monitor.stopped_by:
                self.say(f"stopped by signal {monitor.stopped_by}, saved; the same command goes on")
                return EXIT_RESTART_ME
            last = self._finish(trainer, heldout)
        finally:
            monitor.close()
        weights = trainer.accelerator.get_state_dict(trainer.model)  # with FSDP all ranks hand in their parts
        if self.state.is_main_process:
            self._publish(weights, last)
        self.state.wait_for_everyone()
        return 0

    # --- before ------------------------------------------------------------------------------------------

    def _open_output(self) -> None:
        from megatron_smol.post.output import data_identity, model_identity

        if not self.state.is_main_process:
            return
        settings = self.section.model_dump(mode="json", exclude={"dataset"})
        asked = {
            "command": self.request.kind,
            "model": model_identity(self.request.model),
            "data": data_identity(str(self.section.dataset)),
            "strict": self.request.strict,
            "settings": settings,
        }
        self.output.open(asked, self.request.overwrite, self.say)

    def _prepare_data(self) -> None:
        from megatron_smol.post.prepare import BAD_ROWS, prepare

        if not self.state.is_main_process:
            return
        try:
            summary = prepare(
                str(self.section.dataset),
                self.section,
                self.tokenizer,
                self.output.work,
                self.output.folder / BAD_ROWS,
                self.request.strict,
                self.console,
            )
        except BaseException:
            self.output.undo()
            raise
        for line in summary.lines("conversations" if self.request.kind == "sft" else "pairs"):
            self.say(line)
        if summary.bad_count:
            self.say(f"  all skipped rows: {self.output.folder / BAD_ROWS}")

    def _begin(self) -> Path | None:
        """The checkpoint to go on from: the first rank looks at the files, all take the one and the folder it names."""
        from accelerate.utils import broadcast_object_list

        named: list[Any] = [None, None]
        if self.state.is_main_process:
            self.output.begin()
            named = [self.output.start, self.output.newest_checkpoint(self.say)]
        broadcast_object_list(named, from_process=0)
        self.output.start, resume = named
        if resume:
            self.say(f"going on from {resume}")
        return resume

    def _trainer_settings(self, evaluates: bool) -> dict[str, Any]:
        """Arguments that SFTConfig and DPOConfig have in common; theirs are added in sft.py and dpo.py."""
        section, gpu = self.section, on_gpu()
        fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
        return {
            "output_dir": str(self.output.start),
            "num_train_epochs": section.epochs,
            "learning_rate": section.lr,
            "lr_scheduler_type": section.scheduler,
            "warmup_steps": section.warmup_ratio,  # below 1: a share of the steps
            "adam_beta1": 0.9,
            "adam_beta2": section.beta2,
            "adam_epsilon": 1e-8,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "optim": "adamw_torch",
            "per_device_train_batch_size": section.micro_batch,
            "per_device_eval_batch_size": section.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "bf16": section.precision == "bf16",
            "use_cpu": not gpu,
            "activation_checkpointing": gpu and not fsdp,  # FSDP has its own, in its configuration file
            "seed": section.seed,
            "data_seed": section.seed,
            "logging_steps": 1,
            "disable_tqdm": True,
            "report_to": "none",
            "save_strategy": "steps",
            "save_steps": section.save_every,
            "save_total_limit": 2,
            "eval_strategy": "steps" if evaluates else "no",
            "eval_steps": section.save_every,
        }

    def _announce(self, trainer: Any, training: Any, heldout: Any) -> None:
        section, ranks = self.section, self.state.num_processes
        rows = len(trainer.train_dataset)
        steps = math.ceil(rows / section.global_batch)
        packed = f" packed into {rows:,} sequences" if rows != len(training) else ""
        held = f"{len(heldout):,} held out" if heldout is not None else "none held out (too few rows)"
        self.say(
            f"{self.request.kind}: {len(training):,} rows{packed}, {held}; about {steps:,} steps x "
            f"{section.epochs:g} epochs, batch {section.global_batch} = {section.micro_batch} x "
            f"{self.accumulation} accumulated x {ranks} ranks; length {section.seq_length:,}, peak LR "
            f"{section.lr:g}, {section.precision}"
        )
        if rows < section.global_batch:
            self.say(
                f"note: {rows:,} sequences are less than one batch of {section.global_batch}; a step is a whole "
                "epoch. A smaller global_batch or seq_length gives more steps"
            )

    # --- after -------------------------------------------------------------------------------------------

    def _finish(self, trainer: Any, heldout: Any) -> dict[str, Any]:
        """The last losses; RunError when the model is broken. All ranks call it."""
        step = trainer.state.global_step
        if heldout is not None and not any(
            row["step"] == step and "eval_loss" in row for row in trainer.state.log_history
        ):
            trainer.evaluate()
        logs = [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]
        last = {key: row[key] for row in logs for key in ("loss", "eval_loss") if key in row}
        if broken := [key for key, value in last.items() if not math.isfinite(value)]:
            error = RunError(
                f"{self.request.kind} ended with a {broken[0]} that is not a number, so no model was written; "
                f"start over with a lower lr than {self.section.lr:g} and --overwrite"
            )
            error.alike = True
            raise error
        return {"steps": step, "loss": last.get("loss"), "heldout_loss": last.get("eval_loss")}

    def _publish(self, weights: dict[str, Any], last: dict[str, Any]) -> None:
        written = self.output.start / "model"
        shutil.rmtree(written, ignore_errors=True)
        _write_model(self.request.model, weights, self.tokenizer, written, self.section.precision == "bf16")
        record = {
            "command": self.request.kind,
            "made_from": str(self.request.model),
            "dataset": self.section.dataset,
            **last,
            "versions": versions() | {"trl": version("trl")},
        }
        self.output.publish(written, record)
        self.say(f"wrote {self.output.folder}; talk to it: smol chat {self.output.folder}")


def load_model(folder: Path, tokenizer: Any) -> Any:
    """The model in fp32, with the tokenizer's roles: bf16 training keeps fp32 weights and rounds as it computes."""
    import torch
    import transformers

    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32
        )
    except Exception as error:  # transformers raises a dozen kinds
        raise CheckpointError(f"{folder} cannot be loaded: {first_line(error)}") from error
    if (ids := len(tokenizer)) > (rows := int(model.config.vocab_size)):
        raise CheckpointError(
            f"{folder}: its tokenizer has {ids:,} ids and the model's vocabulary {rows:,}; they are not of the same model"
        )
    set_roles(model, tokenizer)
    return model


def _write_model(source: Path, weights: dict[str, Any], tokenizer: Any, folder: Path, as_bf16: bool) -> None:
    """A folder that transformers loads as it is: a fresh model, so that nothing of the trainer's clings to it."""
    import torch
    import transformers

    dtype = torch.bfloat16 if as_bf16 else torch.float32
    config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(weights)
    set_roles(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _require_model_folder(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "checkpoints").is_dir() or (folder / COMPLETE).is_file():
        raise CheckpointError(
            f"{folder} is a training checkpoint and SFT and DPO start from a Hugging Face folder; first run "
            f"`smol convert to-hf {folder} {folder}/hf`"
        )
    raise CheckpointError(f"{folder} has no config.json, so it is no Hugging Face model folder")


def _read_config(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises a dozen kinds
        raise CheckpointError(f"{folder}/config.json cannot be read: {first_line(error)}") from error


def _parameters(config: Any) -> int:
    """Parameters of the model that a configuration describes, counted without memory for them."""
    import torch
    import transformers

    with torch.device("meta"):
        return int(transformers.AutoModelForCausalLM.from_config(config).num_parameters())


def _keep_freed_memory() -> None:
    """Let glibc reuse large blocks: fetched from the kernel anew, TRL's chunks of logits cost half of a CPU step."""
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 64 << 20)):
        mallopt(parameter, value)


def _import_libraries() -> None:
    """TRL and what it needs, without their greetings; UserError when the extra is not installed."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|trl|transformers|accelerate)\b.*")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorBoard looks for TensorFlow
    try:
        import datasets
        import transformers
        import trl  # noqa: F401
    except ImportError as error:
        raise UserError(f"SFT and DPO need {error.name}: pip install 'megatron-smol[post]'") from error
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
