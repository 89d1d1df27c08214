"""The results and reports of calls: plain values, filled by `embedder` and `pipeline`."""

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
    """What a call has cost so far.

    Attributes:
        requests: Requests sent, retries included.
        retries: Of `requests`, those that repeated one.
        tokens: Tokens billed, as the provider said.
        tokens_known: Whether the provider has said so for each successful request.
        cache_hits: Texts whose vectors were in the cache; duplicates count once.
        cache_misses: Texts that were looked up in the cache and not found.
    """

    requests: int = 0
    retries: int = 0
    tokens: int = 0
    tokens_known: bool = True
    cache_hits: int = 0
    cache_misses: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is. Handed to `on_progress` after every batch, and once at the end.

    Attributes:
        done: Texts or records finished in any way: embedded (and stored), failed or skipped.
        total: How many there are; None while an iterable has not told its length.
        failed: Of `done`, those that failed.
        skipped: Of `done`, those that were stored already.
        tokens: Tokens billed so far, as the provider said.
        requests: HTTP requests sent so far, retries included.
        retries: Of `requests`, those that repeated one.
        elapsed_s: Seconds since the run began.
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
    """What `embed` returns: one row a text, in the order of the texts.

    Attributes:
        embeddings: float32[n, d]; row i belongs to text i; a failed row is all NaN.
        failures: Index and error of each text that failed, in order.
        total_tokens: Tokens billed: the sum of what the provider said.
        requests: Requests sent, retries included.
        retries: Of `requests`, those that repeated one.
        elapsed_s: Seconds the call took.
        cost_usd: List price of `total_tokens`; None if the price or the count is unknown.
        cache_hits: Texts whose vectors were there; equal ones count once.
        cache_misses: Texts that were looked up in vain.
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
        # a vector that was handed out is finite (P3), so a NaN in front means a failed row
        return None if not row.size or np.isnan(row[0]) else row

    def raise_for_failures(self) -> None:
        """Do nothing if every text was embedded.

        Raises:
            SomeFailedError: Some texts failed; `AllFailedError` if all did. Its `result` is this one.
        """
        if self.failures:
            raise failed(self)


def failed(result: EmbeddingResult) -> SomeFailedError:
    """Build the error for a result with failures: `AllFailedError` if no text was embedded."""
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
    """What `ingest` did. Always `success_count + failed_count + skipped_count == seen`.

    Attributes:
        success_count: Records embedded and stored by this run.
        skipped_count: Records not sent: stored already, or replaced by a later record with the same id.
        failures: Each record that failed: its index, its id, and why; in the order of the input.
        total_tokens: Tokens billed: the sum of what the provider said.
        requests: Requests sent, retries included.
        retries: Of `requests`, those that repeated one.
        elapsed_s: Seconds the run took.
        cost_usd: List price of `total_tokens`; None if the price or the count is unknown.
        pruned_count: Rows deleted because the source no longer has them; None unless that was asked for and the
            pass was complete.
        cache_hits: Texts whose vectors were in the embedder's cache; equal ones that are read together count once.
        cache_misses: Texts that were looked up there in vain.
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
        """How many records failed."""
        return len(self.failures)

    @property
    def failed_ids(self) -> list[RecordId | None]:
        """The ids of the records that failed, in the order of the input; None where a record had none."""
        return [failure.id for failure in self.failures]

    @property
    def seen(self) -> int:
        """How many records were taken from the source."""
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
    """What `check` proved.

    Attributes:
        model: The model's name, as it was asked for.
        dimensions: The size of its vectors.
        tokens: Tokens billed for it; None if the provider did not say.
        latency_s: Seconds it took, waiting for its turn included.
    """

    model: str
    dimensions: int
    tokens: int | None
    latency_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What `plan` foresees; nothing was sent.

    Attributes:
        texts: How many texts would be sent (duplicates once).
        failures: Texts that would fail before they are sent.
        requests: HTTP requests, none of them repeated.
        tokens: Tokens to be billed; an upper bound unless `exact`.
        exact: Whether the tokens were counted with the model's own tokenizer.
        seconds: Time needed at the given limits per minute; None if there are none.
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
    """Guard a progress callback: if it raises, that is logged, and it is not called again.

    Raises:
        TypeError: It cannot be called, or has to be awaited.
    """
    if on_progress is not None and not callable(on_progress):
        raise TypeError(f"on_progress is {type(on_progress).__name__}; it must be a function")
    if inspect.iscoroutinefunction(on_progress):
        raise TypeError("on_progress is a coroutine function, which nobody would await; pass a function")
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
