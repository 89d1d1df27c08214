"""`SQLiteSink`: vectors in an SQLite file, as the little-endian float32 blobs that sqlite-vec reads, too.

A transaction is one function on its connection's thread, from BEGIN IMMEDIATE to COMMIT or ROLLBACK. No other task can
come between its statements, and a cancelled caller cannot leave it open: it waits for the function, which rolls back
before its next statement, or commits.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Self

from ...databases.sqlite import StopSignal, transaction
from ...errors import AsyncEmbedError, SinkConfigError
from ...types import Hit, RecordId, Row, Vectors
from .. import contract
from ..ranking import Ranking, check_query
from .file import SinkFile
from .table import Table


class SQLiteSink:
    """Stores vectors in an SQLite file, and searches them.

    Args:
        path: The file; it and its tables are created by `prepare` or the first `write`. `":memory:"` is kept in
            memory, until the sink is closed.
        table: Holds the rows; created if missing.
        busy_timeout: Seconds to wait for the locks of other processes, then SinkBusyError.

    It connects at first use, and again when it is used after `aclose()`. Many tasks may use it at once, and one event
    loop after another.
    """

    def __init__(self, path: str | os.PathLike[str], *, table: str = contract.TABLE, busy_timeout: float = 5.0) -> None:
        if not busy_timeout >= 0:
            raise SinkConfigError(f"busy_timeout is {busy_timeout}; it is a number of seconds, at least 0")
        shown = os.fspath(path)
        if "\0" in shown:
            raise SinkConfigError("the path contains a NUL character, which no file name can")
        self._table = Table(contract.check_table(table), f"table {table!r} in {shown}")
        self._shown = f"SQLiteSink({shown!r}, table={table!r})"
        location = None if shown == ":memory:" else Path(path).absolute()
        self._file = SinkFile(location, shown, self._shown, busy_timeout)

    def __repr__(self) -> str:
        return self._shown

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def prepare(self, model: str, dimensions: int | None) -> None:
        """Create file and tables if they are missing, and record the size of the model's vectors.

        Raises:
            SinkConfigError: The file cannot be written, the table has other columns, or vectors of another size.
            SinkBusyError: Another process held the lock for longer than `busy_timeout`.
        """
        contract.check_model_key(model, dimensions)

        def create(connection: sqlite3.Connection) -> None:
            with transaction(connection):
                self._table.create(connection)
                self._table.touch(connection)
                if dimensions is not None:
                    stored = self._table.record(connection, model, dimensions)
                    contract.check_dimensions(model, stored, dimensions, self._table.where)

        await self._file.write(create)

    async def existing(self, model: str, hashes: Mapping[RecordId, str]) -> set[RecordId]:
        """Return the ids that are stored for this model with the given content hash."""
        keys = contract.keys_of(hashes)
        stored = await self._file.read(lambda connection: self._table.hashes(connection, model, keys))
        return {id for id, content_hash in hashes.items() if stored.get(str(id)) == content_hash}

    async def write(self, model: str, rows: Sequence[Row]) -> Mapping[RecordId, AsyncEmbedError]:
        """Upsert the rows in one transaction, synced to the disk before this returns.

        The last of several rows with the same key is stored. A replaced row keeps its `created_at`. A cancelled call
        has stored all rows or none before it raises.

        Returns:
            The refused rows, each with its error; all others are stored.

        Raises:
            SinkError: No row of this call was stored. The reasons are those of `prepare`, which need not be called.
        """
        if not rows:
            return {}
        contract.check_model_key(model, rows[0].vector.size)
        table, stop = self._table, StopSignal()

        def store(connection: sqlite3.Connection) -> contract.Refusals:
            with transaction(connection):
                table.create(connection)
                dimensions = table.record(connection, model, rows[0].vector.size)
                admitted, refused = contract.admit(model, rows, dimensions, table.where)
                return refused | table.upsert(connection, model, admitted, stop.check)

        return await self._file.write(store, stop)

    async def search(self, vector: Vectors | Sequence[float], k: int = 5, *, model: str | None = None) -> list[Hit]:
        """Return the k rows nearest to float32[d] by cosine similarity: best first, equal ones by id.

        It reads every vector of the model, a few megabytes at a time. A vector of zeros has no direction and is never
        found.

        Raises:
            ConfigError: The vector or k is not usable.
            SinkConfigError: Nothing is stored yet, the vector has another size than those stored, or there are several
                models and none was named.
        """
        query = check_query(vector, k)
        candidates = await self._file.read(partial(self._table.candidates, model=model))
        chosen = contract.choose_model(candidates, model, query.size, self._table.where)
        if chosen is None:
            return []
        ranking = Ranking(query, k)
        after: int | None = -(2**63)
        while after is not None:
            # each slice is queued by itself, so that other reads come in between
            after = await self._file.read(partial(self._table.rank_slice, model=chosen, ranking=ranking, after=after))
        return await self._file.read(lambda connection: self._table.hits(connection, chosen, ranking.best()))

    async def models(self) -> dict[str, int]:
        """Return the models that have rows, each with the dimensions of its vectors."""
        return await self._file.read(self._table.models)

    async def count(self, model: str | None = None) -> int:
        """Return the number of rows, of one model or of all."""
        return await self._file.read(lambda connection: self._table.count(connection, model))

    def stored_id(self, id: RecordId) -> str:
        """Return the id as `ids` yields it."""
        return str(id)

    async def ids(self, model: str) -> AsyncIterator[str]:
        """Yield the ids stored for the model, in order; memory holds one page of them."""
        last: str | None = ""
        while last is not None:
            read = partial(self._table.ids, model=model, after=last, limit=contract.IDS_PER_PAGE)
            page, last = await self._file.read(read)
            for id in page:
                yield id

    async def delete(self, ids: Iterable[RecordId], model: str) -> int:
        """Delete the model's rows with these ids in one transaction; return how many were deleted."""
        keys = contract.keys_of(ids)

        def delete(connection: sqlite3.Connection) -> int:
            with transaction(connection):
                return self._table.delete(connection, model, keys)

        return await self._file.write(delete)

    async def aclose(self) -> None:
        """Close the connections after the work under way. A later call opens them again."""
        await self._file.aclose()
