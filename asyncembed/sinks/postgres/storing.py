"""Rows into a table, inside a transaction that the caller began; those that the table refuses fail alone.

Errors of the driver are known by their SQLSTATE; what they do not mean here passes through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import RowRefusedError
from ...postgres.errors import verdict_on
from ...types import Row
from .. import schema
from .layout import Layout


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
        found = {row[0] for row in await connection.fetch(layout.lock(), list(rows))}
        for key in [key for key in rows if key not in found]:
            id = rows[key].id
            refused[id] = RowRefusedError(f"row {schema.shown(str(id))} is not in {layout.where}, which is only filled")
        rows = {key: row for key, row in rows.items() if key in found}
    batch = list(rows.items())
    if carefully:
        return refused | await _store_by_halves(connection, layout, model, batch)
    try:
        await _store_all(connection, layout, model, batch)
    except Exception as error:
        if verdict_on(error) == "row":
            raise RefusedError from None  # the server's error may quote the text
        raise
    return refused


async def _store_all(connection: Any, layout: Layout, model: str, rows: Sequence[tuple[Any, Row]]) -> None:
    statement = layout.update() if layout.update_only else layout.insert()
    parameters = layout.parameters(model)
    await connection.executemany(statement, (parameters(key, row) for key, row in rows))


async def _store_by_halves(
    connection: Any, layout: Layout, model: str, rows: Sequence[tuple[Any, Row]]
) -> schema.Refusals:
    await connection.execute("SAVEPOINT half")
    try:
        await _store_all(connection, layout, model, rows)
    except Exception as error:
        if verdict_on(error) != "row":
            raise
        await connection.execute("ROLLBACK TO SAVEPOINT half")
        if len(rows) == 1:
            return {rows[0][1].id: _refusal(rows[0][1], layout, error)}
    else:
        await connection.execute("RELEASE SAVEPOINT half")
        return {}
    middle = len(rows) // 2
    first = await _store_by_halves(connection, layout, model, rows[:middle])
    return first | await _store_by_halves(connection, layout, model, rows[middle:])


def _refusal(row: Row, layout: Layout, error: Any) -> RowRefusedError:
    # not the server's message: it may quote the text
    constraint = f" of constraint {error.constraint_name!r}" if getattr(error, "constraint_name", None) else ""
    return RowRefusedError(
        f"row {schema.shown(str(row.id))} was refused by {layout.where}: "
        f"{type(error).__name__}{constraint} (SQLSTATE {error.sqlstate})"
    )
