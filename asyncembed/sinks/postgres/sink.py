"""Vectors in PostgreSQL with pgvector, in a table of ours or of the user's.

Every call is one transaction on one connection, begun, bounded and ended here; nothing holds a connection between
calls. A connection that was cancelled, timed out or lost in the middle is thrown away, never given back: the
server then rolls back what was open. What may pass by itself is tried again, whole, on another connection, which
is safe because writes are upserts: if only the answer to COMMIT was lost, the same rows are written once more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, NoReturn, Self, TypeVar

from ...concurrency import PerLoop, noted, outcome_of
from ...databases.postgres import FOREIGN, Pool, described
from ...errors import AsyncEmbedError, ConfigError, SinkConfigError
from ...types import Hit, RecordId, Row, Vectors
from .. import contract as schema
from ..ranking import Ranking, check_query
from . import dimensions as sizes
from . import searching
from .pgvector import is_untaught, taught
from .pool import LoopPool
from .statements import METRICS, Layout, check_columns
from .table import ALREADY_THERE, Target
from .transactions import Transactions
from .writing import RefusedError, store

T = TypeVar("T")

# The driver encodes rows on the event loop, 50 ms for 2,048 of them. Four such writes at once all end together and
# late, and so do the slots of their requests: a job of 10 requests at 1 s took 1.25 times as long as embedding alone.
# With two at once, while one is encoded the server works on the other: 1.13 to 1.17 (bench/ingest.py, 2026-11).
LARGE_WRITE_ROWS = 1_000
LARGE_WRITES_AT_ONCE = 2


class PostgresSink:
    """Stores vectors in PostgreSQL with pgvector, and finds them again.

    Args:
        dsn_or_pool: `postgresql://user:password@host/database`, or an `asyncpg.Pool`, which is never closed here.
        table: Holds the rows, `name` or `schema.name`; created if missing.
        columns: For a table of your own: which of its columns is the id, the embedding and, where there is one, the
            model, content_hash, text, metadata, created_at, updated_at. Ids may be text, integers or uuids.
        update_only: Fill the embedding of rows that exist; never insert, never delete a row.
        pool_size: Connections at most, if none were handed in.
        timeout: Seconds for one attempt at a call, and for a connection to become free.
        retry_for: Seconds in which attempts that failed for a passing reason are repeated.

    It connects at first use and may be used by many tasks at once.
    """

    def __init__(
        self,
        dsn_or_pool: str | Pool,
        *,
        table: str = schema.TABLE,
        columns: Mapping[str, str] | None = None,
        update_only: bool = False,
        pool_size: int = 4,
        timeout: float = 60.0,
        retry_for: float = 120.0,
    ) -> None:
        if not isinstance(dsn_or_pool, str | Pool):
            raise SinkConfigError(
                f"a PostgresSink takes an address or an asyncpg.Pool, not a {type(dsn_or_pool).__name__}"
            )
        if pool_size < 1 or not timeout > 0 or not retry_for >= 0:
            raise SinkConfigError(
                f"pool_size={pool_size}, timeout={timeout}, retry_for={retry_for}: a pool has at least 1 connection, "
                "times are seconds"
            )
        try:
            where = f"table {table!r} in {described(dsn_or_pool)}"
        except ConfigError as error:
            raise SinkConfigError(str(error)) from None
        schema_name, _, table_name = table.rpartition(".")
        self._target = Target(
            schema.check_name(schema_name, "schema") if schema_name else None,
            schema.check_table(table_name),
            check_columns(columns, update_only),
            ours=columns is None,
            update_only=update_only,
            where=where,
        )
        self._pool = LoopPool(dsn_or_pool, pool_size, self._target.where)
        self._transactions = Transactions(
            self._pool.open,
            FOREIGN,
            name=self._target.where,
            timeout=timeout,
            retry_for=retry_for,
            reached=self._pool.is_given,  # a pool that was handed in is one that has connected
        )
        self._large_writes = PerLoop(lambda: asyncio.Semaphore(LARGE_WRITES_AT_ONCE))
        self._layout: Layout | None = None  # the table as it was when it was first looked at,
        self._untaught: bool | None = None  # and whether the pool's connections need our codec to write to it
        self._sizes: dict[str, int] = {}  # by model, in tables that do not record them

    def __repr__(self) -> str:
        return f"PostgresSink({self._target.where})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a PostgresSink cannot be pickled: it holds connections, and a password")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections that were made here, none that was handed in. A later call opens new ones."""
        await self._pool.aclose()

    async def prepare(self, model: str, dimensions: int | None) -> None:
        """Create extension and table if they are missing, check them, and record the size of the model's vectors.

        Any number of processes may do so at once.

        Raises:
            SinkConfigError: There is no such database, pgvector is missing and may not be created, the table has
                other columns, no fitting unique index, or vectors of another size.
        """
        schema.check_model(model, dimensions)
        self._sizes.pop(model, None)
        work = partial(self._target.prepare, model=model, dimensions=dimensions)
        self._layout = await self._transactions.run(work, again=ALREADY_THERE)
        await self._pool.learn()

    async def existing(self, model: str, hashes: Mapping[RecordId, str]) -> set[RecordId]:
        """Return those of the given ids that are stored for this model with this very content hash.

        In a table without a column for the hash: those that have a vector.
        """

        async def work(connection: Any, layout: Layout) -> set[RecordId]:
            wanted = layout.convert_all(hashes)
            stored = dict(await connection.fetch(layout.hashes(), model, list(set(wanted.values()))))
            if "content_hash" not in layout.names:
                return {id for id, key in wanted.items() if str(key) in stored}
            return {id for id, key in wanted.items() if stored.get(str(key)) == hashes[id]}

        return await self._run(work)

    async def write(self, model: str, rows: Sequence[Row]) -> Mapping[RecordId, AsyncEmbedError]:
        """Upsert the rows in one transaction, committed before this returns.

        Of rows with the same key the last one wins; a stored row keeps its `created_at`. Cancelled, it has stored
        all or nothing; which of them, only a look can tell.

        Returns:
            The rows that no store takes or this table refuses, each with its error; all others are stored.

        Raises:
            SinkError: Nothing of this call was stored, as far as the server told. As for `prepare`, which need not
                have been called.
        """
        if not rows:
            return {}
        schema.check_model(model, rows[0].vector.size)
        if self._layout is None:
            await self.prepare(model, None)

        try:
            async with self._large_writes.get() if len(rows) >= LARGE_WRITE_ROWS else nullcontext():
                stored: tuple[int, schema.Refusals] | None = None
                with suppress(RefusedError):
                    stored = await self._run(partial(self._store, model, rows, carefully=False))
                # out here what may go wrong now has not that error as its context, which quotes a row
                if stored is None:
                    stored = await self._run(partial(self._store, model, rows, carefully=True))
        except asyncio.CancelledError as cancelled:
            if outcome_of(cancelled) is not None:
                noted(cancelled, outcome_of(cancelled)[1])
            raise
        size, refused = stored
        if not self._target.ours:
            self._sizes[model] = size
        return refused

    async def _store(
        self, model: str, rows: Sequence[Row], connection: Any, layout: Layout, *, carefully: bool
    ) -> tuple[int, schema.Refusals]:
        """Return the size of the model's vectors, too."""
        size = self._sizes.get(model)
        if size is None:
            size = await sizes.agreed_size(connection, layout, model, rows[0].vector.size)
        admitted, refused = schema.admit(model, rows, size, layout.where, layout.convert)
        if admitted:
            pgvector = layout.facts.extension.schema, layout.kind
            if self._untaught is None:
                self._untaught = self._pool.is_given and await is_untaught(connection, *pgvector)
            async with taught(connection, *pgvector) if self._untaught else nullcontext():
                unfit = await store(connection, layout, model, admitted, carefully=carefully)
                refused = refused | unfit
        return size, refused

    async def search(
        self,
        vector: Vectors | Sequence[float],
        k: int = 5,
        *,
        model: str | None = None,
        where: str | Mapping[str, Any] | None = None,
        args: Sequence[Any] = (),
    ) -> list[Hit]:
        """Return the k rows nearest to float32[d] by cosine similarity: best first, equal ones by id.

        Exact without an index; with one it finds most of them, faster. Rows that are all zeros are never found.

        Args:
            vector: The query, float32[d].
            k: How many rows.
            model: Needed if the table holds several.
            where: What the metadata must contain, as a mapping, or a condition in SQL on the table's columns, with
                $1, $2, … for `args`. Never put a value from outside into the SQL itself.
            args: The values for the condition.

        Raises:
            ConfigError: The vector or k is not usable.
            SinkConfigError: Nothing was stored here yet, the vector has another size than those stored, there are
                several models and none was named, or the condition is wrong.
        """
        query = check_query(vector, k)

        async def work(connection: Any, layout: Layout) -> list[Hit]:
            asked = layout.meant(model)
            candidates = await sizes.candidates(connection, layout, asked)
            chosen = schema.choose_model(candidates, asked, query.size, layout.where)
            if chosen is None:
                return []
            condition = layout.condition(where, args)
            return await searching.nearest(connection, layout, Ranking(query, k), query, chosen, k, *condition)

        return await self._run(work)

    async def models(self) -> dict[str, int]:
        """Return the models that have rows here, each with the dimensions of its vectors; "" if no column tells."""
        return await self._run(sizes.models)

    async def count(self, model: str | None = None) -> int:
        """Return the number of vectors, of one model or of all."""

        async def work(connection: Any, layout: Layout) -> int:
            values = [] if model is None else [model]
            return int(await connection.fetchval(layout.count(all_models=model is None), *values))

        return await self._run(work)

    def why_unfit(self, id: RecordId) -> str | None:
        """Return why the table cannot hold the id; None if it can, or before `prepare` has told the column's type."""
        if self._layout is None or self._layout.holds_any_text:
            return None
        try:
            self._layout.convert(str(id))
        except ValueError as error:
            return f"has an id that {self._layout.where} cannot hold: it {error}"
        return None

    def stored_id(self, id: RecordId) -> str:
        """Return the id as `ids` yields it, once `prepare` has told the type of the column: "007" may be "7"."""
        with suppress(ValueError):
            return str(id) if self._layout is None else str(self._layout.convert(str(id)))
        return str(id)  # no row has it

    async def ids(self, model: str) -> AsyncIterator[str]:
        """Yield the ids stored for the model, in the order of their column; a page of them is held in memory."""
        last: Any = None

        async def work(connection: Any, layout: Layout) -> list[Any]:
            return [row[0] for row in await connection.fetch(layout.ids(), model, last, schema.IDS_PER_PAGE)]

        while page := await self._run(work):
            for id in page:
                yield str(id)
            last = page[-1]

    async def delete(self, ids: Iterable[RecordId], model: str) -> int:
        """Delete the model's rows with these ids (with `update_only`: their vectors); return how many there were."""
        asked = list(ids)

        async def work(connection: Any, layout: Layout) -> int:
            status = await connection.execute(layout.delete(), model, sorted(set(layout.convert_all(asked).values())))
            return int(status.rpartition(" ")[2])

        return await self._run(work)

    async def create_index(
        self, model: str | None = None, *, metric: str = "cosine", m: int = 16, ef_construction: int = 64
    ) -> None:
        """Build an HNSW index over one model's vectors, without locking out writers; best after the load.

        Beyond 2,000 dimensions it holds them at half precision, and `search` sorts what it finds by the whole one.
        Does nothing if there is one; one whose building was broken off is dropped and built anew.

        Args:
            model: Needed if the table holds several.
            metric: "cosine", which `search` uses; "inner_product" or "l2" for queries of your own.
            m: Links of a node, as in pgvector.
            ef_construction: Candidates looked at while building, as in pgvector.

        Raises:
            SinkConfigError: Nothing is stored yet, more than 4,000 dimensions, or another metric.
            SinkBusyError: Another process is building it.
        """
        if metric not in METRICS:
            raise SinkConfigError(f"metric {metric!r} is none of {', '.join(METRICS)}")

        async def work(connection: Any, layout: Layout) -> list[str]:
            stored = await sizes.models(connection, layout)
            options = f"m = {int(m)}, ef_construction = {int(ef_construction)}"
            return await searching.index_statements(connection, layout, stored, layout.meant(model), metric, options)

        await self._transactions.alone(partial(self._run, work))

    async def _run(self, work: Callable[[Any, Layout], Coroutine[Any, Any, T]]) -> T:
        async def with_layout(connection: Any) -> T:
            if self._layout is None:
                self._layout = await self._target.look_up(connection)
            return await work(connection, self._layout)

        known = self._layout is not None
        try:
            return await self._transactions.run(with_layout)
        except SinkConfigError:
            self._layout = self._untaught = None
            if not known:
                raise
        return await self._run(work)  # the table may have been altered: look at it again, and say what it lacks now
