"""What one request carries, and what becomes of it: a batch with its past, parts of it, and outcomes. Pure."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from ..errors import AsyncEmbedError
from ..types import Reply, Vectors
from .texts import Item, Text


@dataclass(frozen=True, slots=True)
class Outcome:
    """Texts that are done: row i of `vectors`, float32[n, d], belongs to `texts[i]`; `failed` ones have an error."""

    texts: Sequence[Text] = ()
    vectors: Vectors = field(default_factory=lambda: np.empty((0, 0), np.float32))
    failed: Sequence[tuple[Text, AsyncEmbedError]] = ()


@dataclass(slots=True, eq=False)
class Batch:
    """What one request carries, and its past."""

    items: list[Item]
    sent: bool = False
    failures: int = 0
    alone: int = 0
    """Of `failures`, the last ones in a row between which nobody else got through."""
    probes: int = 0
    """How many of its texts were sent alone in its place,"""
    suspect: Item | None = None
    """and the last of them that failed."""
    in_doubt: bool = False
    """A single text failed as it did: it may be the provider, so only single texts are sent until one passes."""
    successes_at_first: int | None = None
    """The provider's count of successes when these texts first failed,"""
    successes_at_last: int | None = None
    """and when they last did."""

    @property
    def weight(self) -> int:
        return sum(item.weight for item in self.items)

    def failed(self, successes: int) -> None:
        """Note that an attempt failed, when the provider had had so many successes with anybody."""
        if self.successes_at_first is None:
            self.successes_at_first = successes
        self.alone = self.alone + 1 if successes == self.successes_at_last else 1
        self.failures += 1
        self.successes_at_last = successes

    def passed_since(self, successes: int) -> bool:
        """Tell whether anybody has passed since these texts first failed; a single one has to fail again after it."""
        if len(self.items) > 1:
            return successes > (self.successes_at_first or 0)
        return successes > (self.successes_at_last or 0) or (self.failures > 1 and self.alone == 1)

    def to_probe(self) -> Item:
        """Return a text of its own to be sent alone: the first, the last, the second, and so on."""
        index = self.probes // 2 if self.probes % 2 == 0 else -1 - self.probes // 2
        self.probes += 1
        return self.items[index % len(self.items)]

    def part(self, items: list[Item]) -> Batch:
        """Return a batch of some of its items: its past is theirs, but a single text is given all its attempts."""
        if len(items) == 1:
            return Batch(items, sent=self.sent)
        return replace(self, items=items, probes=0, suspect=None, in_doubt=False)

    def parts(self) -> list[Batch]:
        """Return two halves; or the text that failed alone, and the others, if one of them passed."""
        items = self.items
        if self.suspect is None:
            middle = (len(items) + 1) // 2
            return [self.part(some) for some in (items[:middle], items[middle:]) if some]
        others = [item for item in items if item is not self.suspect]
        return [self.part([self.suspect]), *([self.part(others)] if others else [])]


def settled(batch: Batch, reply: Reply) -> Outcome:
    """Return what a reply finishes: whole texts, and long ones whose last piece this was."""
    if all(item.text.mean is None for item in batch.items):
        return Outcome([item.text for item in batch.items], reply.vectors)
    texts: list[Text] = []
    rows: list[Vectors] = []
    errors: list[tuple[Text, AsyncEmbedError]] = []
    for item, vector in zip(batch.items, reply.vectors, strict=True):
        mean = item.text.mean
        if mean is None:
            texts.append(item.text)
            rows.append(vector)
            continue
        mean.add(vector, item.tokens)
        if mean.missing == 0 and mean.error is not None:
            errors.append((item.text, mean.error))
        elif mean.missing == 0:
            texts.append(item.text)
            rows.append(mean.vector())
    vectors = np.stack(rows) if rows else np.empty((0, reply.vectors.shape[1]), np.float32)
    return Outcome(texts, vectors, errors)


def failed(batch: Batch, error: AsyncEmbedError) -> Outcome:
    """Fail a batch's texts; a long one when its last piece is done, so that it is delivered once."""
    errors: list[tuple[Text, AsyncEmbedError]] = []
    for item in batch.items:
        mean = item.text.mean
        if mean is not None:
            mean.fail(error)
        if mean is None or mean.missing == 0:
            errors.append((item.text, error if mean is None else mean.error or error))
    return Outcome(failed=errors)


Deliver: TypeAlias = Callable[[Outcome], Awaitable[None]]
"""Takes an outcome, while the slot is held: what is not stored yet counts as in flight."""
