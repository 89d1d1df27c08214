"""Rows into a table, inside a transaction that the caller began; those that the table refuses fail alone.

Errors of the driver are known by their SQLSTATE; what they do not mean here passes through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...databases.postgres_errors import sqlstate_of, verdict_on
from ...errors import RowRefusedError
from ...types import Row
from .. import contract as schema
from .statements import Layout

# Whether a trigger sees rows before they are stored (pg_trigger.h: TRIGGER_TYPE_ROW is 1, TRIGGER_TYPE_BEFORE is 2).
_MAY_LEAVE_OUT = "SELECT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = to_regclass($1::text) AND tgtype & 3 = 3)"

# So many rows refused for want of rights or columns, and not one stored, are not about rows.
ENOUGH_REFUSED = 8


class RefusedError(Exception):
    """The server refused the batch for one of its rows. Once more, and carefully: then it is known which."""


async def store(
    connection: Any, layout: Layout, model: str, rows: Mapping[Any, Row], *, carefully: bool
) -> schema.Refusals:
    """Write the rows, by converted id and in its order; return those that the table refuses.

    Args:
        connection: Inside a transaction.
        layout: Of the table.
        model: Part of every row's key.
        rows: By converted id.
        carefully: Whether to set savepoints, each of which asks the server, so as to give up only the bad rows.

    Raises:
        RefusedError: The server refused a row, and care was not taken.
    """
    refused: schema.Refusals = {}
    if layout.update_only:
        found = {row[0] for row in await connection.fetch(layout.lock(), list(rows), model)}
        for key in [key for key in rows if str(key) not in found]:
            id = rows[key].id
            refused[id] = RowRefusedError(f"row {schema.shown(str(id))} is not in {layout.where}, which is only filled")
        rows = {key: row for key, row in rows.items() if str(key) in found}
    batch = list(rows.items())
    if carefully:
        unfit = await _store_by_halves(connection, layout, model, batch)
        refused |= unfit
    else:
        is_refused = False
        try:
            await _store_all(connection, layout, model, batch)
        except Exception as error:
            if not _may_be_of_a_row(error):
                raise
            is_refused = True
        if is_refused:
            raise RefusedError  # out here it has no context: the server's error may quote the text
    left_out = await _left_out(connection, layout, model, rows, refused)
    return refused | left_out


async def _left_out(
    connection: Any, layout: Layout, model: str, rows: Mapping[Any, Row], refused: schema.Refusals
) -> schema.Refusals:
    """Return the rows that a trigger has left out without a word, if there are triggers that may."""
    if layout.update_only or not await connection.fetchval(_MAY_LEAVE_OUT, layout.sql_table):
        return {}
    stored = dict(await connection.fetch(layout.hashes(), model, list(rows)))
    return schema.left_out(rows, refused, stored, layout.where, has_hashes="content_hash" in layout.names)


def _may_be_of_a_row(error: Exception) -> bool:
    """Return whether the server may mean one row and not all: a trigger may raise anything, a policy what rights do."""
    return verdict_on(error) == "row" or (verdict_on(error) == "config" and sqlstate_of(error) is not None)


async def _store_all(connection: Any, layout: Layout, model: str, rows: Sequence[tuple[Any, Row]]) -> None:
    statement = layout.update() if layout.update_only else layout.insert()
    parameters = layout.parameters(model)
    await connection.executemany(statement, (parameters(key, row) for key, row in rows))


async def _store_by_halves(
    connection: Any, layout: Layout, model: str, rows: Sequence[tuple[Any, Row]]
) -> schema.Refusals:
    refused: schema.Refusals = {}
    parts = [rows]
    stored = 0
    while parts:
        part = parts.pop()
        await connection.execute("SAVEPOINT part")
        try:
            await _store_all(connection, layout, model, part)
        except Exception as error:
            if not _may_be_of_a_row(error):
                raise
            await connection.execute("ROLLBACK TO SAVEPOINT part")
            if len(part) > 1:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
                continue
            refused[part[0][1].id] = _refusal(part[0][1], layout, error)
            if verdict_on(error) != "row" and not stored and _is_enough(refused, rows, error):
                raise  # it is not the rows: nothing of this table's can be written any more
        else:
            await connection.execute("RELEASE SAVEPOINT part")
            stored += len(part)
    return refused


def _is_enough(refused: schema.Refusals, rows: Sequence[object], error: Exception) -> bool:
    # of a few rows none may pass a policy, which says insufficient_privilege, too; the rights themselves were rehearsed
    most = ENOUGH_REFUSED if sqlstate_of(error) == "42501" else min(len(rows), ENOUGH_REFUSED)
    return len(refused) == most


def _refusal(row: Row, layout: Layout, error: Any) -> RowRefusedError:
    # not the server's message: it may quote the text
    constraint = f" of constraint {error.constraint_name!r}" if getattr(error, "constraint_name", None) else ""
    return RowRefusedError(
        f"row {schema.shown(str(row.id))} was refused by {layout.where}: "
        f"{type(error).__name__}{constraint} (SQLSTATE {error.sqlstate})"
    )
