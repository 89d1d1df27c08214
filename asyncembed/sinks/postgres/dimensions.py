"""Which models a table holds, and the size of their vectors: one size a model, recorded beside tables of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .statements import Layout


async def agreed_size(connection: Any, layout: Layout, model: str, dimensions: int) -> int:
    """Return the size of the model's stored vectors; if there are none the given one, recorded if the table is ours."""
    if not layout.ours:
        return layout.fixed_size or await _size_of_rows(connection, layout, model, dimensions)
    key = (layout.table, model)
    expected = layout.fixed_size or dimensions
    of_model = f"{layout.sql_models} WHERE table_name = $1 AND model = $2"
    # locked, if it is the same size, so that nobody records another before this transaction has stored its rows
    same = await connection.fetchval(f"SELECT dimensions FROM {of_model} AND dimensions = $3 FOR SHARE", *key, expected)
    if same is not None:
        return expected
    record = f"INSERT INTO {layout.sql_models} VALUES ($1, $2, $3) ON CONFLICT DO NOTHING"
    await connection.execute(record, *key, expected)
    await connection.execute(f"SELECT dimensions FROM {of_model} FOR UPDATE", *key)
    # the rows decide, since they may have been put in or deleted by hand
    size = layout.fixed_size or int(await connection.fetchval(layout.sizes(), model) or dimensions)
    await connection.execute(
        f"UPDATE {layout.sql_models} SET dimensions = $3 WHERE table_name = $1 AND model = $2", *key, size
    )
    return size


async def _size_of_rows(connection: Any, layout: Layout, model: str, dimensions: int) -> int:
    size = await connection.fetchval(layout.sizes(), model)
    if size is None:
        # nothing records it: whoever stores the first rows is waited for
        await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"{layout.sql_table} {model}")
        size = await connection.fetchval(layout.sizes(), model)
    return int(size or dimensions)


async def models(connection: Any, layout: Layout) -> dict[str, int]:
    """Return the models that have vectors, each with their size; "" for all if no column tells models apart."""
    if layout.ours:
        has_rows = f"EXISTS (SELECT 1 FROM {layout.sql_table} AS stored WHERE stored.model = known.model)"
        recorded = await _recorded(connection, layout, f" AND {has_rows}")
        if recorded:
            return recorded
    # nobody has recorded any, but the rows may have been put in by hand, or with the table renamed
    return await _sizes(connection, layout, [row[0] for row in await connection.fetch(layout.models())])


async def candidates(connection: Any, layout: Layout, model: str | None) -> dict[str, int]:
    """Return what `models` does, but without looking through the table if that decides nothing about that model."""
    quick = await _recorded(connection, layout) if layout.ours else {}
    if model is None and len(quick) == 1:
        return quick
    if model is not None and model not in quick:
        found = await _sizes(connection, layout, [model])
        quick |= found
    return quick if model in quick else await models(connection, layout)


async def _recorded(connection: Any, layout: Layout, condition: str = "") -> dict[str, int]:
    if not layout.facts.has_models:
        return {}
    sql = f"SELECT model, dimensions FROM {layout.sql_models} AS known WHERE table_name = $1{condition}"
    return {row[0]: row[1] for row in await connection.fetch(sql, layout.table)}


async def _sizes(connection: Any, layout: Layout, names: Sequence[str]) -> dict[str, int]:
    sizes = {name: await connection.fetchval(layout.sizes(), name) for name in names}
    return {name: size for name, size in sizes.items() if size is not None}
