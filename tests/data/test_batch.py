"""Micro-batches: where documents lie, positions, and the leak law for the data side."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smol.data.batch import IGNORED, Documents, MicroBatch
from tests.helpers import document_mask

CPU = torch.device("cpu")
EOD = 0
# Ids 0 to 3, so that documents are short and some are nothing but their end.
WINDOWS = st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(0, 10**6)).map(
    lambda drawn: np.random.default_rng(drawn[2]).integers(0, 4, (drawn[0], drawn[1] + 1)).astype(np.uint16)
)


@settings(max_examples=60, deadline=None)
@given(windows=WINDOWS)
def test_documents_positions_and_mask_agree_with_the_tokens(windows: np.ndarray) -> None:
    batch = MicroBatch.of(windows, CPU, mask_eod=EOD)
    length = batch.tokens.size(1)
    assert batch.documents is not None
    positions, numbers, bounds = [], [], [0]
    number = 0
    for row in batch.tokens.tolist():
        place = 0
        for j, token in enumerate(row):
            positions.append(place)
            numbers.append(number)
            place += 1
            if token == EOD or j == length - 1:
                place, number = 0, number + 1
                bounds.append(len(positions))
    assert batch.documents.cu_seqlens.tolist() == bounds
    assert batch.documents.cu_seqlens.dtype == torch.int32
    assert batch.documents.max_seqlen == max(np.diff(bounds))
    assert batch.positions.flatten().tolist() == positions
    assert batch.documents.numbers().flatten().tolist() == numbers
    assert batch.mask is not None and torch.equal(batch.mask, document_mask(batch.tokens, EOD))
    assert batch.loss_mask.all() and batch.real_tokens is None


def test_without_a_document_mask_a_window_is_one_stretch() -> None:
    batch = MicroBatch.of(np.array([[5, 0, 6, 7], [0, 0, 0, 0]]), CPU)
    assert batch.mask is None and batch.documents is None
    assert batch.positions.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_ignored_labels_are_marked_and_counted() -> None:
    ignored = np.array([[False, True, False], [True, True, True]])
    batch = MicroBatch.of(np.array([[5, 0, 6, 7], [1, 2, 3, 4]], np.int32), CPU, ignored=ignored)
    assert batch.labels.tolist() == [[0, IGNORED, 7], [IGNORED] * 3]
    assert batch.tokens.tolist() == [[5, 0, 6], [1, 2, 3]]
    assert batch.loss_mask.tolist() == (~ignored).tolist() and batch.real_tokens == 2
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_changing_one_document_changes_nothing_that_another_sees(data: st.DataObject, seed: int) -> None:
    """The leak law of the data: tokens, positions, mask, lengths and loss mask of document B."""
    random = np.random.default_rng(seed)
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    one = np.concatenate([[*random.integers(1, 9, size - 1), EOD] for size in sizes] + [[7]])
    changed = data.draw(st.integers(0, len(sizes) - 1))
    starts = np.cumsum([0, *sizes])
    other = one.copy()
    # Other tokens of the same number, ends of documents among them: A may even fall into pieces.
    begin, end = starts[changed], starts[changed + 1] - 1
    other[begin:end] = random.integers(0, 9, end - begin)
    before, after = (MicroBatch.of(row[None], CPU, mask_eod=EOD) for row in (one, other))
    assert before.documents is not None and after.documents is not None
    for number in range(len(sizes)):
        if number == changed:
            continue
        span = slice(int(starts[number]), int(starts[number + 1]))
        for name in ("tokens", "labels", "positions", "loss_mask"):
            # The last label of the document before A is A's first token: it is A's text that is learnt there.
            stop = span.stop - (name == "labels" and number == changed - 1)
            assert torch.equal(
                getattr(before, name)[0, span.start : stop], getattr(after, name)[0, span.start : stop]
            )
        assert before.mask is not None and after.mask is not None
        assert torch.equal(before.mask[0, 0, span], after.mask[0, 0, span])
        assert not after.mask[0, 0, span, begin:end].any()
        for batch in (before, after):
            bounds = batch.documents.cu_seqlens.tolist()  # type: ignore[union-attr]
            assert (span.start in bounds) and (span.stop in bounds)
            assert bounds.index(span.stop) == bounds.index(span.start) + 1


def test_lengths_are_made_without_asking_for_them_all() -> None:
    documents = Documents.of(np.array([[1, 1, 0, 1], [0, 1, 1, 1]]), EOD)
    assert documents.cu_seqlens.tolist() == [0, 3, 4, 5, 8] and documents.max_seqlen == 3


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_any_type_of_ids(dtype: type) -> None:
    batch = MicroBatch.of(np.array([[1, 65_000 % np.iinfo(dtype).max, 3]], dtype), CPU)
    assert batch.tokens.tolist() == [[1, 65_000]] and batch.labels.tolist() == [[65_000, 3]]
