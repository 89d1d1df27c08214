"""A batch of inputs, the outcome of its texts, and the interface of its receiver. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..errors import AsyncEmbedError
from ..types import Reply, Vectors
from .packing import Limits, Packer
from .texts import Input, Text


@dataclass(slots=True, eq=False)
class Batch:
    """The inputs of one request."""

    inputs: list[Input]
    sent: bool = False
    """Whether the inputs were sent before, so that sending them again is a retry."""

    @property
    def weight(self) -> int:
        """The sum of the inputs' weights, in tokens."""
        return sum([each.weight for each in self.inputs])

    def part(self, inputs: list[Input]) -> Batch:
        """Return a batch of some of this batch's inputs."""
        return Batch(inputs, self.sent)

    def fits(self, limits: Limits) -> bool:
        """Return whether one request may hold the batch. A single input cannot be made smaller, so it always fits."""
        count = len(self.inputs)
        return count == 1 or (count <= limits.inputs and self.weight <= limits.tokens)

    def repacked(self, limits: Limits) -> list[Batch]:
        """Return the inputs in batches that fit these limits, which were learned after this batch was packed."""
        packer: Packer[Input] = Packer(limits.inputs, limits.tokens, 1)
        full = [inputs for each in self.inputs if (inputs := packer.add(each, each.weight))]
        return [self.part(inputs) for inputs in (*full, *packer.flush())]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Texts that are done: row i of `vectors`, float32[n, d], belongs to `texts[i]`; `failed` has texts and errors."""

    texts: Sequence[Text] = ()
    vectors: Vectors = field(default_factory=lambda: np.empty((0, 0), np.float32))
    failed: Sequence[tuple[Text, AsyncEmbedError]] = ()


class Receiver(Protocol):
    """Receives the outcomes of one call."""

    async def deliver(self, outcome: Outcome) -> None:
        """Process an outcome. The batch holds its concurrency slot until this returns.

        Raises:
            Exception: It cannot be processed; the call ends with this error.
        """
        ...


def outcome_of_reply(batch: Batch, reply: Reply) -> Outcome:
    """Return the texts that a reply finishes: a long text is finished with its last piece."""
    if all(each.text.pieces is None for each in batch.inputs):
        return Outcome([each.text for each in batch.inputs], reply.vectors)
    texts: list[Text] = []
    rows: list[Vectors] = []
    errors: list[tuple[Text, AsyncEmbedError]] = []
    for each, vector in zip(batch.inputs, reply.vectors, strict=True):
        pieces = each.text.pieces
        if pieces is None:
            texts.append(each.text)
            rows.append(vector)
            continue
        pieces.add(vector, each.tokens)
        if pieces.missing == 0 and pieces.error is not None:
            errors.append((each.text, pieces.error))
        elif pieces.missing == 0:
            texts.append(each.text)
            rows.append(pieces.vector())
    vectors = np.stack(rows) if rows else np.empty((0, reply.vectors.shape[1]), np.float32)
    return Outcome(texts, vectors, errors)


def outcome_of_error(batch: Batch, error: AsyncEmbedError) -> Outcome:
    """Return the batch's texts as failed. A long text fails with its last piece, so that it is delivered once."""
    errors: list[tuple[Text, AsyncEmbedError]] = []
    for each in batch.inputs:
        pieces = each.text.pieces
        if pieces is not None:
            pieces.fail(error)
        if pieces is None or pieces.missing == 0:
            errors.append((each.text, error if pieces is None else pieces.error or error))
    return Outcome(failed=errors)
