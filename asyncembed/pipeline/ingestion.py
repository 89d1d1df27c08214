"""`ingest`: reads records, embeds their texts, and stores the rows. Embedding and storing run at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from ..batching.batch import Outcome
from ..batching.texts import Text, unique
from ..concurrency import cancel_and_wait, outcome_of, run_in_thread_if
from ..embedder.embedder import Embedder
from ..errors import AsyncEmbedError, SinkError, SourceError
from ..report import IngestReport, ProgressCallback, reporter
from ..sending.context import STORING_S, CallContext, StoppedError
from ..sources.records import IDLE, AnyIterable, in_chunks
from ..types import CheckingSink, Failure, KeyedSink, RecordId, Row, Sink, Vectors
from .pruning import Pruning
from .validation import Pending, WhyUnfit, checked

# Records are checked on the event loop, in turns of about this long. In a thread, the check would keep the GIL from the
# loop, which reads replies meanwhile, for 5 ms at a time. (20,000 records, two busy cores, alternating runs: the first
# reply was stored after 0.26 s instead of 0.36 s.) Records that take longer than a turn are checked in a thread.
TURN_S = 0.00025
RECORDS_A_TURN = 64

# Stored in one transaction: everything that a request can return, unless its texts belong to more records than that.
ROWS_A_WRITE = 4_096


async def ingest(
    records: AnyIterable,
    embedder: Embedder,
    sink: Sink,
    *,
    skip_existing: bool = True,
    prune: bool = False,
    on_progress: ProgressCallback | None = None,
    deadline: float | None = None,
    stop: asyncio.Event | None = None,
) -> IngestReport:
    """Embed records and store them. Records that are stored already, with the same text and model, cost nothing.

    Records are read lazily, in bounded memory. A bad record does not affect the others. A request holds its
    concurrency slot until its rows are stored, so a crash loses, and a rerun pays again for, only requests in flight.
    If several records have the same id, the last one is stored; the replaced ones count as skipped.

    Args:
        records: Any sync or async iterable of records, in any of their forms; see `Record`. An `InputError` among
            them counts as a record that failed.
        embedder: Stays open.
        sink: Stays open.
        skip_existing: Query the sink first, and leave out records that it has. If False, everything is embedded again.
        prune: After the source was read to its end, delete the model's rows whose ids the source does not have. A
            record that failed counts as part of the source; if one failed without an id, nothing is deleted. Rows that
            other programs have stored into the same table for the same model are deleted, too.
        on_progress: Called with a `Progress` after every batch and every skipped slice.
        deadline: Seconds for the whole call.
        stop: If this event is set, the call ends early and returns its report: nothing new is sent, and batches in
            flight are stored. A rerun does the rest.

    Raises:
        TypeError: `embedder` is not an Embedder, or `sink` is not a sink.
        ConfigError: prune=True, and the sink cannot list and delete ids; see `types.PrunableSink`.
        FatalProviderError: Further requests would fail, too. Finished batches are stored, see `.report`.
        SinkError: The sink failed. Earlier batches are stored, see `.report`.
        SourceError: The source failed. Earlier records are stored, see `.report`. Other errors of a source are raised
            unchanged.
        DeadlineError: The deadline passed. Finished batches are stored, see `.report`.
    """
    _check_parts(embedder, sink)
    call = CallContext(deadline)
    pruning = Pruning(sink, embedder.model) if prune else None
    job = _Ingestion(embedder, sink, call, skip_existing, reporter(on_progress), _length_of(records), pruning)
    watcher = None if stop is None else asyncio.create_task(job.stop_when(stop))
    try:
        async with call.until_deadline():
            with suppress(StoppedError):
                async with call.unless_stopped():
                    await sink.prepare(embedder.model, embedder.dimensions)
                async with aclosing(job.slices(records)) as slices:
                    await embedder.embed_slices(slices, call, job)
                await job.prune()
    except (SinkError, SourceError) as error:
        # of several failed writes, the first one has stopped the call, and is the error of records that were not sent
        first = call.stopped_by if isinstance(call.stopped_by, SinkError) else error
        first.report = job.finish(first)
        raise first from first.__cause__
    finally:
        if pruning is not None:
            pruning.close()
        if watcher is not None:
            await cancel_and_wait(watcher)
    report = job.finish(call.stopped_by)
    if call.stopped_by not in (None, job.end_early):
        call.stopped_by.report = report
        raise call.stopped_by
    return report


def _check_parts(embedder: object, sink: object) -> None:
    if not isinstance(embedder, Embedder):
        raise TypeError(f"embedder is {type(embedder).__name__}; ingest takes records, an Embedder, and a sink")
    if not all(hasattr(sink, name) for name in ("prepare", "existing", "write")):
        raise TypeError(f"sink is {type(sink).__name__}; pass a SQLiteSink, a PostgresSink, or open_sink(…)")


@dataclass(eq=False)
class _Ingestion:
    """One `ingest` call. A record goes through `_check`, `_admit`, the embedder, `deliver`, `_store` and `_done`."""

    embedder: Embedder
    sink: Sink
    call: CallContext
    skip_existing: bool
    report_progress: ProgressCallback
    total: int | None
    pruning: Pruning | None
    end_early: AsyncEmbedError = field(default_factory=lambda: AsyncEmbedError("the caller asked the run to end"))
    """Stops the call without an error."""
    report: IngestReport = field(default_factory=IngestReport)
    read: int = 0
    """Records read so far."""
    records_a_turn: int = 8
    pending: dict[int, Pending] = field(default_factory=dict)
    in_flight: set[str] = field(default_factory=set)
    """The records that were passed to the embedder, by position, and their keys."""
    held: dict[str, Pending] = field(default_factory=dict)
    """By key, the last record whose key is in flight with an earlier text. It is admitted when that is done."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        sink = self.sink
        self.why_unfit: WhyUnfit = sink.why_unfit if isinstance(sink, CheckingSink) else lambda id: None
        self.stored_id: Callable[[RecordId], str] = sink.stored_id if isinstance(sink, KeyedSink) else str

    async def stop_when(self, stop: asyncio.Event) -> None:
        """Stop the call without an error when the event is set."""
        await stop.wait()
        self.call.stop(self.end_early)

    # ---- from the source to the embedder ----

    async def slices(self, records: AnyIterable) -> AsyncGenerator[Sequence[Text], None]:
        """Yield the texts to be embedded; an empty slice flushes partly filled batches."""
        async with aclosing(in_chunks(records)) as chunks:
            async for some in chunks:
                texts = await self._admit(await self._check(some))
                if texts or some is IDLE:
                    yield texts
                if len(self.pending) > self.embedder.max_in_flight:  # few texts, but of many records
                    yield ()
                    while len(self.pending) > self.embedder.max_in_flight:
                        await self._change()
        while self.held:
            yield ()  # flush the batches that the held records wait for
            while self.held.keys() <= self.in_flight:
                await self._change()
            yield await self._admit([])

    async def _change(self) -> None:
        self.changed.clear()
        await self.changed.wait()

    async def _check(self, some: Sequence[Any]) -> list[Pending]:
        """Return the valid records, and report the others as failed."""
        good: list[Pending] = []
        bad: list[Failure] = []
        while some:
            turn, some = some[: self.records_a_turn], some[self.records_a_turn :]
            taken_s, fit, unfit = await run_in_thread_if(
                self.records_a_turn == 1, checked, self.read, turn, self.why_unfit, self.stored_id
            )
            self.records_a_turn = max(1, min(RECORDS_A_TURN, int(len(turn) * TURN_S / max(taken_s, 1e-6))))
            good.extend(fit)
            bad.extend(unfit)
            self.read += len(turn)
            await asyncio.sleep(0)
        self.report.failures.extend(bad)
        if self.pruning is not None:
            failed = [failure.id for failure in bad if failure.id is not None]
            await self.pruning.see([*(pending.record.id for pending in good), *failed])
        return good

    async def _admit(self, good: list[Pending]) -> list[Text]:
        """Return the texts of these records and of held ones that need not wait, except those stored already."""
        released = [self.held.pop(key) for key in list(self.held) if key not in self.in_flight]
        wanted: dict[str, Pending] = {}
        for pending in (*released, *good):
            place = self.held if pending.key in self.in_flight else wanted
            if place.pop(pending.key, None) is not None:  # popped, so that the later record takes the last place
                self.report.skipped_count += 1
            place[pending.key] = pending
        stored: set[RecordId] = set()
        if self.skip_existing and wanted:
            hashes = {pending.record.id: pending.content_hash for pending in wanted.values()}
            stored = await self.sink.existing(self.embedder.model, hashes)
        texts: list[tuple[int, str]] = []
        for pending in wanted.values():
            if pending.record.id in stored:
                self.report.skipped_count += 1
            else:
                self.pending[pending.index] = pending
                self.in_flight.add(pending.key)
                texts.append((pending.index, pending.record.text))
        self._progress()
        return unique(texts)

    # ---- from the embedder to the sink ----

    async def deliver(self, outcome: Outcome) -> None:
        """Store the vectors of an outcome; records count as done only afterwards."""
        if outcome.texts:
            try:
                await self._store(outcome.texts, outcome.vectors)
            except Exception as broken:
                # before the slot is released, or the next batch would be sent and could not be stored either
                self.call.stop(broken if isinstance(broken, AsyncEmbedError) else self.end_early)
                raise
        for text, error in outcome.failed:
            for index in text.indices:
                pending = self._done(index)
                if error is not self.end_early:  # else it was not sent, and does not count as read
                    self.report.failures.append(Failure(index, error, pending.record.id))
        self._progress()

    async def _store(self, texts: Sequence[Text], vectors: Vectors) -> None:
        wanted = ((index, vector) for text, vector in zip(texts, vectors, strict=True) for index in text.indices)
        with suppress(StoppedError):  # the time for storing has passed; a write is stored completely or not at all
            while some := list(islice(wanted, ROWS_A_WRITE)):
                rows = [_row(self.pending[index], vector) for index, vector in some]
                async with self.call.storing():
                    await self._write([index for index, _ in some], rows)

    async def _write(self, indices: Sequence[int], rows: Sequence[Row]) -> None:
        refused: Mapping[RecordId, AsyncEmbedError] | None = None
        try:
            refused = await self.sink.write(self.embedder.model, rows)
        except asyncio.CancelledError as cancelled:
            refused = outcome_of(cancelled)  # not None if the rows were stored all the same
            raise
        finally:
            if refused is not None:
                for index in indices:
                    record = self._done(index).record
                    if record.id in refused:
                        self.report.failures.append(Failure(index, refused[record.id], record.id))
                    else:
                        self.report.success_count += 1

    def _done(self, index: int) -> Pending:
        """Remove and return a record that is stored or has failed."""
        pending = self.pending.pop(index)
        self.in_flight.discard(pending.key)
        self.changed.set()
        return pending

    # ---- the end ----

    async def prune(self) -> None:
        """Delete the rows that the source does not have, if requested. The source must have been read to its end."""
        if self.pruning is not None:
            unknown = sum(failure.id is None for failure in self.report.failures)
            async with self.call.unless_stopped(STORING_S):
                self.report.pruned_count = await self.pruning.finish(self.call, unknown)

    def _progress(self) -> None:
        report = self.report
        self.report_progress(self.call.progress(report.seen, self.total, report.failed_count, report.skipped_count))

    def finish(self, error: AsyncEmbedError | None) -> IngestReport:
        """Return the report. Records that were read and are not done have failed with the given error."""
        if error is not None and error is not self.end_early:
            for pending in (*self.pending.values(), *self.held.values()):
                self.report.failures.append(Failure(pending.index, error, pending.record.id))
        self.pending, self.held = {}, {}
        self.report.failures.sort(key=lambda failure: failure.index)
        self._progress()
        usage = self.call.usage
        return replace(
            self.report,
            total_tokens=usage.tokens,
            requests=usage.requests,
            retries=usage.retries,
            elapsed_s=self.call.elapsed_s,
            cost_usd=self.embedder.cost_usd(usage),
            cache_hits=usage.cache_hits,
            cache_misses=usage.cache_misses,
        )


def _length_of(records: object) -> int | None:
    try:
        return len(records)  # type: ignore[arg-type]  # it may have no length
    except Exception:  # it has none, or does not know it yet
        return None


def _row(pending: Pending, vector: Vectors) -> Row:
    record = pending.record
    return Row(record.id, record.text, vector, pending.content_hash, pending.metadata)
