"""Finds the text that makes a batch fail, and does not mistake an outage for a bad text.

A batch that keeps failing is split until the bad text is alone, and only that text fails. Before such a batch is split,
or a single text rejected, another request must succeed. If none does, a probe is sent: a single text that succeeded
before in this call or, without one, a text of the batch. Until a probe succeeds, it may be an outage, and only probes
are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..batching.batch import Batch
from ..batching.texts import Input, Text
from .pacing import RateLimiter
from .retry import History


@dataclass(slots=True, eq=False)
class FailureRecord:
    """The failed attempts of one batch."""

    failures: int = 0
    consecutive_failures: int = 0
    """The latest failures, between which no other request succeeded."""
    probes: int = 0
    """How many of its texts were sent alone, in its place."""
    suspect: Input | None = None
    """The latest of these texts that failed."""
    isolating: bool = False
    """Probes failed, too, so it may be an outage: only probes are sent until one succeeds."""
    successes_at_first: int = 0
    """The rate limiter's count of successes when the batch first failed."""
    successes_at_last: int | None = None
    """The same when it last failed; None before it has failed."""

    def add(self, successes: int) -> None:
        """Record a failure, at this count of successes of all requests."""
        if self.successes_at_last is None:
            self.successes_at_first = successes
        self.consecutive_failures = self.consecutive_failures + 1 if successes == self.successes_at_last else 1
        self.failures += 1
        self.successes_at_last = successes

    def others_succeeded_since(self, inputs: int, successes: int) -> bool:
        """Return whether others succeeded since the first failure; a single text must have failed again after that."""
        if inputs > 1:
            return successes > self.successes_at_first
        return successes > (self.successes_at_last or 0) or (self.failures > 1 and self.consecutive_failures == 1)

    def for_part(self, inputs: Sequence[Input]) -> FailureRecord:
        """Return the record of a part of the batch. A single text gets all attempts again."""
        if len(inputs) == 1:
            return FailureRecord()
        return replace(self, probes=0, suspect=None, isolating=False)


@dataclass(slots=True, eq=False)
class Isolation:
    """The good and bad texts that one call has found."""

    good_batch: Batch | None = None
    """The first batch that succeeded."""
    rejections: int = 0
    """How many single texts were rejected."""

    def history(self, batch: Batch, record: FailureRecord, rate: RateLimiter) -> History:
        """Return the history of a failed batch, for `retry.decide`."""
        inputs = len(batch.inputs)
        return History(
            inputs=inputs,
            failures=record.failures,
            consecutive_failures=record.consecutive_failures,
            healthy=record.others_succeeded_since(inputs, rate.successes) and not rate.looks_down,
            probed=record.isolating,
            has_known_good=self.good_batch is not None,
            rejections=self.rejections if self.good_batch is None else 0,
            refusals=max(1, rate.refusals),
        )

    @property
    def probes_needed(self) -> int:
        """How many probes must fail: two if they are the batch's own texts, since one may be the bad text itself."""
        return 2 if self.good_batch is None else 1

    def next_probe(self, batch: Batch, record: FailureRecord) -> tuple[Batch, bool]:
        """Return a single text to send in the batch's place, and whether it belongs to the batch.

        If a short text that the provider has embedded now fails, the provider is down. Without one, texts of the batch
        are taken from both ends in turn: the first, the last, the second, and so on.
        """
        if self.good_batch is not None:
            good = min(self.good_batch.inputs, key=lambda each: len(each.content))
            return Batch([Text(good.content, [], tokens=good.tokens, weight=good.weight)], sent=True), False
        index = record.probes // 2 if record.probes % 2 == 0 else -1 - record.probes // 2
        record.probes += 1
        return Batch([batch.inputs[index % len(batch.inputs)]], sent=True), True


def split_batch(batch: Batch, record: FailureRecord) -> list[tuple[Batch, FailureRecord]]:
    """Split a batch in two: its halves or, after one of its texts failed as a probe, that text and the others."""
    inputs = batch.inputs
    if record.suspect is None:
        middle = (len(inputs) + 1) // 2
        parts = [inputs[:middle], inputs[middle:]]
    else:
        parts = [[record.suspect], [each for each in inputs if each is not record.suspect]]
    return [(batch.part(part), record.for_part(part)) for part in parts if part]
