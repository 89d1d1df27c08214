"""`ingest(..., prune=True)`: after a complete pass, the rows whose ids the source no longer has are deleted.

What was seen is kept in a temporary file beside the run, neither in memory, which it would outgrow, nor in the store,
where marking rows would rewrite every vector and its place in the index to say that nothing has changed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager

from ..databases.sqlite import KEYS_A_STATEMENT, marks, pieces
from ..errors import ConfigError, SinkError
from ..sending.context import CallContext
from ..sources.records import in_chunks
from ..types import PrunableSink, RecordId, Sink

logger = logging.getLogger(__name__)


class Pruning:
    """Remembers which ids a pass has seen, and deletes the others.

    Args:
        sink: Where from.
        model: Whose rows; those of other models stay.

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
        self._lock = threading.Lock()  # a cancelled run closes the file while a thread may still write to it
        # SQLite documentation, "Temporary Databases": an empty name is a file of its own that nobody else sees,
        # deleted when it is closed, and not even made as long as little is in it.
        self._seen = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._seen.execute("PRAGMA journal_mode = OFF")
        self._seen.execute("CREATE TABLE seen (id BLOB PRIMARY KEY) WITHOUT ROWID")
        self._seen.execute("BEGIN")  # never committed: nobody reads it afterwards

    async def see(self, ids: Iterable[RecordId]) -> None:
        """Remember ids of the source, those of failed records as well."""
        keys = [_key(self._sink.stored_id(id)) for id in ids]
        await asyncio.to_thread(self._add, keys)

    def _add(self, keys: Sequence[bytes]) -> None:
        with self._lock, _errors_of_ours():
            for some in pieces(keys, KEYS_A_STATEMENT):
                self._seen.execute(f"INSERT OR IGNORE INTO seen VALUES {marks(len(some), '(?)')}", some)

    async def finish(self, call: CallContext, unknown: int) -> int | None:
        """Delete what was not seen; return how many rows that were, None if the pass does not allow to tell.

        Args:
            call: Deleting ends when it is stopped.
            unknown: How many records failed without an id. Any row might be theirs, so nothing is deleted then.

        Raises:
            SinkError: The store cannot be read or written; some rows may be deleted.
        """
        if _is_stopped(call):
            return None
        if unknown:
            logger.warning("nothing was pruned: %d records failed without an id, and any row might be theirs", unknown)
            return None
        pruned = 0
        async with aclosing(in_chunks(self._sink.ids(self._model))) as slices:
            async for some in slices:
                gone = await asyncio.to_thread(self._unseen, some)
                if _is_stopped(call):
                    break
                if gone:
                    deleted = await self._sink.delete(gone, self._model)
                    pruned += deleted
        return pruned

    def _unseen(self, ids: Sequence[str]) -> list[str]:
        seen: set[bytes] = set()
        with self._lock, _errors_of_ours():
            for some in pieces(map(_key, ids), KEYS_A_STATEMENT):
                sql = f"SELECT json_group_array(hex(id)) FROM seen WHERE id IN ({marks(len(some))})"
                seen.update(map(bytes.fromhex, json.loads(self._seen.execute(sql, some).fetchone()[0])))
        return [id for id in ids if _key(id) not in seen]

    def close(self) -> None:
        """Forget all of it."""
        with self._lock:
            self._seen.close()


@contextmanager
def _errors_of_ours() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise SinkError(
            f"what was seen cannot be noted: {error}; it is kept in the folder for temporary files (SQLITE_TMPDIR)"
        ) from error


def _is_stopped(call: CallContext) -> bool:
    return call.stopped_by is not None


def _key(id: str) -> bytes:
    return id.encode("utf-8", "surrogatepass")  # half a pair is in no store, but it may be in a source
