"""The law `leak` through a whole model: documents of a window do not see each other, and positions need no reset."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_smol.data.batch import MicroBatch
from megatron_smol.recipe.load import parse_recipe
from megatron_smol.train import step
from megatron_smol.train.step import Engine
from tests.helpers import run_ranks

EOD, VOCABULARY = 0, 256
RECIPE = f"""
name: documents
run_dir: nowhere
tokenizer: none
model: {{layers: 4, hidden_size: 64, heads: 4, kv_heads: 2, ffn_size: 96, vocab_size: {VOCABULARY}}}
sources: {{a: {{path: a, tokens: 10M}}}}
training: {{seq_length: 32, global_batch: 8, micro_batch: 2, precision: fp32}}
stages: [{{name: one, until: 100 steps, mixture: {{a: 1}}}}]
lr: {{peak: 1e-3}}
"""


def engine(parallel: str = "") -> Engine:
    torch.set_num_threads(1)
    return Engine(
        parse_recipe(f"{RECIPE}parallel: {{{parallel}}}"), LENGTH if parallel else 32, 10000.0, "fp32"
    )


def document(seed: int, size: int) -> list[int]:
    return [*np.random.default_rng(seed).integers(1, VOCABULARY, size - 1).tolist(), EOD]


@torch.no_grad()
def logits(gpt: torch.nn.Module, windows: list[list[int]], masked: bool = True) -> torch.Tensor:
    batch = MicroBatch.of(np.array(windows), torch.device("cpu"), EOD if masked else None)
    return gpt(batch.tokens, batch.positions, batch.mask)  # [b, s, vocabulary]


def _documents_in_a_window() -> dict[str, float | bool]:
    gpt = engine().gpt.eval()
    a, other, b, c = document(1, 11), document(2, 11), document(3, 13), document(4, 8)
    together = logits(gpt, [a + b + c + [5], c + a + b + [5]])
    changed = logits(gpt, [other + b + c + [5], c + other + b + [5]])
    unmasked, unmasked_changed = (logits(gpt, [x + b + c + [5]], masked=False) for x in (a, other))
    # On its own, a document starts at position 0: that is what a reset of positions would give.
    alone = logits(gpt, [[*b, 5]])
    return {
        "b and c are untouched": torch.equal(together[0, 11:], changed[0, 11:]),
        "c before and b after are untouched": torch.equal(together[1, :8], changed[1, :8])
        and torch.equal(together[1, 19:], changed[1, 19:]),
        "a itself moved": not torch.allclose(together[0, :11], changed[0, :11]),
        "without a mask b moves": not torch.allclose(unmasked[0, 11:24], unmasked_changed[0, 11:24]),
        "away from alone": float((together[0, 11:24] - alone[0]).abs().max()),
        "scale": float(alone.abs().max()),
    }


def test_no_logit_of_another_document_moves_and_positions_need_no_reset() -> None:
    found = run_ranks(_documents_in_a_window, 1)[0]
    away, scale = found.pop("away from alone"), found.pop("scale")
    assert all(found.values()), found
    assert away < 2e-5 * scale, "relative positions inside a document are the same with and without a reset"


def _train(
    windows: list[list[int]], ignored: list[list[bool]] | None, micro: int, parallel: str = ""
) -> tuple[float, float, float]:
    """(loss, gradient norm, validation loss) of a step on this rank's share."""
    from megatron.core import parallel_state

    running = engine(parallel)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches = []
    for i in range(rank * micro, len(windows), micro * size):
        mask = None if ignored is None else np.array(ignored[i : i + micro])
        batches.append(MicroBatch.of(np.array(windows[i : i + micro]), torch.device("cpu"), EOD, mask))
    validation = running.evaluate(batches)
    result = running.train_step(batches, 1e-3)
    return result.loss, result.grad_norm, validation


LENGTH, ROWS = 12, 4
WINDOWS = [np.random.default_rng(row).integers(0, VOCABULARY, LENGTH + 1).tolist() for row in range(ROWS)]
# Very different numbers of real tokens, so that a mean of means would be another number.
IGNORED = [[False] * LENGTH, [True] * 11 + [False], [j % 2 == 0 for j in range(LENGTH)], [True] * LENGTH]


def _losses() -> dict[str, tuple[float, float, float]]:
    nothing = [[False] * LENGTH] * ROWS
    return {
        "two rows a micro-batch": _train(WINDOWS, IGNORED, 2),
        "one row a micro-batch": _train(WINDOWS, IGNORED, 1),
        "by hand": _by_hand(),
        "plain": _train(WINDOWS, None, 2),
        "nothing ignored": _train(WINDOWS, nothing, 2),
    }


def _by_hand() -> tuple[float, float, float]:
    """Cross entropy over all real tokens of the global batch at once, by PyTorch alone, and its gradient's norm."""
    running = engine()
    gpt = running.gpt
    batch = MicroBatch.of(np.array(WINDOWS), torch.device("cpu"), EOD, np.array(IGNORED))
    out = gpt(batch.tokens, batch.positions, batch.mask)
    loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), batch.labels.flatten())  # ignores -100
    for part in running.parts:
        part.zero_grad_buffer()
    loss.backward()
    gradients = [parameter.main_grad for parameter in gpt.parameters()]
    return float(loss), float(torch.sqrt(sum((g.float() ** 2).sum() for g in gradients))), float(loss)


def _packed_and_masked(parallel: str) -> list[tuple[float, float, float]]:
    """A step with `cu_seqlens` in place of the mask, as under Transformer Engine, and the step with the mask."""
    windows = [
        document(1, 5) + document(2, 8),
        document(3, 13),
        document(4, 6) + document(5, 7),
        document(6, 13),
    ]
    found = []
    for packing in (True, False):
        step.packs = lambda batch, packing=packing: packing and batch.documents is not None
        found.append(_train(windows, IGNORED, 2, parallel))
    return found


@pytest.mark.parametrize(
    ("ranks", "parallel"), [(1, ""), (2, "pp: 2"), (2, "tp: 2, sequence_parallel: true")]
)
def test_windows_as_one_row_of_documents_are_the_masked_windows(ranks: int, parallel: str) -> None:
    for packed, masked in run_ranks(_packed_and_masked, ranks, parallel):
        assert packed == pytest.approx(masked, rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ignored_labels_carry_no_loss_whatever_the_layout(ranks: int) -> None:
    for found in run_ranks(_losses, ranks):
        for layout in ("two rows a micro-batch", "one row a micro-batch"):
            assert found[layout] == pytest.approx(found["by hand"], rel=1e-5), layout
        assert found["nothing ignored"] == pytest.approx(found["plain"], rel=1e-6)
        assert found["plain"] != pytest.approx(found["by hand"], rel=1e-3)
