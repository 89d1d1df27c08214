"""Where outcomes go: into the rows of a result, or back into the order of a stream."""

from __future__ import annotations

import numpy as np

from ..batching.batch import Outcome
from ..concurrency import in_thread_if
from ..errors import AsyncEmbedError
from ..report import EmbeddingResult, ProgressCallback, reporter
from ..sending.run import Run
from ..types import Failure, Vectors

# Copied in 0.1 ms.
WORTH_A_THREAD_BYTES = 512 * 1024


class Results:
    """The rows of one `embed` call, as they come in."""

    def __init__(self, count: int, run: Run, on_progress: ProgressCallback | None) -> None:
        self._count = count
        self._run = run
        self._report = reporter(on_progress)
        self._embeddings: Vectors | None = None
        self._errors: dict[int, AsyncEmbedError] = {}
        self._done = np.zeros(count, np.bool_)
        self._copied = 0

    async def deliver(self, outcome: Outcome) -> None:
        """Put the vectors into their rows, and count."""
        if outcome.texts:
            if self._embeddings is None:  # not in the thread: two outcomes would make two of it
                self._embeddings = np.empty((self._count, outcome.vectors.shape[1]), np.float32)
            rows = sum(len(text.indices) for text in outcome.texts)
            is_work = rows * outcome.vectors[0].nbytes > WORTH_A_THREAD_BYTES
            await in_thread_if(is_work, self._copy, self._embeddings, outcome)
            self._copied += rows
        for text, error in outcome.failed:
            self._errors.update(dict.fromkeys(text.indices, error))
        done = self._copied + len(self._errors)
        self._report(self._run.progress(done, self._count, len(self._errors)))

    def _copy(self, embeddings: Vectors, outcome: Outcome) -> None:
        rows = [text.indices[0] for text in outcome.texts]
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
            embeddings = embeddings.copy()  # a thread that no task waits for may still be copying into the other
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
