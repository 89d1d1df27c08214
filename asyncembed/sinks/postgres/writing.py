"""Writes rows into a table, inside a transaction that the caller began; a row that the table refuses fails alone.

Errors of the driver are recognised by their SQLSTATE; those that are not about a row are passed on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...databases.postgres_errors import sqlstate_of, verdict_on
from ...errors import RowRefusedError
from ...types import Row
from .. import contract
from ..contract import Refusals, shown
from . import statements
from .table import Table

# Whether a trigger sees rows before they are stored (pg_trigger.h: TRIGGER_TYPE_ROW is 1, TRIGGER_TYPE_BEFORE is 2).
_HAS_TRIGGER = "SELECT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = to_regclass($1::text) AND tgtype & 3 = 3)"

# If the first rows, this many, are all refused for lack of rights or columns, the reason is not in the rows.
ENOUGH_REFUSED = 8


async def store(connection: Any, table: Table, model: str, rows: Mapping[Any, Row]) -> Refusals:
    """Write the rows, by converted id and in its order; return those that the table refuses, with their errors."""
    refused: Refusals = {}
    if table.update_only:
        found = {row[0] for row in await connection.fetch(statements.lock(table), list(rows), model)}
        refused = {
            row.id: RowRefusedError(f"row {shown(str(row.id))} is not in {table.where}, which is only filled")
            for key, row in rows.items()
            if str(key) not in found
        }
        rows = {key: row for key, row in rows.items() if str(key) in found}
    refused = refused | await _store_by_halves(connection, table, model, list(rows.items()))
    if table.update_only or not await connection.fetchval(_HAS_TRIGGER, table.sql_name):
        return refused
    stored = dict(await connection.fetch(statements.hashes(table), model, list(rows)))
    has_hashes = "content_hash" in table.columns
    return refused | contract.left_out(rows, refused, stored, table.where, has_hashes=has_hashes)


async def _store_by_halves(connection: Any, table: Table, model: str, rows: Sequence[tuple[Any, Row]]) -> Refusals:
    """Write all rows at once; halve what is refused until only the bad rows are left."""
    refused: Refusals = {}
    parts = [rows]
    stored = 0
    while parts:
        part = parts.pop()
        error = await _store_part(connection, table, model, part)
        # not inside `except`: an error here would have the server's as its context, which may quote a text
        if error is None:
            stored += len(part)
            if parts:
                await connection.execute("RELEASE SAVEPOINT part")
            continue
        await connection.execute("ROLLBACK TO SAVEPOINT part; RELEASE SAVEPOINT part")
        if len(part) > 1:
            middle = len(part) // 2
            parts += [part[middle:], part[:middle]]
            continue
        row = part[0][1]
        refused[row.id] = _refusal(row, table, error)
        # a policy may refuse all of a few rows with insufficient_privilege; missing rights were found by `prepare`
        enough = ENOUGH_REFUSED if sqlstate_of(error) == "42501" else min(len(rows), ENOUGH_REFUSED)
        if verdict_on(error) != "row" and not stored and len(refused) == enough:
            raise error  # no row can be written into this table any more
    return refused


async def _store_part(connection: Any, table: Table, model: str, rows: Sequence[tuple[Any, Row]]) -> Exception | None:
    """Write the rows after a savepoint; return the server's error if it may be about one of them."""
    statement = statements.update(table) if table.update_only else statements.insert(table)
    parameters = statements.parameters(table, model)
    await connection.execute("SAVEPOINT part")
    try:
        await connection.executemany(statement, (parameters(key, row) for key, row in rows))
    except Exception as error:
        # a trigger may raise any error, and a policy raises the same one as missing rights
        if verdict_on(error) == "row" or (verdict_on(error) == "config" and sqlstate_of(error) is not None):
            return error
        raise
    return None


def _refusal(row: Row, table: Table, error: Any) -> RowRefusedError:
    # without the server's message, which may quote the text
    constraint = f" of constraint {error.constraint_name!r}" if getattr(error, "constraint_name", None) else ""
    return RowRefusedError(
        f"row {shown(str(row.id))} was refused by {table.where}: "
        f"{type(error).__name__}{constraint} (SQLSTATE {error.sqlstate})"
    )
