"""lm-eval called as anyone would call it, for tests that compare with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.tasks
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from megatron_smol.evals.harness import CPU_BATCH

LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent


def write_task(yaml: Path, files: dict[str, Path], folder: Path) -> None:
    """The task `direct` in `folder`: the one of `yaml`, only its data replaced."""
    lines = [f"include: {yaml}", "task: direct", "tag: null", "dataset_path: json", "dataset_name: null"]
    lines += [
        "validation_split: null",
        "training_split: train" if "train" in files else "training_split: null",
        "dataset_kwargs:",
        "  data_files:",
    ]
    lines += [f"    {split}: {path}" for split, path in files.items()]
    folder.mkdir(exist_ok=True)
    (folder / "direct.yaml").write_text("\n".join(lines) + "\n")


def directly(model: Path, yaml: Path, files: dict[str, Path], folder: Path, **how: Any) -> Any:
    """lm-eval's own entry point on the task of `yaml`, only its data replaced."""
    write_task(yaml, files, folder)
    return lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(model), device="cpu", batch_size=CPU_BATCH),
        tasks=["direct"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        **how,
    )
