"""`plan`: counts and packs texts as `embed` does, but sends nothing."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field

from ..batching.packing import Limits, Packer
from ..batching.texts import TooLong, portions, prepare_inputs, unique
from ..batching.tokens import TokenCounter
from ..sources.records import AnyIterable, checked_records, in_chunks
from ..types import Failure


@dataclass(slots=True)
class Counted:
    """Texts that would be sent, their tokens and requests, and the texts that would fail before they are sent."""

    inputs: int = 0
    tokens: int = 0
    requests: int = 0
    failures: list[Failure] = field(default_factory=list)


async def count_up(texts: AnyIterable, counter: TokenCounter, limits: Limits, too_long: TooLong) -> Counted:
    """Count texts, or records in any of their forms. Memory is bounded, and tokens are counted in threads."""
    packer: Packer[None] = Packer(limits.inputs, limits.tokens)
    found, count = Counted(), 0
    async with aclosing(in_chunks(texts)) as slices:
        async for some in slices:
            read = list(checked_records(count, some))
            count += len(some)
            found.failures.extend(Failure(index, error) for index, _, error in read if error is not None)
            waiting = unique((index, record.text) for index, record, error in read if error is None)
            for part in portions(waiting):
                items, bad = await asyncio.to_thread(prepare_inputs, part, counter, limits, too_long)
                found.failures.extend(Failure(index, error) for text, error in bad for index in text.indices)
                found.requests += sum(packer.add(None, item.weight) is not None for item in items)
                found.tokens += sum(item.tokens for item in items)
                found.inputs += len(part) - len(bad)
    found.requests += len(packer.flush())
    return found
