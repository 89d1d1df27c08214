"""The k nearest rows by cosine similarity, from slices of any size, in bounded memory. Pure.

Scores are computed in float64 from the stored float32. The additions are the same wherever a row stands in its slice,
so equal vectors have equal scores, and every sink ranks the same rows in the same order.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..types import Vectors

# A float32 dot product of d numbers is wrong by at most d * 2**-24 of the vectors' norms: 1e-3 for d = 16,000,
# the most that pgvector stores. A row that scores lower than the worst of the best by more than this cannot be one.
ROUNDING = 1e-3


def check_query(vector: Vectors | Sequence[float], k: int) -> Vectors:
    """Return the query as float32[d]; raise ConfigError unless it is finite and not all zero, and k a positive int."""
    if not isinstance(k, int) or k < 1:
        raise ConfigError(f"k is {k!r}; it must be an int of at least 1")
    try:
        query = np.ascontiguousarray(vector, dtype=np.float32)
    except (TypeError, ValueError):
        raise ConfigError(f"the query is a {type(vector).__name__}, not a vector of numbers") from None
    if query.ndim != 1 or not np.isfinite(query).all() or not query.any():
        raise ConfigError(
            f"the query has shape {query.shape}; it must be one vector of finite numbers, not all of them zero"
        )
    return query


class Ranking:
    """The k best of the rows offered so far: best first, rows with equal scores in the order of their ids.

    A row of zeros has no direction and is never among them.
    """

    def __init__(self, query: Vectors, k: int) -> None:
        self._k = k
        self._query = query.astype(np.float64)
        self._query /= _lengths(self._query)
        self._rough = self._query.astype(np.float32)
        self._best: list[tuple[float, str]] = []  # (-score, id), at most k, ascending

    @property
    def dimensions(self) -> int:
        """The size of the query, and of every row that can be offered."""
        return len(self._query)

    def offer(self, ids: Sequence[str], rows: Vectors) -> None:
        """Rank n more rows, finite float32[n, d], among the best so far."""
        near = self._near(rows)
        scores = cosines(rows[near], self._query).tolist()
        new = ((-score, ids[row]) for row, score in zip(near.tolist(), scores, strict=True) if score == score)
        self._best = heapq.nsmallest(self._k, [*self._best, *new])

    def _near(self, rows: Vectors) -> npt.NDArray[np.intp]:
        """Return the positions of the rows that may be among the best, by scores computed in float32."""
        if len(self._best) < self._k:
            return np.arange(len(rows))
        with np.errstate(all="ignore"):
            rough = rows @ self._rough / np.sqrt(np.einsum("ij,ij->i", rows, rows))
        # a score that overflows float32 is NaN, for which the comparison is False, so its row is kept
        return np.flatnonzero(~(rough < -self._best[-1][0] - ROUNDING))

    def best(self) -> list[tuple[str, float]]:
        """Return id and score of each, best first."""
        return [(id, -negative) for negative, id in self._best]


def cosines(rows: Vectors, unit: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return float64[n] from -1 to 1: the cosine of each row of float32[n, d] with a vector of length 1."""
    wide = rows.astype(np.float64)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: a row of zeros has no direction
        scores: npt.NDArray[np.float64] = (wide * unit).sum(axis=-1) / _lengths(wide)
    return np.clip(scores, -1.0, 1.0)


def _lengths(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    # neither np.linalg.norm nor BLAS: the order of their additions depends on where a row stands
    lengths: npt.NDArray[np.float64] = np.sqrt((rows * rows).sum(axis=-1))
    return lengths
