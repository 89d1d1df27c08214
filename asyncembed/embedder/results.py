"""Collects the outcomes of an `embed` call into the rows of an `EmbeddingResult`."""

from __future__ import annotations

import numpy as np

from ..batching.batch import Outcome
from ..concurrency import run_in_thread_if
from ..errors import AsyncEmbedError
from ..report import EmbeddingResult, ProgressCallback, reporter
from ..sending.context import CallContext
from ..types import Failure, Vectors

# More bytes than this are copied in a thread. These take 0.1 ms.
WORTH_A_THREAD_BYTES = 512 * 1024


class Results:
    """The receiver of one `embed` call: collects its rows."""

    def __init__(self, count: int, call: CallContext, on_progress: ProgressCallback | None) -> None:
        self._count = count
        self._call = call
        self._report = reporter(on_progress)
        self._embeddings: Vectors | None = None
        self._errors: dict[int, AsyncEmbedError] = {}
        self._done = np.zeros(count, np.bool_)
        self._copied = 0

    async def deliver(self, outcome: Outcome) -> None:
        """Copy the vectors into their rows, and report the progress."""
        if outcome.texts:
            if self._embeddings is None:  # not in the thread: two concurrent outcomes would create two arrays
                self._embeddings = np.empty((self._count, outcome.vectors.shape[1]), np.float32)
            rows = sum(len(text.indices) for text in outcome.texts)
            is_work = rows * outcome.vectors[0].nbytes > WORTH_A_THREAD_BYTES
            await run_in_thread_if(is_work, self._copy, self._embeddings, outcome)
            self._copied += rows
        for text, error in outcome.failed:
            self._errors.update(dict.fromkeys(text.indices, error))
        done = self._copied + len(self._errors)
        self._report(self._call.progress(done, self._count, len(self._errors)))

    def _copy(self, embeddings: Vectors, outcome: Outcome) -> None:
        rows = [text.indices[0] for text in outcome.texts]
        side_by_side = range(rows[0], rows[0] + len(rows))
        # copying to a slice, where possible, takes half the time
        target = slice(side_by_side.start, side_by_side.stop) if rows == list(side_by_side) else rows
        embeddings[target] = outcome.vectors
        self._done[target] = True
        for text, row in zip(outcome.texts, rows, strict=True):
            if len(text.indices) > 1:
                duplicates = list(text.indices[1:])
                embeddings[duplicates] = embeddings[row]
                self._done[duplicates] = True

    def finish(
        self, dimensions: int | None, cost_usd: float | None, stopped_by: AsyncEmbedError | None
    ) -> EmbeddingResult:
        """Return the result. Missing rows are NaN and count as failed, with the error that stopped the call."""
        missing = np.flatnonzero(~self._done)
        embeddings = self._embeddings
        if embeddings is None:
            embeddings = np.empty((self._count, dimensions or 0), np.float32)
        elif stopped_by is not None:
            embeddings = embeddings.copy()  # an abandoned thread may still be writing to the original
        embeddings[missing] = np.nan
        unfinished = stopped_by or AsyncEmbedError("it was not finished")
        usage = self._call.usage
        return EmbeddingResult(
            embeddings,
            tuple(Failure(index, self._errors.get(index, unfinished)) for index in missing.tolist()),
            usage.tokens,
            usage.requests,
            usage.retries,
            self._call.elapsed_s,
            cost_usd,
            usage.cache_hits,
            usage.cache_misses,
        )
