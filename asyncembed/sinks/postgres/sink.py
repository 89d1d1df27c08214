"""Vectors in PostgreSQL with pgvector, in our own table or in the user's.

Every call is one transaction on one connection, which is begun, limited in time and ended here; no connection is held
between calls. A connection whose transaction was cancelled, timed out or broke is dropped, and the server rolls back
its transaction. After an error that may pass, the whole call is repeated on another connection. Writes are upserts, so
this is safe: if only the answer to COMMIT was lost, the same rows are written once more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, NoReturn, Self, TypeVar

from ...concurrency import PerLoop
from ...databases.postgres import Pool, described
from ...errors import AsyncEmbedError, ConfigError, SinkConfigError
from ...types import Hit, RecordId, Row, Vectors
from .. import contract
from ..ranking import check_query
from . import dimensions, searching, setup, statements
from .pgvector import METRICS, lacks_codec, with_codec
from .pool import LoopPool
from .table import Table, Target, check_columns
from .transactions import Transactions
from .writing import store

T = TypeVar("T")

# The driver encodes rows on the event loop, 50 ms for 2,048 of them. With four such writes at once all end late and
# together, and so do the requests that wait for them; with two, one is encoded while the server works on the other.
# A job of 10 requests at 1 s took 1.31 times as long as embedding alone without this limit, and 1.19 with it
# (bench/ingest.py, 2026-11).
LARGE_WRITE_ROWS = 1_000
LARGE_WRITES_AT_ONCE = 2


class PostgresSink:
    """Stores vectors in PostgreSQL with pgvector, and finds them again.

    Args:
        dsn_or_pool: `postgresql://user:password@host/database`, or an `asyncpg.Pool`, which is never closed here.
        table: Holds the rows, `name` or `schema.name`; created if missing.
        columns: For your own table: the names of its columns for id, embedding and, if it has them, model,
            content_hash, text, metadata, created_at, updated_at. Ids may be text, integers or uuids.
        update_only: Fill the embedding of existing rows; never insert or delete a row.
        pool_size: The most connections, unless a pool is handed in.
        timeout: Seconds for one attempt at a call, and for a connection to become free.
        retry_for: Seconds for which a call is repeated after errors that may pass.

    It connects at first use and may be used by many tasks at once.
    """

    def __init__(
        self,
        dsn_or_pool: str | Pool,
        *,
        table: str = contract.TABLE,
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
                "timeout is more than 0 seconds, and retry_for at least 0"
            )
        try:
            where = f"table {table!r} in {described(dsn_or_pool)}"
        except ConfigError as error:
            raise SinkConfigError(str(error)) from None
        schema, _, name = table.rpartition(".")
        self._target = Target(
            contract.check_name(schema, "schema") if schema else None,
            contract.check_table(name),
            check_columns(columns, update_only),
            ours=columns is None,
            update_only=update_only,
            where=where,
        )
        self._pool = LoopPool(dsn_or_pool, pool_size, where)
        self._transactions = Transactions(self._pool, timeout, retry_for)
        self._large_writes = PerLoop(lambda: asyncio.Semaphore(LARGE_WRITES_AT_ONCE))
        self._table: Table | None = None  # as it was when it was last looked at
        self._lacks_codec: bool | None = None  # whether a pool that was handed in sends vectors as text
        self._sizes: dict[str, int] = {}  # by model, for tables that do not record them

    def __repr__(self) -> str:
        return f"PostgresSink({self._target.where})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a PostgresSink cannot be pickled: it holds connections, and a password")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the sink's own connections, never a pool that was handed in. A later call opens new ones."""
        await self._pool.aclose()

    async def prepare(self, model: str, dimensions: int | None) -> None:
        """Create extension and table if they are missing, check them, and record the size of the model's vectors.

        Any number of processes may do so at once.

        Raises:
            SinkConfigError: The database does not exist, pgvector is missing and may not be created, or the table has
                other columns, no fitting unique index, or vectors of another size.
        """
        contract.check_model_key(model, dimensions)
        self._sizes.pop(model, None)
        work = partial(setup.prepare, target=self._target, model=model, dimensions=dimensions)
        self._table = await self._transactions.run(work, again=setup.ALREADY_CREATED)
        await self._pool.renew()

    async def existing(self, model: str, hashes: Mapping[RecordId, str]) -> set[RecordId]:
        """Return those of the given ids that are stored for this model with exactly this content hash.

        In a table without a column for the hash: those that have a vector.
        """

        async def work(connection: Any, table: Table) -> set[RecordId]:
            wanted = table.convert_all(hashes)
            stored = dict(await connection.fetch(statements.hashes(table), model, list(set(wanted.values()))))
            if "content_hash" not in table.columns:
                return {id for id, key in wanted.items() if str(key) in stored}
            return {id for id, key in wanted.items() if stored.get(str(key)) == hashes[id]}

        return await self._run(work)

    async def write(self, model: str, rows: Sequence[Row]) -> Mapping[RecordId, AsyncEmbedError]:
        """Upsert the rows in one transaction, committed before this returns.

        The last of several rows with one key wins; a stored row keeps its `created_at`. A cancelled call has stored
        all rows or none; `existing` shows which.

        Returns:
            The rows that no store takes or that this table refuses, each with its error; all others are stored.

        Raises:
            SinkError: Nothing of this call was stored, as far as the server answered. As for `prepare`, which need
                not have been called.
        """
        if not rows:
            return {}
        contract.check_model_key(model, rows[0].vector.size)
        if self._table is None:
            await self.prepare(model, None)
        size = 0

        async def work(connection: Any, table: Table) -> contract.Refusals:
            nonlocal size
            size = self._sizes.get(model) or await dimensions.agreed_size(connection, table, model, rows[0].vector.size)
            admitted, refused = contract.admit(model, rows, size, table.where, table.convert)
            if not admitted:
                return refused
            vector_type = table.extension.schema, table.vector_type
            if self._lacks_codec is None:
                self._lacks_codec = self._pool.is_given and await lacks_codec(connection, *vector_type)
            async with with_codec(connection, *vector_type) if self._lacks_codec else nullcontext():
                return refused | await store(connection, table, model, admitted)

        async with self._large_writes.get() if len(rows) >= LARGE_WRITE_ROWS else nullcontext():
            refused = await self._run(work)
        if not self._target.ours:
            self._sizes[model] = size  # only now that it is committed
        return refused

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

        Exact without an index; an index is faster and may overlook some. Rows of zeros are never found.

        Args:
            vector: The query, float32[d].
            k: How many rows.
            model: Needed if the table holds several.
            where: Values that the metadata must contain, as a mapping, or an SQL condition on the table's columns,
                with $1, $2, … for `args`. Never put a value from outside into the SQL itself.
            args: The values for the condition.

        Raises:
            ConfigError: The vector or k is not usable.
            SinkConfigError: Nothing was stored here yet, the vector has another size than those stored, there are
                several models and none was named, or the condition is wrong.
        """
        query = check_query(vector, k)
        return await self._run(partial(searching.nearest, query=query, k=k, model=model, where=where, args=args))

    async def models(self) -> dict[str, int]:
        """Return the stored models, each with the dimensions of its vectors; "" if no column holds the model."""
        return await self._run(dimensions.models)

    async def count(self, model: str | None = None) -> int:
        """Return the number of vectors, of one model or of all."""

        async def work(connection: Any, table: Table) -> int:
            return int(await connection.fetchval(statements.count(table), model))

        return await self._run(work)

    def why_unfit(self, id: RecordId) -> str | None:
        """Return why the table cannot hold the id; None if it can, or if `prepare` has not read the column's type."""
        try:
            if self._table is not None:
                self._table.convert(str(id))
        except ValueError as error:
            return f"has an id that {self._target.where} cannot hold: it {error}"
        return None

    def stored_id(self, id: RecordId) -> str:
        """Return the id as `ids` yields it, once `prepare` has read the type of the column: "007" may be "7"."""
        with suppress(ValueError):
            return str(id) if self._table is None else str(self._table.convert(str(id)))
        return str(id)  # no row has it

    async def ids(self, model: str) -> AsyncIterator[str]:
        """Yield the ids stored for the model, in the order of their column; one page of them is held in memory."""
        last: Any = None

        async def work(connection: Any, table: Table) -> list[Any]:
            found = await connection.fetch(statements.ids(table), model, last, contract.IDS_PER_PAGE)
            return [row[0] for row in found]

        while page := await self._run(work):
            for id in page:
                yield str(id)
            last = page[-1]

    async def delete(self, ids: Iterable[RecordId], model: str) -> int:
        """Delete the model's rows with these ids (with `update_only`: their vectors); return how many existed."""
        wanted = list(ids)

        async def work(connection: Any, table: Table) -> int:
            keys = sorted(set(table.convert_all(wanted).values()))
            status = await connection.execute(statements.delete(table), model, keys)
            return int(status.rpartition(" ")[2])

        return await self._run(work)

    async def create_index(
        self, model: str | None = None, *, metric: str = "cosine", m: int = 16, ef_construction: int = 64
    ) -> None:
        """Build an HNSW index over one model's vectors, without locking out writers; best after the load.

        Beyond 2,000 dimensions it holds them at half precision, and `search` ranks its rows by the stored numbers.
        An existing index is kept; one whose build was interrupted is dropped and built again.

        Args:
            model: Needed if the table holds several.
            metric: "cosine", which `search` uses; "inner_product" or "l2" for your own queries.
            m: Links of a node, as in pgvector.
            ef_construction: Candidates considered during the build, as in pgvector.

        Raises:
            SinkConfigError: Nothing is stored yet, there are more than 4,000 dimensions, or the metric is unknown.
            SinkBusyError: Another process is building it.
        """
        if metric not in METRICS:
            raise SinkConfigError(f"metric {metric!r} is none of {', '.join(METRICS)}")
        options = f"m = {int(m)}, ef_construction = {int(ef_construction)}"
        work = partial(searching.index_statements, model=model, metric=metric, options=options)
        await self._transactions.run_outside(partial(self._run, work))

    async def _run(self, work: Callable[[Any, Table], Coroutine[Any, Any, T]]) -> T:
        async def with_table(connection: Any) -> T:
            if self._table is None:
                self._table = await setup.look_up(connection, self._target)
            return await work(connection, self._table)

        was_known = self._table is not None
        try:
            return await self._transactions.run(with_table)
        except SinkConfigError:
            self._table = self._lacks_codec = None
            if not was_known:
                raise
        return await self._run(work)  # the table may have been altered: look again, and report what it lacks now
