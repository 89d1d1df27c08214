"""Finds the rows nearest to a vector, and prepares the index for that, inside a transaction that the caller began."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...concurrency import run_in_thread_if
from ...errors import SinkBusyError, SinkConfigError
from ...types import Hit, Vectors
from .. import contract
from ..ranking import Ranking
from . import statements
from .dimensions import candidates, models
from .pgvector import MAX_INDEXED
from .table import Table

# Rows fetched beyond k: they are ranked again from the stored numbers, since the server computes distances in float32,
# and those of an index may have half precision.
_SPARE = 20

_MOST_ROWS = 2**62  # LIMIT takes a bigint, and no table has this many rows
WORTH_A_THREAD_BYTES = 512 * 1024  # ranked in 1 ms

# pgvector README, "Query Options": ef_search is 40 by default, and at most 1,000.
_EF_SEARCH = (40, 1_000)

# "built", "building" or "broken"; no row if the index does not exist.
_STATE_OF_INDEX = (
    "SELECT CASE WHEN EXISTS (SELECT FROM pg_stat_progress_create_index WHERE index_relid = indexrelid) "
    "THEN 'building' WHEN indisvalid THEN 'built' ELSE 'broken' END "
    "FROM pg_index WHERE indexrelid = to_regclass($1::text)"
)

_HAS_APPROXIMATE_INDEX = (
    "SELECT EXISTS (SELECT FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam "
    "WHERE i.indrelid = to_regclass($1::text) AND a.amname IN ('hnsw', 'ivfflat'))"
)

_LITERAL = re.compile(r"'(?:[^']|'')*'")


def _condition_of(
    table: Table, where: str | Mapping[str, Any] | None, args: Sequence[Any]
) -> tuple[str, Sequence[Any]]:
    """Return the condition as SQL, with the values of its parameters; raise SinkConfigError if it is not valid."""
    if isinstance(where, str):
        highest = max(map(int, re.findall(r"\$([0-9]{1,9})", _LITERAL.sub("", where))), default=0)
        if highest > len(args):
            raise SinkConfigError(f"where= speaks of ${highest}; args= has {len(args)} values")
        if "\0" in where:
            raise SinkConfigError("where= has a NUL in it, which SQL does not allow")
        return where or "true", args
    if where is None or where == {}:
        return "true", args
    if not isinstance(where, Mapping):
        raise SinkConfigError(f"where= is a {type(where).__name__}; it must be a mapping or SQL")
    if "metadata" not in table.columns:
        raise SinkConfigError(f"{table.where} has no column for metadata: give where= as SQL")
    try:
        wanted = json.dumps(dict(where), allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SinkConfigError(f"where= has a value that JSON cannot hold ({type(error).__name__})") from None
    if contract.why_unstorable("where", "", wanted) is not None:
        raise SinkConfigError("where= has NUL or half a surrogate pair in it, which stored metadata never have")
    return f"{table.sql('metadata')} @> $1::text::jsonb", [wanted]


async def nearest(
    connection: Any,
    table: Table,
    query: Vectors,
    k: int,
    model: str | None,
    where: str | Mapping[str, Any] | None,
    args: Sequence[Any],
) -> list[Hit]:
    """Return the k nearest rows; see `PostgresSink.search`."""
    wanted = model if "model" in table.columns else None  # without the column, any name stands for all rows
    chosen = contract.choose_model(await candidates(connection, table, wanted), wanted, query.size, table.where)
    if chosen is None:
        return []
    condition, args = _condition_of(table, where, args)
    limit = min(2 * k + _SPARE, _MOST_ROWS)
    ef_search = min(max(limit, _EF_SEARCH[0]), _EF_SEARCH[1])
    # a plan for this very vector: a cached plan would parse the vector again for every row, and use no model's index
    settings = f"SET LOCAL plan_cache_mode = force_custom_plan; SET LOCAL hnsw.ef_search = {ef_search}"
    if table.extension.version >= (0, 8):
        # else an index yields ef_search rows at most, and those that the condition refuses are missing
        settings += "; SET LOCAL hnsw.iterative_scan = strict_order"
    await connection.execute(settings)
    index = statements.index_name(table, chosen, len(query), "cosine")
    is_large = len(query) > MAX_INDEXED[table.vector_type]
    by_index = is_large and await connection.fetchval(_STATE_OF_INDEX, index) == "built"
    sql = statements.nearest(table, len(query), condition, len(args) + 1, by_index=by_index)
    # scaled to length 1, which does not change a cosine: the server's sums, in float32 or less, cannot overflow then
    unit = query.astype(np.float64) / np.linalg.norm(query.astype(np.float64))
    values = (*args, chosen, json.dumps(unit.astype(np.float32).tolist()), limit)
    found = await connection.fetch(sql, *values)
    if len(found) < k and await connection.fetchval(_HAS_APPROXIMATE_INDEX, table.sql_name):
        # an index gives up after hnsw.max_scan_tuples rows that the condition refuses: scan the table instead
        await connection.execute("SET LOCAL enable_indexscan = off")
        found = await connection.fetch(sql, *values)
    if not found:
        return []
    # vector_send in pgvector's vector.c: two numbers of two bytes, then big-endian float32
    numbers = np.frombuffer(b"".join([row["embedding"][4:] for row in found]), ">f4")
    vectors = numbers.reshape(len(found), -1).astype(np.float32)
    ranking = Ranking(query, k)
    await run_in_thread_if(vectors.nbytes > WORTH_A_THREAD_BYTES, ranking.offer, [row["id"] for row in found], vectors)
    rest = {row["id"]: row for row in found}
    return [Hit(id, score, rest[id]["text"], contract.parsed(rest[id]["metadata"])) for id, score in ranking.best()]


async def index_statements(connection: Any, table: Table, model: str | None, metric: str, options: str) -> list[str]:
    """Return the statements that build an index over one model's vectors, to run outside of a transaction.

    There are none if the index exists.

    Raises:
        SinkConfigError: It is not clear over which model, pgvector cannot index vectors of that size, or the table is
            partitioned.
        SinkBusyError: Another process is building it.
    """
    known = await models(connection, table)
    chosen = contract.choose_model(known, model if "model" in table.columns else None, None, table.where)
    if chosen is None:
        raise SinkConfigError(f"{table.where} is empty: load it first, since an index is built faster over stored rows")
    if known[chosen] > MAX_INDEXED["halfvec"]:
        raise SinkConfigError(
            f"pgvector indexes up to {MAX_INDEXED['halfvec']} dimensions; {chosen!r} has {known[chosen]}: "
            "ask the model for fewer, or search without an index"
        )
    name = statements.index_name(table, chosen, known[chosen], metric)
    state = await connection.fetchval(_STATE_OF_INDEX, name)
    if state == "building":
        raise SinkBusyError(f"{table.where}: index {name} is being built by another process")
    if state == "built":
        return []
    literal = await connection.fetchval("SELECT quote_literal($1::text)", chosen)
    create = statements.create_index(table, name, literal, known[chosen], metric, options)
    if await connection.fetchval("SELECT relkind = 'p' FROM pg_class WHERE oid = $1::text::regclass", table.sql_name):
        raise SinkConfigError(
            f"{table.where} is partitioned, and PostgreSQL builds no index over all partitions without locking out "
            f"writers. Where they may wait, run it yourself: {create.replace('CONCURRENTLY ', '')}"
        )
    return [create] if state is None else [f"DROP INDEX CONCURRENTLY IF EXISTS {name}", create]
