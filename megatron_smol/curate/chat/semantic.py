"""Near equal in meaning: rows whose embedding is close to that of one before them are left out.

MagPie-Ultra was embedded with gte-large-en-v1.5 and looked at through its nearest neighbours; the threshold is not public.
Features are those of `smol classifier`: a Hugging Face encoder's first token (as gte's), or hashed words and word pairs,
which find texts of nearly the same words and need no model. Every row is compared with every row that stayed, in blocks:
one matrix product each, so the time grows with the square of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smol.curate.classifier import Features, Settings

_BLOCK = 2048  # rows compared at once
_ROUNDING = 1e-5  # a text and its copy: 0.9999999 in 32 bits


def near_equal(texts: Iterator[str], encoder: str | None, threshold: float) -> Iterator[bool]:
    """For each text whether the cosine with one that stayed is `threshold` or more; the first of a group stays."""
    from sklearn.preprocessing import normalize

    features = Features(Settings(encoder=encoder))
    least = threshold - _ROUNDING
    stayed: list[Any] = []  # blocks [rows, features], each row of length 1
    while block := list(islice(texts, _BLOCK)):
        rows = normalize(features(block))
        drop = np.zeros(len(block), bool)
        for before in stayed:
            drop |= _dense(rows @ before.T).max(axis=1) >= least
        inside = _dense(rows @ rows.T) >= least
        for number in range(len(block)):  # in order: one that is dropped drops no other
            drop[number] |= bool((inside[number, :number] & ~drop[:number]).any())
        if not drop.all():
            stayed.append(rows[~drop])
        yield from drop.tolist()


def _dense(product: Any) -> NDArray[np.float64]:
    return np.asarray(product.todense() if hasattr(product, "todense") else product)
