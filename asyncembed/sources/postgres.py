"""Reads the rows of a PostgreSQL query as records, through a server-side cursor: in bounded memory, read-only."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import date, datetime, time, timedelta
from typing import Any, Final, NoReturn, Self
from urllib.parse import unquote_plus

from ..databases.postgres import CLOSE_S, CONNECT_S, FOREIGN, Connection, Pool, connect, described
from ..databases.postgres_errors import is_our_fault, reason_of, shown_cause, verdict_on
from ..errors import AsyncEmbedError, ConfigError, SourceError
from .formats import Fields, RecordOrError, record_from_fields

ROWS_AT_ONCE: Final = 500  # fetched at a time: half as many as a slice of the pipeline holds

# A cursor needs an open transaction, which is idle here while the provider works: the limits of the role are lifted.
_BEGIN: Final = "BEGIN READ ONLY; SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0"

# PostgreSQL 17 added a limit for transactions.
_NO_TRANSACTION_LIMIT: Final = "SELECT set_config(name, '0', true) FROM pg_settings WHERE name = 'transaction_timeout'"

_QUERY: Final = re.compile(r"[?&]query=")


class PostgresSource:
    """An async iterable of the rows of a query as records; a row that is no record is yielded as an `InputError`.

    The columns `id_field` and `text_field` hold the id and the text; without a column `text`, `title` and `content`
    are joined as `title\\ncontent`. All other columns become metadata. A JSON object in a column `metadata` is spread
    into it. JSON values stay as they are, arrays and points become lists, times ISO 8601, intervals seconds, bytea
    hexadecimal digits, and types that JSON does not have (numeric, uuid, inet, ranges) text.

    One transaction is open from the first row to the last. It reads the rows as they were when it began, so they may
    be changed meanwhile, also by a sink that stores these records. VACUUM cannot clean up rows until it ends.

    Args:
        dsn_or_pool: `postgresql://user:password@host/database`, or an `asyncpg.Pool`, which is never closed here.
        query: `SELECT id, text FROM docs WHERE embedding IS NULL`; `TABLE docs` reads a whole table.
        args: The values for its $1, $2, …
        id_field: The column that holds the id.
        text_field: The column that holds the text.

    Raises:
        ConfigError: The address is not valid. It is not shown: it may hold a password.
    """

    def __init__(
        self,
        dsn_or_pool: str | Pool,
        query: str,
        *,
        args: Sequence[Any] = (),
        id_field: str = "id",
        text_field: str = "text",
    ) -> None:
        if not isinstance(dsn_or_pool, str | Pool):
            raise ConfigError(f"a PostgresSource takes an address or an asyncpg Pool, not {type(dsn_or_pool).__name__}")
        if not query.strip():
            raise ConfigError("the query is empty")
        self._from = dsn_or_pool
        self._query = query
        self._args = tuple(args)
        self._fields = Fields(id_field, text_field)
        self._name = f"the query in {described(dsn_or_pool)}"

    @classmethod
    def from_url(cls, url: str, *, id_field: str = "id", text_field: str = "text") -> Self:
        """Return the source for `postgresql://user@host/database?query=…`.

        The query is everything after `query=`. If it has a space it is used as it is; if not, it is decoded like any
        URL and ends at the next `&`.

        Raises:
            ConfigError: The query is missing, or the rest is not a valid address. It is not shown.
        """
        found = _QUERY.search(url)
        if found is None:
            raise ConfigError("a source in PostgreSQL needs a query: postgresql://user@host/database?query=SELECT …")
        dsn, query = url[: found.start()], url[found.end() :]
        if not re.search(r"\s", query):
            query, _, options = query.partition("&")
            query = unquote_plus(query)
            dsn += f"{'&' if '?' in dsn else '?'}{options}" if options else ""
        return cls(dsn, query, id_field=id_field, text_field=text_field)

    def __repr__(self) -> str:
        return f"PostgresSource({self._name})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a PostgresSource cannot be pickled: it holds a password")

    async def check(self) -> None:
        """Check that the query can be run and has the columns that are needed, without running it.

        Raises:
            ConfigError: It cannot be run, or lacks a column.
            SourceError: The server does not answer.
        """
        async with self._transaction() as connection:
            await self._prepared(connection)

    async def __aiter__(self) -> AsyncIterator[RecordOrError]:
        async with self._transaction() as connection:
            statement, plain = await self._prepared(connection)
            number = 0
            async for row in statement.cursor(*self._args, prefetch=ROWS_AT_ONCE):
                number += 1
                values = {name: convert(row[name]) for name, convert in plain.items()}
                yield record_from_fields(values, f"row {number}", self._fields)

    @asynccontextmanager
    async def _transaction(self) -> AsyncGenerator[Connection, None]:
        """A connection in a read-only transaction. If the block fails the connection is cut, and so rolled back."""
        connection: Connection | None = None
        try:
            if isinstance(self._from, str):
                connection = await connect(self._from)
            else:
                connection = await self._from.acquire(timeout=CONNECT_S)
            await connection.execute(_BEGIN)
            await connection.execute(_NO_TRANSACTION_LIMIT)
            yield connection
            await connection.execute("COMMIT")
        except BaseException as error:
            if connection is not None:
                connection.terminate()
            if isinstance(error, FOREIGN) and not isinstance(error, AsyncEmbedError):
                self._fail(error, reached=connection is not None)
            raise
        finally:
            if connection is not None:
                with suppress(*FOREIGN):  # all rows were read, or an error is raised already
                    if isinstance(self._from, str):
                        await connection.close(timeout=CLOSE_S)
                    else:
                        await self._from.release(connection, timeout=CLOSE_S)

    def _fail(self, error: Exception, *, reached: bool) -> NoReturn:
        verdict = verdict_on(error, reached=reached)
        kind = ConfigError if verdict == "config" else SourceError
        reason = reason_of(error, verdict, waited_s=CONNECT_S)
        if reached and is_our_fault(error) and type(error).__name__ != "DataError":  # a DataError is about args=
            # for instance a date before Christ, or "24:00", which Python's types cannot hold
            kind, reason = SourceError, "a row holds a value that the driver cannot read: cast its column to text"
        raise kind(f"{self._name}: {reason}") from shown_cause(error, verdict)

    async def _prepared(self, connection: Connection) -> tuple[Any, dict[str, Callable[[Any], Any]]]:
        """Return the statement, and for each of its columns the function that makes its values fit for JSON."""
        statement = await connection.prepare(self._query)
        columns = statement.get_attributes()
        names = [column.name for column in columns]
        wanted = len(statement.get_parameters())
        if wanted != len(self._args):
            raise ConfigError(f"{self._name} has {wanted} parameters, and args= has {len(self._args)} values")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ConfigError(f"{self._name} has several columns named {', '.join(repeated)}: name them apart with AS")
        id, text = self._fields.id, self._fields.text
        if id not in names or (text not in names and not (text == "text" and "content" in names)):
            raise ConfigError(
                f"{self._name} has the columns {', '.join(names) or 'none'}; it needs {id} and {text}"
                f"{', or id, title and content' if (id, text) == ('id', 'text') else ''}: name them with AS"
            )
        return statement, {
            column.name: _parsed if column.type.name in ("json", "jsonb") else _plain for column in columns
        }


def _parsed(value: Any) -> Any:
    """Return the value of a JSON column, which asyncpg returns as text unless a pool has another codec."""
    with suppress(TypeError, ValueError):
        return json.loads(value)
    return value


def _plain(value: Any) -> Any:
    """Return the value in a form that JSON can hold."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping) or hasattr(value, "keys"):  # a composite type
        return {name: _plain(one) for name, one in value.items()}
    return str(value)
