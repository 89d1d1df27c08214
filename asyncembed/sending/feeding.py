"""Packs a call's texts into batches while the source is still being read, and sends them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import TypeAlias

from ..batching.batch import Batch, Outcome
from ..batching.packing import OPEN_BATCHES, Packer
from ..batching.texts import Input, Text, portions, prepare_inputs
from ..batching.tokens import TokenCounter
from ..concurrency import task_group
from .attempts import BatchSender
from .context import CallContext, StoppedError

Slices: TypeAlias = AsyncGenerator[Sequence[Text], None]
"""The texts of a call, as they are read; an empty slice means that the source is idle."""

LoadCounter: TypeAlias = Callable[[], Awaitable[TokenCounter]]
"""Returns the counter of the model's tokens; the first call may take seconds."""

# The tokens of fewer characters than this are counted on the event loop, in at most 0.3 ms with tiktoken. So small
# calls do not wait for a free thread.
INLINE_CHARACTERS = 4 * 1024


async def embed_slices(
    slices: AsyncIterable[Sequence[Text]],
    load_counter: LoadCounter,
    sender: BatchSender,
    *,
    open_batches: int = OPEN_BATCHES,
) -> None:
    """Embed all texts of all slices, and deliver each text once, with its vector or its error.

    When the call is stopped, the texts already read are delivered as failed, and no further slice is read.
    An empty slice means that the source is idle: partly filled batches are flushed. The token counter is not loaded
    before the first text is read. See `Packer` for `open_batches`.

    Raises:
        Exception: An error of `slices`, after the texts before it were delivered; or an error of the receiver, at
            once. Nothing is left running.
    """
    error: Exception | None = None
    task = asyncio.current_task()
    assert task is not None
    cancels = task.cancelling()
    limits = sender.endpoint.limits
    packer: Packer[Input] = Packer(limits.inputs, limits.tokens, open_batches)
    async with task_group() as group:
        try:
            async with aclosing(_full_batches(slices, packer, load_counter, sender)) as batches:
                async for inputs in batches:
                    await sender.admission.enter()
                    group.create_task(sender.send(Batch(inputs)))
        except Exception as broken:
            if task.cancelling() > cancels:
                raise  # the source raised it because it was cancelled: no caller waits for the texts before it
            error = broken
        for inputs in packer.flush():
            await sender.admission.enter()
            group.create_task(sender.send(Batch(inputs)))
    if error is not None:
        raise error


async def _full_batches(
    slices: AsyncIterable[Sequence[Text]], packer: Packer[Input], load_counter: LoadCounter, sender: BatchSender
) -> AsyncGenerator[list[Input], None]:
    """Yield batches as they fill; an empty slice flushes the partly filled ones."""
    async for texts in slices:
        for some in portions(texts):
            for each in await _inputs(some, load_counter, sender):
                if full := packer.add(each, each.weight):
                    yield full
        if not texts:
            for rest in packer.flush():
                yield rest


async def _inputs(texts: Sequence[Text], load_counter: LoadCounter, sender: BatchSender) -> list[Input]:
    """Return the inputs that texts become; texts that are too long are delivered as failed."""
    call, endpoint = sender.call, sender.endpoint
    if call.stopped_by is not None:
        await sender.deliver(Outcome(failed=[(text, call.stopped_by) for text in texts]))
        return []
    prepare = partial(prepare_inputs, texts, await load_counter(), endpoint.limits, endpoint.too_long)
    is_small = sum(len(text.content) for text in texts) <= INLINE_CHARACTERS
    inputs, failed = prepare() if is_small else await asyncio.to_thread(prepare)
    if failed:
        await sender.deliver(Outcome(failed=failed))
    return inputs


async def until_stopped(slices: Slices, call: CallContext) -> Slices:
    """Yield slices until the call is stopped, even if the source is slow. Closes the source."""
    async with aclosing(slices):
        while True:
            try:
                async with call.unless_stopped():
                    texts = await anext(slices)
            except (StopAsyncIteration, StoppedError):
                return
            yield texts
