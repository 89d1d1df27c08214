"""Where outcomes go: into the rows of a result, or back into the order of a stream."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..batching.batch import Outcome
from ..batching.texts import Item
from ..concurrency import in_thread_if
from ..errors import AsyncEmbedError
from ..report import EmbeddingResult, ProgressCallback, reporter
from ..sending.run import Run
from ..types import Failure, Place, Vectors

# Copied in 0.1 ms.
WORTH_A_THREAD_BYTES = 512 * 1024


class Results:
    """The rows of one `embed` call, as they come in."""

    def __init__(self, count: int, run: Run, on_progress: ProgressCallback | None) -> None:
        self._count = count
        self._run = run
        self._report = reporter(on_progress)
        self._embeddings: Vectors | None = None
        self._is_settled = False
        """Something was delivered. Before that, the size of the rows may be that of a reply which was then refused."""
        self._errors: dict[int, AsyncEmbedError] = {}
        self._done = np.zeros(count, np.bool_)
        self._placed = 0
        run.place_for = self._place_for

    def _place_for(self, items: Sequence[Item]) -> Place | None:
        """Let whole texts that stand side by side be put into their rows as they come; `finish` clears the others'."""
        rows = [row for item in items if item.text.mean is None for row in item.text.indices[:1]]
        first = rows[0] if rows else 0
        if rows != list(range(first, first + len(items))):
            return None

        def place(dimensions: int) -> Vectors | None:
            embeddings = self._rows(dimensions)
            return embeddings[first : first + len(items)] if embeddings.shape[1] == dimensions else None

        return place

    def _rows(self, dimensions: int) -> Vectors:
        is_wrong = self._embeddings is not None and self._embeddings.shape[1] != dimensions
        if self._embeddings is None or (is_wrong and not self._is_settled):
            self._embeddings = np.empty((self._count, dimensions), np.float32)
        return self._embeddings

    async def deliver(self, outcome: Outcome) -> None:
        """Put the vectors into their rows, and count."""
        if outcome.texts:
            embeddings = self._rows(outcome.vectors.shape[1])  # not in a thread: two outcomes would make two of it
            self._is_settled = True
            placed = sum(len(text.indices) for text in outcome.texts)
            copied = placed - (len(outcome.texts) if outcome.vectors.base is embeddings else 0)
            is_work = copied * outcome.vectors[0].nbytes > WORTH_A_THREAD_BYTES
            await in_thread_if(is_work, self._place, embeddings, outcome)
            self._placed += placed
        for text, error in outcome.failed:
            self._errors.update(dict.fromkeys(text.indices, error))
        done = self._placed + len(self._errors)
        self._report(self._run.progress(done, self._count, len(self._errors)))

    def _place(self, embeddings: Vectors, outcome: Outcome) -> None:
        rows = [text.indices[0] for text in outcome.texts]
        if outcome.vectors.base is not embeddings:  # else they came to their places
            embeddings[rows] = outcome.vectors
        self._done[rows] = True
        for text, vector in zip(outcome.texts, outcome.vectors, strict=True):
            if len(text.indices) > 1:
                others = list(text.indices[1:])
                embeddings[others] = vector
                self._done[others] = True

    def finish(
        self, dimensions: int | None, cost_usd: float | None, stopped_by: AsyncEmbedError | None
    ) -> EmbeddingResult:
        """Return the result; rows that did not come are NaN and failed, for the reason the run was stopped."""
        missing = np.flatnonzero(~self._done)
        embeddings = self._embeddings
        if embeddings is None:
            embeddings = np.empty((self._count, dimensions or 0), np.float32)
        elif stopped_by is not None:
            embeddings = embeddings.copy()  # a thread that nobody waits for may still be placing rows in the other
        embeddings[missing] = np.nan
        unfinished = stopped_by or AsyncEmbedError("it was not finished")
        run = self._run
        return EmbeddingResult(
            embeddings,
            tuple(Failure(index, self._errors.get(index, unfinished)) for index in missing.tolist()),
            run.tokens,
            run.requests,
            run.retries,
            run.elapsed_s,
            cost_usd,
            run.cache_hits,
            run.cache_misses,
        )
