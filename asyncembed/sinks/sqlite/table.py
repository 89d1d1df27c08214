"""The statements behind `SQLiteSink`: one table in one SQLite file, on whichever connection is handed in.

Synchronous, without threads or waiting. Methods that write expect to run inside `transaction`.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from ...errors import RowRefusedError, SinkConfigError, SinkError
from ...types import Hit, Row
from .. import schema
from ..search import Ranking

# `embedding` stands before `text`, so that a search does not walk over long texts to reach it.
_COLUMNS = {
    "id": "TEXT NOT NULL",
    "model": "TEXT NOT NULL",
    "content_hash": "TEXT",
    "embedding": "BLOB NOT NULL",
    "text": "TEXT",
    "metadata": "TEXT",
    "created_at": "TEXT NOT NULL",
    "updated_at": "TEXT NOT NULL",
}
_KEY = ["id", "model"]

_CREATE_MODELS = f"""
    CREATE TABLE IF NOT EXISTS {schema.MODELS_TABLE} (
        table_name TEXT NOT NULL COLLATE NOCASE, model TEXT NOT NULL, dimensions INTEGER NOT NULL,
        PRIMARY KEY (table_name, model)
    )
"""

# Any number of ids in one parameter: SQLite takes at most 32,766 of them.
_AMONG = "id IN (SELECT value FROM json_each(?))"

# What SQLite raises when it will not have a row: a constraint that the user added, more than a gigabyte.
_REFUSED = (sqlite3.IntegrityError, sqlite3.DataError, OverflowError)

# Blobs read and ranked at a time in a search: the rest of a step costs little beside reading them.
SLICE_BYTES = 8 << 20


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit at the end, or roll back whatever is raised."""
    # begun as a reader it might learn at its first write that it can never have the lock (SQLITE_BUSY_SNAPSHOT)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite has rolled back by itself when the disk was full
            connection.execute("ROLLBACK")
        raise


@dataclass(frozen=True, slots=True)
class Table:
    """One table of ours.

    Attributes:
        name: Checked, so that it can stand in a statement.
        where: Table and file, for messages.
    """

    name: str
    where: str

    def create(self, connection: sqlite3.Connection) -> None:
        """Create what is missing.

        Raises:
            SinkConfigError: A table of that name exists with other columns or another key.
        """
        columns = ", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())
        connection.execute(f'CREATE TABLE IF NOT EXISTS "{self.name}" ({columns}, PRIMARY KEY ({", ".join(_KEY)}))')
        connection.execute(_CREATE_MODELS)
        found = connection.execute(f'PRAGMA table_info("{self.name}")').fetchall()
        kinds = {name: f"{kind}{' NOT NULL' * required}" for _, name, kind, required, *_ in found}
        key = [name for _, name in sorted((place, name) for _, name, *_, place in found if place)]
        unfit = [name for name, kind in _COLUMNS.items() if kinds.get(name) != kind]
        # what else there is must do without us
        unfit += [name for _, name, _, must, default, _ in found if must and default is None and name not in _COLUMNS]
        if unfit or key != _KEY:
            raise SinkConfigError(
                f"{self.where} is not a table of this library (its key is {key}, ours is {_KEY}; columns that do "
                f"not fit: {unfit}): use another table name"
            )

    def record(self, connection: sqlite3.Connection, model: str, dimensions: int) -> int:
        """Return the size of the model's stored vectors; if there are none, record the given one."""
        recorded = connection.execute(
            f"SELECT dimensions FROM {schema.MODELS_TABLE} WHERE table_name = ? AND model = ?", (self.name, model)
        ).fetchone()
        if recorded == (dimensions,):
            return dimensions
        # no record, or another: the rows decide, since they may have been put in or deleted by hand
        stored = connection.execute(
            f'SELECT length(embedding) / 4 FROM "{self.name}" WHERE model = ? LIMIT 1', (model,)
        ).fetchone()
        size = int(stored[0]) if stored else dimensions
        connection.execute(f"INSERT OR REPLACE INTO {schema.MODELS_TABLE} VALUES (?, ?, ?)", (self.name, model, size))
        return size

    def upsert(
        self, connection: sqlite3.Connection, model: str, rows: Mapping[str, Row], check: Callable[[], None]
    ) -> schema.Refusals:
        """Store the rows; return those that SQLite refuses: too large, or against a constraint the user added.

        Args:
            connection: Inside a transaction.
            model: Part of every row's key.
            rows: By key, as `schema.admit` returns them.
            check: Called before every row; raises to give up.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        sql = f"""
            INSERT INTO "{self.name}" (id, model, content_hash, embedding, text, metadata, created_at, updated_at)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?)
            ON CONFLICT (id, model) DO UPDATE SET
                content_hash = excluded.content_hash, embedding = excluded.embedding, text = excluded.text,
                metadata = excluded.metadata, updated_at = excluded.updated_at
        """

        def values(key: str, row: Row) -> tuple[object, ...]:
            check()
            blob = schema.little_endian(row.vector)
            return key, model, row.content_hash, blob, row.text, row.metadata, now, now

        try:
            connection.executemany(sql, (values(key, row) for key, row in rows.items()))
            return {}
        except _REFUSED:
            if not connection.in_transaction:
                raise  # a trigger of the user's has rolled all of it back
            refused: schema.Refusals = {}  # rare, so only now one by one: a refused statement undoes only itself
        for key, row in rows.items():
            try:
                connection.execute(sql, values(key, row))
            except _REFUSED as error:
                refused[row.id] = RowRefusedError(f"row {schema.shown(key)} was refused by {self.where}: {error}")
        return refused

    def hashes(self, connection: sqlite3.Connection, model: str, keys: Sequence[str]) -> dict[str, str | None]:
        """Return the content hash of each of the keys that is stored."""
        self._check_created(connection)
        sql = f'SELECT id, content_hash FROM "{self.name}" WHERE model = ? AND {_AMONG}'
        return dict(connection.execute(sql, (model, json.dumps(keys))))

    def models(self, connection: sqlite3.Connection) -> dict[str, int]:
        """Return the models that have rows, each with the dimensions of its vectors."""
        return self._recorded(
            connection, f'AND EXISTS (SELECT 1 FROM "{self.name}" AS stored WHERE stored.model = known.model)'
        )

    def candidates(self, connection: sqlite3.Connection, model: str | None) -> dict[str, int]:
        """Return what `models` does, but without looking for rows if that decides nothing about that model."""
        recorded = self._recorded(connection)
        return recorded if model in recorded or len(recorded) < 2 else self.models(connection)

    def _recorded(self, connection: sqlite3.Connection, condition: str = "") -> dict[str, int]:
        self._check_created(connection)
        sql = f"SELECT model, dimensions FROM {schema.MODELS_TABLE} AS known WHERE table_name = ? {condition}"
        return dict(connection.execute(sql, (self.name,)))

    def rank_slice(self, connection: sqlite3.Connection, model: str, ranking: Ranking, after: int) -> int | None:
        """Offer the next rows behind that rowid to the ranking; return the last one's, None at the end."""
        dimensions = ranking.dimensions
        found = connection.execute(
            f'SELECT rowid, id, embedding FROM "{self.name}" WHERE model = ? AND rowid > ? ORDER BY rowid LIMIT ?',
            (model, after, max(1, SLICE_BYTES // (4 * dimensions))),
        ).fetchall()
        if not found:
            return None
        rowids, ids, blobs = zip(*found, strict=True)
        if set(map(len, blobs)) != {4 * dimensions}:
            id, blob = next((id, blob) for _, id, blob in found if len(blob) != 4 * dimensions)
            raise SinkError(
                f"row {schema.shown(id)} of {self.where} holds {len(blob)} bytes where {dimensions} float32 "
                "belong: something else wrote it; delete it"
            )
        ranking.offer(ids, np.frombuffer(b"".join(blobs), "<f4").reshape(len(blobs), dimensions))
        return int(rowids[-1])

    def hits(self, connection: sqlite3.Connection, model: str, best: Sequence[tuple[str, float]]) -> list[Hit]:
        """Return the ranked rows with text and metadata; without those deleted since they were ranked."""
        sql = f'SELECT id, text, metadata FROM "{self.name}" WHERE model = ? AND {_AMONG}'
        keys = json.dumps([id for id, _ in best])
        found = {id: rest for id, *rest in connection.execute(sql, (model, keys))}
        return [Hit(id, score, found[id][0], schema.parsed(found[id][1])) for id, score in best if id in found]

    def count(self, connection: sqlite3.Connection, model: str | None) -> int:
        """Return the number of rows, of one model or of all."""
        self._check_created(connection)
        sql = f'SELECT count(*) FROM "{self.name}" WHERE model = coalesce(?, model)'
        return int(connection.execute(sql, (model,)).fetchone()[0])

    def ids(self, connection: sqlite3.Connection, model: str, after: str, limit: int) -> list[str]:
        """Return up to `limit` ids behind that one, in order."""
        self._check_created(connection)
        sql = f'SELECT id FROM "{self.name}" WHERE model = ? AND id > ? ORDER BY id LIMIT ?'
        return [id for (id,) in connection.execute(sql, (model, after, limit))]

    def delete(self, connection: sqlite3.Connection, model: str, keys: Sequence[str]) -> int:
        """Delete the rows; return how many there were."""
        self._check_created(connection)
        sql = f'DELETE FROM "{self.name}" WHERE model = ? AND {_AMONG}'
        return connection.execute(sql, (model, json.dumps(keys))).rowcount

    def _check_created(self, connection: sqlite3.Connection) -> None:
        (tables,) = connection.execute(
            "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name COLLATE NOCASE IN (?, ?)",
            (self.name, schema.MODELS_TABLE),
        ).fetchone()
        if tables != 2:
            raise SinkConfigError(f"{self.where} does not exist yet: ingest into it first")
