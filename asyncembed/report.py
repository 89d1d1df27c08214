"""Results and reports of calls: the values that `embedder` and `pipeline` return."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from .errors import AllFailedError, SomeFailedError
from .types import Failure, RecordId, Vectors

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Usage:
    """The cost of a call so far; see `EmbeddingResult` for the fields."""

    requests: int = 0
    retries: int = 0
    tokens: int = 0
    tokens_known: bool = True
    """Whether the provider has reported the tokens of every successful request."""
    cache_hits: int = 0
    cache_misses: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a call, passed to `on_progress` after every batch and once at the end.

    Attributes:
        done: Texts or records that are finished: embedded (and stored), failed or skipped.
        total: All texts or records; None if the source has no known length.
        failed: Of `done`, those that failed.
        skipped: Of `done`, those that were stored already.
        tokens: Tokens billed so far, as reported by the provider.
        requests: HTTP requests sent so far, retries included.
        retries: Of `requests`, those that repeated an earlier one.
        elapsed_s: Seconds since the call began.
    """

    done: int
    total: int | None
    failed: int
    skipped: int
    tokens: int
    requests: int
    retries: int
    elapsed_s: float

    def __str__(self) -> str:
        total = "" if self.total is None else f" of {self.total:,}"
        rate = self.done / self.elapsed_s if self.elapsed_s > 0 else 0.0
        return (
            f"{self.done:,}{total} done ({self.skipped:,} skipped, {self.failed:,} failed), "
            f"{_number(self.tokens, 'token')} in {_number(self.requests, 'request')}, {rate:,.0f}/s"
        )


ProgressCallback: TypeAlias = Callable[[Progress], object]


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingResult:
    """The result of `embed`: one row per text, in the order of the texts.

    Attributes:
        embeddings: float32[n, d]; row i belongs to text i; a failed row is all NaN.
        failures: Index and error of each text that failed, in order.
        total_tokens: Tokens billed, as reported by the provider, summed.
        requests: Requests sent, retries included.
        retries: Of `requests`, those that repeated an earlier one.
        elapsed_s: Seconds the call took.
        cost_usd: List price of `total_tokens`; None if the price or the count is unknown.
        cache_hits: Texts found in the cache; duplicates count once.
        cache_misses: Texts looked up in the cache and not found.
    """

    embeddings: Vectors = field(repr=False)
    failures: tuple[Failure, ...]
    total_tokens: int
    requests: int
    retries: int
    elapsed_s: float
    cost_usd: float | None
    cache_hits: int = 0
    cache_misses: int = 0

    @property
    def failed_indices(self) -> list[int]:
        """The positions of the texts that failed, in order."""
        return [failure.index for failure in self.failures]

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, index: int) -> Vectors | None:
        """Return the vector float32[d] of text `index`, None if that text failed."""
        row: Vectors = self.embeddings[index]
        # vectors are finite (P3), so a leading NaN marks a failed row
        return None if not row.size or np.isnan(row[0]) else row

    def raise_for_failures(self) -> None:
        """Raise an error if any text failed.

        Raises:
            SomeFailedError: Some texts failed; an `AllFailedError` if all did. Its `.result` is this result.
        """
        if self.failures:
            raise failed(self)


def failed(result: EmbeddingResult) -> SomeFailedError:
    """Return the error for a result with failures: an `AllFailedError` if no text was embedded."""
    first, count = result.failures[0], len(result.failures)
    kind = AllFailedError if count == len(result) else SomeFailedError
    error = kind(
        f"{count} of {len(result)} texts were not embedded; the first of them, text {first.index}: "
        f"{type(first.error).__name__}: {first.error}"
    )
    error.result = result
    error.__cause__ = first.error
    return error


@dataclass(slots=True)
class IngestReport:
    """The result of `ingest`. Always `success_count + failed_count + skipped_count == seen`.

    Attributes:
        success_count: Records embedded and stored by this call.
        skipped_count: Records not sent: stored already, or replaced by a later record with the same id.
        failures: Index, id and error of each record that failed, in the order of the input.
        total_tokens: Tokens billed, as reported by the provider, summed.
        requests: Requests sent, retries included.
        retries: Of `requests`, those that repeated an earlier one.
        elapsed_s: Seconds the call took.
        cost_usd: List price of `total_tokens`; None if the price or the count is unknown.
        pruned_count: Rows deleted because the source no longer has their ids. None without `prune=True`, if the source
            was not read to its end, or if a record failed without an id.
        cache_hits: Texts found in the embedder's cache; duplicates that are read together count once.
        cache_misses: Texts looked up in the cache and not found.
    """

    success_count: int = 0
    skipped_count: int = 0
    failures: list[Failure] = field(default_factory=list)
    total_tokens: int = 0
    requests: int = 0
    retries: int = 0
    elapsed_s: float = 0.0
    cost_usd: float | None = None
    pruned_count: int | None = None
    cache_hits: int = 0
    cache_misses: int = 0

    @property
    def failed_count(self) -> int:
        """The number of records that failed."""
        return len(self.failures)

    @property
    def failed_ids(self) -> list[RecordId | None]:
        """The ids of the records that failed, in the order of the input; None where a record had none."""
        return [failure.id for failure in self.failures]

    @property
    def seen(self) -> int:
        """The number of records taken from the source."""
        return self.success_count + self.failed_count + self.skipped_count

    def __str__(self) -> str:
        cost = "" if not self.cost_usd else f", ${self.cost_usd:.4f}"
        pruned = "" if self.pruned_count is None else f", {self.pruned_count:,} pruned"
        tokens, requests = _number(self.total_tokens, "token"), _number(self.requests, "request")
        return (
            f"{self.success_count:,} stored, {self.skipped_count:,} skipped, {self.failed_count:,} failed{pruned}; "
            f"{tokens} in {requests}{cost}, {self.elapsed_s:.1f} s"
        )


@dataclass(frozen=True, slots=True)
class Check:
    """The result of `Embedder.check`: key, address and model work.

    Attributes:
        model: The requested model.
        dimensions: The size of its vectors.
        tokens: Tokens billed for the check; None if the provider did not report them.
        latency_s: Seconds the check took, including the wait for a slot.
    """

    model: str
    dimensions: int
    tokens: int | None
    latency_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The result of `Embedder.plan`: an estimate, for which nothing was sent.

    Attributes:
        texts: Texts that would be sent; duplicates that are read together count once.
        failures: Texts that would fail before they are sent.
        requests: HTTP requests, without retries.
        tokens: Tokens that would be billed; an upper bound unless `exact`.
        exact: Whether the tokens were counted with the model's own tokenizer.
        seconds: Seconds needed within the embedder's limits per minute; None if it has none.
        cost_usd: List price of `tokens`; None if unknown.
    """

    texts: int
    failures: tuple[Failure, ...]
    requests: int
    tokens: int
    exact: bool
    seconds: float | None
    cost_usd: float | None

    def __str__(self) -> str:
        about = "" if self.exact else "at most "
        cost = "price unknown" if self.cost_usd is None else f"{about}${self.cost_usd:.4f}"
        seconds = "" if self.seconds is None else f", {self.seconds:.0f} s at your limits"
        tokens, requests = _number(self.tokens, "token"), _number(self.requests, "request")
        return f"{_number(self.texts, 'text')}, {about}{tokens}, {requests}, {cost}{seconds}"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def reporter(on_progress: ProgressCallback | None) -> ProgressCallback:
    """Return a function that calls the progress callback. If that raises, it is logged and not called again.

    Raises:
        TypeError: It is not callable, or is a coroutine function.
    """
    if on_progress is not None and not callable(on_progress):
        raise TypeError(f"on_progress is {type(on_progress).__name__}; it must be a function")
    if inspect.iscoroutinefunction(on_progress):
        raise TypeError("on_progress is a coroutine function, which would not be awaited; pass a function")
    broken = on_progress is None

    def report(progress: Progress) -> None:
        nonlocal broken
        if broken or on_progress is None:
            return
        try:
            on_progress(progress)
        except Exception:
            broken = True
            logger.exception("on_progress raised; it is not called again in this run")

    return report
