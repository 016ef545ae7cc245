from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def blend_period(numerators: Sequence[int]) -> tuple[NDArray[np.uint16], NDArray[np.int32]]: ...
def blend_lookup(
    period_source: NDArray[np.uint16],
    period_ordinal: NDArray[np.int32],
    numerators: Sequence[int],
    start: int,
    stop: int,
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]: ...
def build_blending_indices(
    weights: Sequence[float], size: int
) -> tuple[NDArray[np.int16], NDArray[np.int64]]: ...
def lookup_windows(
    layouts: Sequence[tuple[int, int, int, int]],
    source: NDArray[np.uint16],
    position: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
def locate_windows(
    layout: tuple[int, int, int, int], epoch: NDArray[np.int64], window: NDArray[np.int64]
) -> NDArray[np.int64]: ...
def spell(
    ids: NDArray[np.uint16] | NDArray[np.int32], spelling: bytes, starts: NDArray[np.int64]
) -> bytes: ...
def permute(size: int, key: int, index: NDArray[np.int64], inverse: bool = False) -> NDArray[np.int64]: ...
def minhash_keys(
    texts: list[bytes], ngram: int, bands: int, rows: int, seed: int
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]: ...
