"""The SQL statements of `SQLiteSink`: one table, on the connection that each method is given.

Synchronous: `databases.sqlite.Database` calls these methods on its thread. Those that write run inside `transaction`.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ...databases.sqlite import batched, concatenated, placeholders, single_value
from ...errors import RowRefusedError, SinkConfigError, SinkError
from ...types import Hit, Row
from .. import contract
from ..ranking import Ranking

# `embedding` is before `text`, so that a search need not read long texts to reach it.
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
    CREATE TABLE IF NOT EXISTS {contract.MODELS_TABLE} (
        table_name TEXT NOT NULL COLLATE NOCASE, model TEXT NOT NULL, dimensions INTEGER NOT NULL,
        PRIMARY KEY (table_name, model)
    )
"""

# The columns of a table in one row, each with name, type, NOT NULL, default and position in the key.
_DESCRIBE = f"""
    SELECT (SELECT json_group_array(json_array(name, type, "notnull", dflt_value, pk)) FROM pragma_table_info(?)),
        EXISTS (SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = '{contract.MODELS_TABLE}' COLLATE NOCASE)
"""

_ID_IN = "id IN (SELECT value FROM json_each(?))"  # all in one parameter: SQLite takes at most 32,766 parameters

# Errors about a row: it violates a constraint that the user added, or has more than a gigabyte.
_REFUSED = (sqlite3.IntegrityError, sqlite3.DataError, OverflowError)

# The most that one statement stores. While another thread computes, each statement takes up to 5 ms, so few are better
# (`databases.sqlite`). While none does, those of 256 KiB take the CPU time of `executemany`, and those of 768 KiB 10 %
# more (256 to 3,072 dimensions, 2026-11). A cancelled call ends after the current statement.
ROWS_PER_STATEMENT = 128
BYTES_PER_STATEMENT = 256 * 1024

SLICE_BYTES = 8 << 20  # read and ranked in one step of a search: its other costs are small beside that


@dataclass(frozen=True, slots=True)
class Table:
    """One table of vectors."""

    name: str  # checked, so that it can be part of a statement
    where: str  # table and file, for messages

    def create(self, connection: sqlite3.Connection) -> None:
        """Create the tables that are missing; raise SinkConfigError if one exists with other columns or another key."""
        found, has_models = self._describe(connection)
        if not (found and has_models):
            columns = ", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())
            connection.execute(f'CREATE TABLE IF NOT EXISTS "{self.name}" ({columns}, PRIMARY KEY ({", ".join(_KEY)}))')
            connection.execute(_CREATE_MODELS)
            found, _ = self._describe(connection)
        kinds = {name: f"{kind}{' NOT NULL' * required}" for name, kind, required, *_ in found}
        key = [name for _, name in sorted((place, name) for name, *_, place in found if place)]
        unfit = [name for name, kind in _COLUMNS.items() if kinds.get(name) != kind]
        # a search needs the rowid, which a column of that name would hide; other columns must allow rows without them
        unfit += [name for name, *_ in found if name.lower() == "rowid"]
        unfit += [
            name for name, _, required, default, _ in found if required and default is None and name not in _COLUMNS
        ]
        if unfit or key != _KEY:
            raise SinkConfigError(
                f"{self.where} is not a table of this library (its key is {key}, ours is {_KEY}; columns that do "
                f"not fit: {unfit}): use another table name"
            )

    def touch(self, connection: sqlite3.Connection) -> None:
        """Write an unchanged value: BEGIN IMMEDIATE alone does not fail if the file is read-only."""
        connection.execute(f"PRAGMA user_version = {single_value(connection, 'PRAGMA user_version')}")

    def _describe(self, connection: sqlite3.Connection) -> tuple[list[list[Any]], bool]:
        columns, has_models = connection.execute(_DESCRIBE, (self.name,)).fetchone()
        return json.loads(columns), bool(has_models)

    def record(self, connection: sqlite3.Connection, model: str, dimensions: int) -> int:
        """Return the dimensions of the model's stored vectors; if there are none, record the given ones."""
        recorded = connection.execute(
            f"SELECT dimensions FROM {contract.MODELS_TABLE} WHERE table_name = ? AND model = ?", (self.name, model)
        ).fetchone()
        if recorded == (dimensions,):
            return dimensions
        # no record, or a different one: the rows decide, since the user may have inserted or deleted some
        stored = connection.execute(
            f'SELECT length(embedding) / 4 FROM "{self.name}" WHERE model = ? LIMIT 1', (model,)
        ).fetchone()
        size = int(stored[0]) if stored else dimensions
        connection.execute(f"INSERT OR REPLACE INTO {contract.MODELS_TABLE} VALUES (?, ?, ?)", (self.name, model, size))
        return size

    def upsert(
        self, connection: sqlite3.Connection, model: str, rows: Mapping[str, Row], check: Callable[[], None]
    ) -> contract.Refusals:
        """Store the admitted rows; return those that SQLite refuses: too large, or against a constraint of the user.

        `check` is called before each statement, and raises to roll back.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        vector_bytes = max((row.vector.nbytes for row in rows.values()), default=1)
        max_parameters = connection.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER)
        size = max(1, min(ROWS_PER_STATEMENT, BYTES_PER_STATEMENT // vector_bytes, max_parameters // len(_COLUMNS)))
        refused: contract.Refusals = {}
        for batch in batched(rows.items(), size):
            check()
            refused |= self._upsert_batch(connection, model, batch, now)
        # a trigger may leave rows out by RAISE(IGNORE), which raises no error
        sql = "SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ? COLLATE NOCASE)"
        if not single_value(connection, sql, (self.name,)):
            return refused
        return refused | contract.left_out(rows, refused, self.hashes(connection, model, list(rows)), self.where)

    def _upsert_batch(
        self, connection: sqlite3.Connection, model: str, rows: Sequence[tuple[str, Row]], now: str
    ) -> contract.Refusals:
        values: list[object] = []
        for key, row in rows:
            vector = contract.little_endian(row.vector)
            values += (key, model, row.content_hash, vector, row.text, row.metadata, now, now)
        try:
            connection.execute(self._upsert_sql(len(rows)), values)
            return {}
        except _REFUSED as error:
            if not connection.in_transaction:
                raise  # a trigger of the user has rolled back the transaction
            if len(rows) == 1:
                ((key, row),) = rows
                return {row.id: RowRefusedError(f"row {contract.shown(key)} was refused by {self.where}: {error}")}
        # rare, so each row gets its own statement only now; a refused statement undoes only itself
        refused: contract.Refusals = {}
        for row_by_key in rows:
            refused |= self._upsert_batch(connection, model, [row_by_key], now)
        return refused

    def _upsert_sql(self, count: int) -> str:
        rows = placeholders(count, f"({placeholders(len(_COLUMNS))})")
        return f"""
            INSERT INTO "{self.name}" ({", ".join(_COLUMNS)}) VALUES {rows}
            ON CONFLICT (id, model) DO UPDATE SET
                content_hash = excluded.content_hash, embedding = excluded.embedding, text = excluded.text,
                metadata = excluded.metadata, updated_at = excluded.updated_at
        """

    def hashes(self, connection: sqlite3.Connection, model: str, keys: Sequence[str]) -> dict[str, str | None]:
        """Return the content hash of each stored key."""
        self._check_created(connection)
        sql = f'''SELECT json_group_object(id, content_hash || '') FROM "{self.name}" WHERE model = ? AND {_ID_IN}'''
        return dict(json.loads(single_value(connection, sql, (model, json.dumps(keys)))))

    def models(self, connection: sqlite3.Connection, *, with_rows: bool = True) -> dict[str, int]:
        """Return the models that have rows, or all that are recorded, each with the dimensions of its vectors."""
        self._check_created(connection)
        sql = f"SELECT model, dimensions FROM {contract.MODELS_TABLE} AS known WHERE table_name = ?"
        if with_rows:
            sql += f' AND EXISTS (SELECT 1 FROM "{self.name}" AS stored WHERE stored.model = known.model)'
        return dict(connection.execute(sql, (self.name,)))

    def candidates(self, connection: sqlite3.Connection, model: str | None) -> dict[str, int]:
        """Return the models that a search can mean: as `models`, but looking for rows only if the choice needs it."""
        recorded = self.models(connection, with_rows=False)
        return recorded if model in recorded or len(recorded) < 2 else self.models(connection)

    def rank_slice(self, connection: sqlite3.Connection, model: str, ranking: Ranking, after: int) -> int | None:
        """Offer the next rows after the given rowid to the ranking; return their last rowid, None at the end."""
        size, limit = 4 * ranking.dimensions, max(1, SLICE_BYTES // (4 * ranking.dimensions))
        last, count, ids, blobs, unfit = connection.execute(
            f"""
            SELECT max(rowid), count(*), json_group_array(id), {_concatenated(connection, "embedding")},
                min(rowid) FILTER (WHERE typeof(embedding) <> 'blob' OR length(embedding) <> ?)
            FROM (SELECT rowid, id, embedding FROM "{self.name}" WHERE model = ? AND rowid > ? ORDER BY rowid LIMIT ?)
            """,
            (size, model, after, limit),
        ).fetchone()
        if unfit is not None:
            raise SinkError(self._unfit_row(connection, unfit, ranking.dimensions))
        if count:
            vectors = np.frombuffer(bytes.fromhex(blobs) if isinstance(blobs, str) else blobs, "<f4")
            ranking.offer(json.loads(ids), vectors.reshape(count, ranking.dimensions))
        return int(last) if count == limit else None

    def _unfit_row(self, connection: sqlite3.Connection, rowid: int, dimensions: int) -> str:
        sql = f'SELECT id, length(embedding) FROM "{self.name}" WHERE rowid = ?'
        id, size = connection.execute(sql, (rowid,)).fetchone()
        return (
            f"row {contract.shown(id)} of {self.where} holds {size} bytes where {dimensions} float32 "
            "belong: another program wrote it; delete it"
        )

    def hits(self, connection: sqlite3.Connection, model: str, best: Sequence[tuple[str, float]]) -> list[Hit]:
        """Return the ranked rows with text and metadata, except those deleted since they were ranked."""
        sql = f'''
            SELECT json_group_array(json_array(id, {_as_text("text")}, {_as_text("metadata")})) FROM "{self.name}"
            WHERE model = ? AND {_ID_IN}
        '''
        rows = single_value(connection, sql, (model, json.dumps([id for id, _ in best])))
        found = {id: rest for id, *rest in json.loads(rows)}
        return [Hit(id, score, found[id][0], contract.parsed(found[id][1])) for id, score in best if id in found]

    def count(self, connection: sqlite3.Connection, model: str | None) -> int:
        """Return the number of rows, of one model or of all."""
        self._check_created(connection)
        sql = f'SELECT count(*) FROM "{self.name}" WHERE model = coalesce(?, model)'
        return int(single_value(connection, sql, (model,)))

    def ids(self, connection: sqlite3.Connection, model: str, after: str, limit: int) -> tuple[list[str], str | None]:
        """Return up to `limit` ids after the given one, in order, and the last of them in the order of the file."""
        self._check_created(connection)
        page = f'SELECT id FROM "{self.name}" WHERE model = ? AND id > ? ORDER BY id LIMIT ?'
        sql = f"SELECT json_group_array(id), max(id) FROM ({page})"
        ids, last = connection.execute(sql, (model, after, limit)).fetchone()
        return sorted(json.loads(ids)), last  # sorted already, but SQLite does not promise it for an aggregate

    def delete(self, connection: sqlite3.Connection, model: str, keys: Sequence[str]) -> int:
        """Delete the rows; return how many were deleted."""
        self._check_created(connection)
        sql = f'DELETE FROM "{self.name}" WHERE model = ? AND {_ID_IN}'
        return connection.execute(sql, (model, json.dumps(keys))).rowcount

    def _check_created(self, connection: sqlite3.Connection) -> None:
        sql = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name COLLATE NOCASE IN (?, ?)"
        if single_value(connection, sql, (self.name, contract.MODELS_TABLE)) != 2:
            raise SinkConfigError(f"{self.where} does not exist yet: ingest into it first")


def _as_text(column: str) -> str:
    # only another program stores blobs there, and JSON has no bytes
    return f"CASE typeof({column}) WHEN 'blob' THEN NULL ELSE {column} END"


def _concatenated(connection: sqlite3.Connection, column: str) -> str:
    """Return SQL for the concatenated bytes of a column; as hexadecimal text in a UTF-16 file, which takes longer."""
    is_utf8 = single_value(connection, "PRAGMA encoding") == "UTF-8"
    return concatenated(column) if is_utf8 else f"group_concat(hex({column}), '')"
