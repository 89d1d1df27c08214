"""The models of a table and the size of their vectors: one size per model, recorded in a second table beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import statements
from .table import Table


async def agreed_size(connection: Any, table: Table, model: str, dimensions: int) -> int:
    """Return the size of the model's stored vectors; without any, the given size, recorded if the table is ours."""
    if not table.ours:
        return table.fixed_size or await _size_of_rows(connection, table, model, dimensions)
    key = (table.name, model)
    expected = table.fixed_size or dimensions
    of_model = f"{table.sql_models} WHERE table_name = $1 AND model = $2"
    # locked if the size is the same, so that no other size is recorded before this transaction has stored its rows
    same = await connection.fetchval(f"SELECT dimensions FROM {of_model} AND dimensions = $3 FOR SHARE", *key, expected)
    if same is not None:
        return expected
    record = f"INSERT INTO {table.sql_models} VALUES ($1, $2, $3) ON CONFLICT DO NOTHING"
    await connection.execute(record, *key, expected)
    await connection.execute(f"SELECT dimensions FROM {of_model} FOR UPDATE", *key)
    # the rows decide, since they may have been inserted or deleted by hand
    size = table.fixed_size or int(await connection.fetchval(statements.size(table), model) or dimensions)
    await connection.execute(
        f"UPDATE {table.sql_models} SET dimensions = $3 WHERE table_name = $1 AND model = $2", *key, size
    )
    return size


async def _size_of_rows(connection: Any, table: Table, model: str, dimensions: int) -> int:
    size = await connection.fetchval(statements.size(table), model)
    if size is None:
        # no record to lock: wait for the transaction that stores the first rows
        await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"{table.sql_name} {model}")
        size = await connection.fetchval(statements.size(table), model)
    return int(size or dimensions)


async def models(connection: Any, table: Table) -> dict[str, int]:
    """Return the models that have vectors, with their sizes; "" stands for all if no column holds the model."""
    has_rows = f" AND EXISTS (SELECT 1 FROM {table.sql_name} AS stored WHERE stored.model = known.model)"
    # nothing is recorded of rows that were inserted by hand, or before the table was renamed
    return await _recorded(connection, table, has_rows) or await _sizes(
        connection, table, [row[0] for row in await connection.fetch(statements.models(table))]
    )


async def candidates(connection: Any, table: Table, model: str | None) -> dict[str, int]:
    """Return `models`, without a scan of the table if the recorded ones are enough to choose a model."""
    quick = await _recorded(connection, table)
    if model is not None and model not in quick:
        quick = quick | await _sizes(connection, table, [model])
    is_enough = len(quick) == 1 if model is None else model in quick
    return quick if is_enough else await models(connection, table)


async def _recorded(connection: Any, table: Table, condition: str = "") -> dict[str, int]:
    if not table.ours or not table.has_models:
        return {}
    sql = f"SELECT model, dimensions FROM {table.sql_models} AS known WHERE table_name = $1{condition}"
    return {row[0]: row[1] for row in await connection.fetch(sql, table.name)}


async def _sizes(connection: Any, table: Table, names: Sequence[str]) -> dict[str, int]:
    sizes = {name: await connection.fetchval(statements.size(table), name) for name in names}
    return {name: size for name, size in sizes.items() if size is not None}
