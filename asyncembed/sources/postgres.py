"""The rows of a query, from PostgreSQL through a server-side cursor: in bounded memory, and without changing any."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import date, datetime, time, timedelta
from typing import Any, Final, NoReturn, Self
from urllib.parse import unquote_plus

from ..databases.postgres import CLOSE_S, CONNECT_S, FOREIGN, Connection, Pool, connect, described
from ..databases.postgres_errors import is_our_fault, reason_of, verdict_on
from ..errors import AsyncEmbedError, ConfigError, SourceError
from .formats import Fields, RecordOrError, record_from_fields

# Rows fetched at once: half of what a slice of the pipeline holds.
ROWS_AT_ONCE: Final = 500

# The driver's cursor lives as long as a transaction, which waits here for providers, not for the server.
_BEGIN: Final = "BEGIN READ ONLY; SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0"

# Since version 17 there is a limit for transactions, too.
_AS_LONG_AS_IT_TAKES: Final = "SELECT set_config(name, '0', true) FROM pg_settings WHERE name = 'transaction_timeout'"

_QUERY: Final = re.compile(r"[?&]query=")


class PostgresSource:
    """An async iterable of the records in a query's rows; an `InputError` stands for each that is none.

    Columns named `id_field` and `text_field` hold a record's id and text; without a column `text`, `title` and
    `content` are joined as `title\\ncontent`. All others become metadata, with that of a JSON object in a column
    `metadata` spread: json and jsonb as what they hold, arrays and points as lists, times as ISO 8601, intervals as
    seconds, bytea as hexadecimal digits, and all that JSON has no word for (numeric, uuid, inet, ranges) as text.

    One transaction is open from the first row to the last. It reads what was there when it began, so rows may be
    changed meanwhile, also by what is made of these records; but VACUUM cannot clean up behind it until it ends.

    Args:
        dsn_or_pool: `postgresql://user:password@host/database`, or an `asyncpg.Pool`, which is never closed here.
        query: `SELECT id, text FROM docs WHERE embedding IS NULL`; `TABLE docs` reads a whole table.
        args: The values for $1, $2, … in it.
        id_field: The column that holds the id.
        text_field: The one that holds the text.

    Raises:
        ConfigError: The address is none. It is not shown: it may hold a password.
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

        What follows `query=` up to the end is the query. With a space in it it is taken as it is; without any it is
        decoded as in every URL, and then ends at the next `&`.

        Raises:
            ConfigError: There is no query, or the rest is no address. It is not shown.
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
        """See whether the query can be run, and has the columns that are needed; run nothing.

        Raises:
            ConfigError: It cannot, or has not.
            SourceError: The server does not answer.
        """
        async with self._connected() as connection:
            await self._prepared(connection)

    async def __aiter__(self) -> AsyncIterator[RecordOrError]:
        async with self._connected() as connection:
            statement, plain = await self._prepared(connection)
            number = 0
            async for row in statement.cursor(*self._args, prefetch=ROWS_AT_ONCE):
                number += 1
                values = {name: convert(row[name]) for name, convert in plain.items()}
                yield record_from_fields(values, f"row {number}", self._fields)

    @asynccontextmanager
    async def _connected(self) -> AsyncGenerator[Connection, None]:
        """A connection in a transaction that only reads. If it does not end well it is cut, and so rolled back."""
        connection: Connection | None = None
        ended = False
        try:
            connection = await self._connect()
            await connection.execute(_BEGIN)
            await connection.execute(_AS_LONG_AS_IT_TAKES)
            yield connection
            await connection.execute("COMMIT")
            ended = True
        except AsyncEmbedError:
            raise
        except FOREIGN as error:
            self._fail(error, reached=connection is not None)
        finally:
            if connection is not None:
                await self._let_go(connection, cut=not ended)

    async def _connect(self) -> Connection:
        if isinstance(self._from, str):
            return await connect(self._from)
        return await self._from.acquire(timeout=CONNECT_S)

    async def _let_go(self, connection: Connection, *, cut: bool) -> None:
        if cut:
            connection.terminate()
        with suppress(*FOREIGN):  # the rows are read, or what kept them from it is told already
            if isinstance(self._from, str):
                await connection.close(timeout=CLOSE_S)
            else:
                await self._from.release(connection, timeout=CLOSE_S)

    def _fail(self, error: Exception, *, reached: bool) -> NoReturn:
        verdict = verdict_on(error, reached=reached)
        kind = ConfigError if verdict == "config" else SourceError
        # rows may be quoted in the server's errors, and addresses with their passwords in asyncpg's
        hides = verdict == "row" or is_our_fault(error)
        reason = reason_of(error, verdict, waited_s=CONNECT_S)
        if reached and is_our_fault(error) and type(error).__name__ != "DataError":  # which is about args=
            # a date before Christ, "24:00": there is none such in Python
            kind, reason = SourceError, "a row holds a value that the driver cannot read: cast its column to text"
        raise kind(f"{self._name}: {reason}") from (None if hides else error)

    async def _prepared(self, connection: Connection) -> tuple[Any, dict[str, Callable[[Any], Any]]]:
        """Return the statement, and for each of its columns what makes JSON of its values."""
        statement = await connection.prepare(self._query)
        columns = statement.get_attributes()
        names = [column.name for column in columns]
        wanted = len(statement.get_parameters())
        if wanted != len(self._args):
            raise ConfigError(f"{self._name} has {wanted} parameters, and args= has {len(self._args)} values")
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ConfigError(f"{self._name} has several columns named {', '.join(doubled)}: name them apart with AS")
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
    """Return what a JSON column holds; asyncpg hands it out as text, unless a pool was told otherwise."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _plain(value: Any) -> Any:
    """Return the value as JSON can hold it."""
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
    if isinstance(value, Mapping) or hasattr(value, "keys"):  # a composite, which is no Mapping
        return {name: _plain(one) for name, one in value.items()}
    return str(value)
