"""The rows nearest to a vector, and the index that finds them, inside a transaction that the caller began."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...concurrency import in_thread_if
from ...errors import SinkBusyError, SinkConfigError
from ...types import Hit, Vectors
from .. import contract as schema
from ..ranking import Ranking
from .statements import MAX_INDEXED, Layout

# Ranked here once more, from the stored numbers: the server's distances are float32, an index's even half of that.
_SPARE = 20

# What LIMIT takes is a bigint, and no table has so many rows.
_MOST_ROWS = 2**62

# Ranked in 1 ms.
WORTH_A_THREAD_BYTES = 512 * 1024

# pgvector README, "Query Options": ef_search is 40 by default, and at most 1,000.
_EF_SEARCH = (40, 1_000)


async def nearest(
    connection: Any,
    layout: Layout,
    ranking: Ranking,
    query: Vectors,
    model: str,
    k: int,
    where: str,
    args: Sequence[Any],
) -> list[Hit]:
    """Return the k nearest rows of the model that fulfil the condition; `args` are its $1, $2, …"""
    limit = min(2 * k + _SPARE, _MOST_ROWS)
    ef_search = min(max(limit, _EF_SEARCH[0]), _EF_SEARCH[1])
    # planned for this very vector: a pool's cached plan would read it anew for every row, and use no model's index
    settings = f"SET LOCAL plan_cache_mode = force_custom_plan; SET LOCAL hnsw.ef_search = {ef_search}"
    if layout.facts.extension.version >= (0, 8):
        # else an index looks at ef_search rows and leaves out what `where` refuses
        settings += "; SET LOCAL hnsw.iterative_scan = strict_order"
    await connection.execute(settings)
    index = layout.index_name(model, len(query), "cosine")
    by_index = len(query) > MAX_INDEXED[layout.kind] and await _is_built(connection, index)
    sql = layout.nearest(len(query), where, len(args) + 1, by_index=by_index)
    # at unit length, which is the same to a cosine: the server's sums, in float32 or less, then stay within bounds
    unit = query.astype(np.float64) / np.linalg.norm(query.astype(np.float64))
    values = (*args, model, json.dumps(unit.astype(np.float32).tolist()), limit)
    found = await connection.fetch(sql, *values)
    if len(found) < k and await _has_indexes(connection, layout):
        # an index gives up after so many rows (hnsw.max_scan_tuples) that the condition refuses: look at all of them
        await connection.execute("SET LOCAL enable_indexscan = off")
        found = await connection.fetch(sql, *values)
    if not found:
        return []
    # vector_send in pgvector's vector.c: two numbers of two bytes, then big-endian float32
    vectors = (
        np.frombuffer(b"".join([row["embedding"][4:] for row in found]), ">f4")
        .reshape(len(found), -1)
        .astype(np.float32)
    )
    await in_thread_if(vectors.nbytes > WORTH_A_THREAD_BYTES, ranking.offer, [row["id"] for row in found], vectors)
    rest = {row["id"]: row for row in found}
    return [Hit(id, score, rest[id]["text"], schema.parsed(rest[id]["metadata"])) for id, score in ranking.best()]


async def _is_built(connection: Any, index: str) -> bool:
    sql = "SELECT EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass($1::text) AND indisvalid)"
    return bool(await connection.fetchval(sql, index))


async def _has_indexes(connection: Any, layout: Layout) -> bool:
    """Return whether there may be an approximate index: one that is not a B-tree."""
    sql = (
        "SELECT EXISTS (SELECT FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam "
        "WHERE i.indrelid = to_regclass($1::text) AND a.amname IN ('hnsw', 'ivfflat'))"
    )
    return bool(await connection.fetchval(sql, layout.sql_table))


async def index_statements(
    connection: Any, layout: Layout, known: Mapping[str, int], model: str | None, metric: str, options: str
) -> list[str]:
    """Return what to run, outside of a transaction, to have an index over one model's vectors; nothing if there is.

    Raises:
        SinkConfigError: It is not clear over which model, pgvector cannot index vectors of that size, or the table is
            partitioned.
        SinkBusyError: Another process is building it.
    """
    chosen = schema.choose_model(known, model, None, layout.where)
    if chosen is None:
        raise SinkConfigError(f"{layout.where} is empty: load it first, an index is built faster over what is there")
    if known[chosen] > MAX_INDEXED["halfvec"]:
        raise SinkConfigError(
            f"pgvector indexes up to {MAX_INDEXED['halfvec']} dimensions; {chosen!r} has {known[chosen]}: "
            "ask the model for fewer, or search without an index"
        )
    name = layout.index_name(chosen, known[chosen], metric)
    state = await connection.fetchrow(
        "SELECT indisvalid, EXISTS (SELECT 1 FROM pg_stat_progress_create_index WHERE index_relid = indexrelid) "
        "AS building FROM pg_index WHERE indexrelid = to_regclass($1::text)",
        name,
    )
    if state is not None and state["building"]:
        raise SinkBusyError(f"{layout.where}: index {name} is being built by another process")
    if state is not None and state["indisvalid"]:
        return []
    literal = await connection.fetchval("SELECT quote_literal($1::text)", chosen)
    create = layout.create_index(name, literal, known[chosen], metric, options)
    if await connection.fetchval("SELECT relkind = 'p' FROM pg_class WHERE oid = $1::text::regclass", layout.sql_table):
        raise SinkConfigError(
            f"{layout.where} is partitioned, and PostgreSQL builds no index over all partitions without locking out "
            f"writers. Where they may wait, run it yourself: {create.replace('CONCURRENTLY ', '')}"
        )
    return [create] if state is None else [f"DROP INDEX CONCURRENTLY IF EXISTS {name}", create]
