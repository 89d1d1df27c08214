"""The statements behind `SQLiteSink`: one table in one SQLite file, on whichever connection is handed in.

Synchronous, without threads or waiting. Methods that write expect to run inside `transaction`.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Any

import numpy as np

from ...databases.sqlite import joined, marks, pieces
from ...errors import RowRefusedError, SinkConfigError, SinkError
from ...types import Hit, Row
from .. import contract as schema
from ..ranking import Ranking

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

# What there is of a table, in one row: name, type, NOT NULL, default and place in the key of each column.
_LOOK = f"""
    SELECT (SELECT json_group_array(json_array(name, type, "notnull", dflt_value, pk)) FROM pragma_table_info(?)),
        EXISTS (SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = '{schema.MODELS_TABLE}' COLLATE NOCASE)
"""

# Any number of ids in one parameter: SQLite takes at most 32,766 of them.
_AMONG = "id IN (SELECT value FROM json_each(?))"

# What SQLite raises when it will not have a row: a constraint that the user added, more than a gigabyte.
_REFUSED = (sqlite3.IntegrityError, sqlite3.DataError, OverflowError)

# Stored between two looks at whether the caller has given up.
ROWS_AT_ONCE = 128
BYTES_AT_ONCE = 768 * 1024

# The first rows, which tell whether other threads compute: then a row that is written by itself takes not 12 us but up
# to 5 ms (`sqlite_steps`), and 2,000 of them 4 s. All others then go into statements of many rows, and take 0.2 s. With
# nobody else at work those are a fifth slower than rows one by one, so that is what is done first (bench/busy.py).
ROWS_TO_TELL = 8
CROWDED_ROW_S = 0.000_1

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
        found, has_models = self._look(connection)
        if not (found and has_models):
            columns = ", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())
            connection.execute(f'CREATE TABLE IF NOT EXISTS "{self.name}" ({columns}, PRIMARY KEY ({", ".join(_KEY)}))')
            connection.execute(_CREATE_MODELS)
            found, _ = self._look(connection)
        kinds = {name: f"{kind}{' NOT NULL' * required}" for name, kind, required, *_ in found}
        key = [name for _, name in sorted((place, name) for name, *_, place in found if place)]
        unfit = [name for name, kind in _COLUMNS.items() if kinds.get(name) != kind]
        # what else there is must do without us, and leave us the number of each row, by which a search walks
        unfit += [name for name, *_ in found if name.lower() == "rowid"]
        unfit += [name for name, _, must, default, _ in found if must and default is None and name not in _COLUMNS]
        if unfit or key != _KEY:
            raise SinkConfigError(
                f"{self.where} is not a table of this library (its key is {key}, ours is {_KEY}; columns that do "
                f"not fit: {unfit}): use another table name"
            )

    def touch(self, connection: sqlite3.Connection) -> None:
        """Write what is there: of a file that cannot be written BEGIN IMMEDIATE does not say so."""
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        connection.execute(f"PRAGMA user_version = {version}")

    def _look(self, connection: sqlite3.Connection) -> tuple[list[list[Any]], bool]:
        columns, has_models = connection.execute(_LOOK, (self.name,)).fetchone()
        return json.loads(columns), bool(has_models)

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
            check: Called now and then; raises to give up.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        vector_bytes = max((row.vector.nbytes for row in rows.values()), default=1)
        most_parameters = connection.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER)
        most = max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE // vector_bytes, most_parameters // len(_COLUMNS)))
        items = list(rows.items())
        refused: schema.Refusals = {}
        is_crowded = False
        for some in chain(pieces(items[:ROWS_TO_TELL], most), pieces(items[ROWS_TO_TELL:], most)):
            check()
            began = time.perf_counter()
            refused |= self._upsert_some(connection, model, some, now, one_by_one=not is_crowded)
            is_crowded = is_crowded or time.perf_counter() - began > CROWDED_ROW_S * len(some)
        return refused | self._left_out(connection, model, rows, refused)

    def _left_out(
        self, connection: sqlite3.Connection, model: str, rows: Mapping[str, Row], refused: schema.Refusals
    ) -> schema.Refusals:
        """Return the rows that a trigger has left out without a word, by RAISE(IGNORE), if there are triggers."""
        sql = "SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ? COLLATE NOCASE)"
        if connection.execute(sql, (self.name,)).fetchone() == (0,):
            return {}
        return schema.left_out(rows, refused, self.hashes(connection, model, list(rows)), self.where)

    def _upsert_some(
        self, connection: sqlite3.Connection, model: str, rows: Sequence[tuple[str, Row]], now: str, *, one_by_one: bool
    ) -> schema.Refusals:
        values = [_values(key, model, row, now) for key, row in rows]
        try:
            if one_by_one:
                connection.executemany(self._upsert_sql(1), values)
            else:
                connection.execute(self._upsert_sql(len(rows)), list(chain.from_iterable(values)))
            return {}
        except _REFUSED as error:
            if not connection.in_transaction:
                raise  # a trigger of the user's has rolled all of it back
            if len(rows) == 1:
                ((key, row),) = rows
                return {row.id: RowRefusedError(f"row {schema.shown(key)} was refused by {self.where}: {error}")}
        # rare, so only now each for itself: a refused statement undoes only itself
        refused: schema.Refusals = {}
        for row_by_key in rows:
            refused |= self._upsert_some(connection, model, [row_by_key], now, one_by_one=True)
        return refused

    def _upsert_sql(self, count: int) -> str:
        rows = marks(count, f"({marks(len(_COLUMNS))})")
        return f"""
            INSERT INTO "{self.name}" ({", ".join(_COLUMNS)}) VALUES {rows}
            ON CONFLICT (id, model) DO UPDATE SET
                content_hash = excluded.content_hash, embedding = excluded.embedding, text = excluded.text,
                metadata = excluded.metadata, updated_at = excluded.updated_at
        """

    def hashes(self, connection: sqlite3.Connection, model: str, keys: Sequence[str]) -> dict[str, str | None]:
        """Return the content hash of each of the keys that is stored."""
        self._check_created(connection)
        sql = f'''SELECT json_group_object(id, content_hash || '') FROM "{self.name}" WHERE model = ? AND {_AMONG}'''
        found: dict[str, str | None] = json.loads(connection.execute(sql, (model, json.dumps(keys))).fetchone()[0])
        return found

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
        size, most = 4 * ranking.dimensions, max(1, SLICE_BYTES // (4 * ranking.dimensions))
        last, count, ids, blobs, unfit = connection.execute(
            f"""
            SELECT max(rowid), count(*), json_group_array(id), {_joined(connection, "embedding")},
                min(rowid) FILTER (WHERE typeof(embedding) <> 'blob' OR length(embedding) <> ?)
            FROM (SELECT rowid, id, embedding FROM "{self.name}" WHERE model = ? AND rowid > ? ORDER BY rowid LIMIT ?)
            """,
            (size, model, after, most),
        ).fetchone()
        if unfit is not None:
            raise SinkError(self._what_is_unfit(connection, unfit, ranking.dimensions))
        if count:
            vectors = np.frombuffer(_unjoined(blobs), "<f4").reshape(count, ranking.dimensions)
            ranking.offer(json.loads(ids), vectors)
        return int(last) if count == most else None

    def _what_is_unfit(self, connection: sqlite3.Connection, rowid: int, dimensions: int) -> str:
        sql = f'SELECT id, length(embedding) FROM "{self.name}" WHERE rowid = ?'
        id, size = connection.execute(sql, (rowid,)).fetchone()
        return (
            f"row {schema.shown(id)} of {self.where} holds {size} bytes where {dimensions} float32 "
            "belong: something else wrote it; delete it"
        )

    def hits(self, connection: sqlite3.Connection, model: str, best: Sequence[tuple[str, float]]) -> list[Hit]:
        """Return the ranked rows with text and metadata; without those deleted since they were ranked."""
        sql = f'''
            SELECT json_group_array(json_array(id, {_as_text("text")}, {_as_text("metadata")})) FROM "{self.name}"
            WHERE model = ? AND {_AMONG}
        '''
        keys = json.dumps([id for id, _ in best])
        (rows,) = connection.execute(sql, (model, keys)).fetchone()
        found = {id: rest for id, *rest in json.loads(rows)}
        return [Hit(id, score, found[id][0], schema.parsed(found[id][1])) for id, score in best if id in found]

    def count(self, connection: sqlite3.Connection, model: str | None) -> int:
        """Return the number of rows, of one model or of all."""
        self._check_created(connection)
        sql = f'SELECT count(*) FROM "{self.name}" WHERE model = coalesce(?, model)'
        return int(connection.execute(sql, (model,)).fetchone()[0])

    def ids(self, connection: sqlite3.Connection, model: str, after: str, limit: int) -> tuple[list[str], str | None]:
        """Return up to `limit` ids behind that one, in order, and the last of them as the file orders them."""
        self._check_created(connection)
        page = f'SELECT id FROM "{self.name}" WHERE model = ? AND id > ? ORDER BY id LIMIT ?'
        sql = f"SELECT json_group_array(id), max(id) FROM ({page})"
        ids, last = connection.execute(sql, (model, after, limit)).fetchone()
        return sorted(json.loads(ids)), last  # sorted as it is, but SQLite does not promise it of an aggregate

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


def _values(key: str, model: str, row: Row, now: str) -> tuple[object, ...]:
    return key, model, row.content_hash, schema.little_endian(row.vector), row.text, row.metadata, now, now


def _as_text(column: str) -> str:
    return f"CASE typeof({column}) WHEN 'blob' THEN NULL ELSE {column} END"  # somebody else's: JSON holds no bytes


def _joined(connection: sqlite3.Connection, column: str) -> str:
    """Return SQL for the bytes of all rows of a column of blobs, one after the other; `_unjoined` makes them of it."""
    if connection.execute("PRAGMA encoding").fetchone() == ("UTF-8",):
        return joined(column)
    return f"group_concat(hex({column}), '')"  # a file of the user's in UTF-16: as digits, which takes longer


def _unjoined(found: bytes | str) -> bytes:
    return bytes.fromhex(found) if isinstance(found, str) else found
