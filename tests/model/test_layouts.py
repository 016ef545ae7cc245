"""The law `parallel`: every layout trains like one process, from the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import parity
from tests.layouts import IN_EVERY_RUN, LAYOUTS, Layout
from tests.parity import one_process, run

DOCS = Path(__file__).parents[2] / "docs" / "parity.md"


@pytest.mark.parametrize("layout", IN_EVERY_RUN, ids=lambda layout: layout.name)
def test_trains_like_one_process(layout: Layout) -> None:
    result = run(layout)
    assert result.same_weights, "initial weights depend on the layout"
    assert result.same_on_all_ranks, "ranks report different losses"
    assert result.loss_difference < parity.LIMIT
    assert result.norm_difference < parity.LIMIT


def test_the_reference_learns() -> None:
    *losses, validation = (loss for loss, _ in one_process(Layout(1))[1])
    assert max(losses[-1], validation) < losses[0] - 0.5, "nothing was learnt, so equal losses say nothing"


def test_document_masks_change_the_loss() -> None:
    plain, masked = (one_process(Layout(1, document_mask=mask))[1] for mask in (False, True))
    assert plain[0] != masked[0], "the mask does nothing, so its layouts prove nothing"


def test_bf16_follows_fp32() -> None:
    curve = run(Layout(2, {"tp": 2}), "bf16").curve
    expected = one_process(Layout(1))[1]
    assert curve != expected, "bf16 asked for, fp32 ran"
    for (found, _), (loss, _) in zip(curve, expected, strict=True):
        assert found == pytest.approx(loss, rel=2e-2)


def test_the_documented_table_has_these_layouts() -> None:
    rows = [line.split("|")[1].strip() for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    assert rows[1:] == [layout.name for layout in LAYOUTS], "run `make parity`"
    assert parity.STEPS == 20
