"""`ingest(..., prune=True)`: after a complete pass, delete the rows whose ids are no longer in the source.

The ids of the source are kept in a temporary file beside the run. They could outgrow memory, and marking rows in the
store would rewrite every vector and its index entry to record that nothing has changed.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from functools import partial

from ..databases.sqlite import KEYS_PER_STATEMENT, Database, T, Work, batched, connect, placeholders, single_value
from ..errors import ConfigError, SinkError
from ..sending.context import CallContext
from ..sources.records import in_chunks
from ..types import PrunableSink, RecordId, Sink

logger = logging.getLogger(__name__)


class Pruning:
    """Remembers which ids a pass has seen, and deletes all others from the sink.

    Args:
        sink: The sink to prune.
        model: The model whose rows are deleted; those of other models stay.

    Raises:
        ConfigError: The sink cannot list and delete ids.
    """

    def __init__(self, sink: Sink, model: str) -> None:
        if not isinstance(sink, PrunableSink):
            missing = [name for name in ("stored_id", "ids", "delete") if not hasattr(sink, name)]
            raise ConfigError(
                f"prune=True needs a sink that can list and delete ids; {type(sink).__name__} has no "
                f"{', '.join(missing)}: see asyncembed.types.PrunableSink"
            )
        self._sink = sink
        self._model = model
        # Opened once, so that using it after `close` fails: a new one would be empty, and all rows would be deleted.
        connection = _open_temporary()
        self._seen = Database(lambda: connection, is_private=True)

    async def see(self, ids: Iterable[RecordId]) -> None:
        """Remember ids of the source, including those of failed records."""
        keys = [_key(self._sink.stored_id(id)) for id in ids]
        await self._run(partial(_add, keys=keys))

    async def finish(self, call: CallContext, unknown: int) -> int | None:
        """Delete the rows that were not seen, after a complete pass; return how many, or None if that is not safe.

        Args:
            call: Deleting ends when it is stopped.
            unknown: How many records failed without an id. Any row might be theirs, so nothing is deleted then.

        Raises:
            SinkError: The store cannot be read or written; some rows may be deleted.
        """
        if unknown:
            logger.warning("nothing was pruned: %d records failed without an id, and any row might be theirs", unknown)
            return None
        pruned = 0
        async with aclosing(in_chunks(self._sink.ids(self._model))) as slices:
            async for some in slices:
                unseen = await self._run(partial(_unseen, ids=some))
                if call.stopped_by is not None:
                    break
                if unseen:
                    deleted = await self._sink.delete(unseen, self._model)
                    pruned += deleted
        return pruned

    def close(self) -> None:
        """Close and delete the temporary file."""
        self._seen.close()

    async def _run(self, work: Work[T]) -> T:
        try:
            return await self._seen.run(work)
        except sqlite3.Error as error:
            raise SinkError(
                f"the ids of the source cannot be kept: {error}; make room in the folder for temporary files, or name "
                "another one in SQLITE_TMPDIR"
            ) from error


def _open_temporary() -> sqlite3.Connection:
    # SQLite documentation, "Temporary Databases": an empty name is a new file that no other connection can open. It is
    # deleted when it is closed, and not created while its content is small.
    connection = connect("")
    connection.execute("PRAGMA journal_mode = OFF")
    connection.execute("CREATE TABLE seen (id BLOB PRIMARY KEY) WITHOUT ROWID")
    connection.execute("BEGIN")  # never committed: nothing reads the file afterwards
    return connection


def _add(connection: sqlite3.Connection, keys: Sequence[bytes]) -> None:
    for some in batched(keys, KEYS_PER_STATEMENT):
        connection.execute(f"INSERT OR IGNORE INTO seen VALUES {placeholders(len(some), '(?)')}", some)


def _unseen(connection: sqlite3.Connection, ids: Sequence[str]) -> list[str]:
    seen: set[bytes] = set()
    for some in batched(map(_key, ids), KEYS_PER_STATEMENT):
        sql = f"SELECT json_group_array(hex(id)) FROM seen WHERE id IN ({placeholders(len(some))})"
        seen.update(map(bytes.fromhex, json.loads(single_value(connection, sql, tuple(some)))))
    return [id for id in ids if _key(id) not in seen]


def _key(id: str) -> bytes:
    return id.encode("utf-8", "surrogatepass")  # a source may contain half a surrogate pair, which no store takes
