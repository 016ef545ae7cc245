"""Step 4: does FP8 learn as bf16 does? Same initial weights, same real tokens, one precision a process; bf16 with another seed is the noise floor.

Arguments: PRECISION SEED FILE, the file being token ids as uint16 (at least steps x 16,384 + 1). `python -m bench.gpu.loss_gap` compares the curves.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu.common import Options, options, run_rows
from megatron_smol.errors import DataError, UserError

STEPS, TOKENS, LENGTH, PEAK_LR = 150, 16384, 2048, 5e-4
WARMUP_STEPS = 20


def main() -> None:
    given = options(__doc__, 400)
    if len(given.rest) != 3:
        raise SystemExit("error: give PRECISION SEED FILE, such as bf16 42 .te/tokens.bin")
    precision, seed, file = given.rest
    row = partial(_curve, given, precision, int(seed), Path(file))
    run_rows("loss", [(f"{precision} seed {seed}", row)], given)


def _curve(given: Options, precision: str, seed: int, file: Path) -> dict[str, Any]:
    import numpy as np

    from megatron_smol.data.batch import MicroBatch
    from megatron_smol.model.backend import backend
    from megatron_smol.train.step import Engine

    setting = given.setting(precision, LENGTH, TOKENS)
    recipe = setting.recipe.model_copy(update={"seed": seed})
    training, steps = recipe.training, 4 if given.dry_run else STEPS
    if not file.is_file():
        raise UserError(
            f"there is no file {file}; make one from a preprocessed source: its .bin is ids as uint16"
        )
    ids = np.fromfile(file, dtype=np.uint16).astype(np.int64) % recipe.model.vocab_size
    per_step = training.micro_batch * training.seq_length
    if len(ids) <= steps * per_step:
        raise DataError(f"{file} has {len(ids):,} tokens, and {steps} steps need {steps * per_step + 1:,}")
    engine = Engine(recipe, training.seq_length, training.rope_base, precision)
    losses = []
    for step in range(steps):
        at = step * per_step
        windows = np.stack(
            [
                ids[at + i * training.seq_length :][: training.seq_length + 1]
                for i in range(training.micro_batch)
            ]
        )
        lr = PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS)
        losses.append(engine.train_step([MicroBatch.of(windows, backend().device)], lr).loss)
    return {"precision": precision, "seed": seed, "losses": losses, "tokens_per_step": per_step}


if __name__ == "__main__":
    main()
