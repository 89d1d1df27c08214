"""Creates, finds and checks the table of a sink, inside a transaction that the caller began."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import Any

from ...databases.postgres_errors import sqlstate_of, verdict_on
from ...errors import SinkConfigError
from .. import contract
from ..contract import quoted
from . import statements
from .dimensions import agreed_size
from .pgvector import MAX_DIMENSIONS, Extension, find_extension
from .table import Column, Table, Target

# The key of the advisory lock under which tables are created, always the same number. CREATE … IF NOT EXISTS alone
# does not let several processes start at once: it fails with unique_violation.
_SETUP_LOCK = 0x61_73_79_6E_63_65_6D_62  # "asyncemb"

# The SQLSTATEs of a CREATE that comes a moment after one by a migration, which does not hold that lock:
# unique_violation, duplicate_table, duplicate_object. The next attempt finds the table.
ALREADY_CREATED = ("23505", "42P07", "42710")

# Why pgvector cannot be created, by SQLSTATE.
_NOT_INSTALLED = "which is not installed on this server: see github.com/pgvector/pgvector"
_NO_EXTENSION = {
    "42501": "and this user may not create it: have an administrator run CREATE EXTENSION vector in this database",
    "0A000": _NOT_INSTALLED,
    "58P01": _NOT_INSTALLED,
}

_TYPES = {
    "id": 'text COLLATE "C" NOT NULL',  # sorted by code point, as in Python
    "embedding": "{vector} NOT NULL",
    "model": 'text COLLATE "C" NOT NULL',
    "content_hash": "text",
    "text": "text",
    "metadata": "jsonb",
    "created_at": "timestamptz NOT NULL DEFAULT now()",
    "updated_at": "timestamptz NOT NULL DEFAULT now()",
}


async def prepare(connection: Any, target: Target, model: str, dimensions: int | None) -> Table:
    """Create what is missing, check what exists, and agree on the size of the model's vectors."""
    await connection.execute("SELECT pg_advisory_xact_lock($1)", _SETUP_LOCK)
    extension = await find_extension(connection) or await _create_extension(connection, target)
    table = await _find(connection, target, extension)
    if table is None:
        await _create(connection, target, extension, dimensions)
        table = await _find(connection, target, extension)
        assert table is not None
    if table.ours and not table.has_models:
        await connection.execute(
            f"CREATE TABLE {table.sql_models} "
            "(table_name text, model text, dimensions integer NOT NULL, PRIMARY KEY (table_name, model))"
        )
        table = replace(table, has_models=True)
    table.check_lengths(model)
    if dimensions is not None:
        if dimensions > MAX_DIMENSIONS:
            raise SinkConfigError(f"pgvector stores up to {MAX_DIMENSIONS} dimensions; {model!r} has {dimensions}")
        stored = await agreed_size(connection, table, model, dimensions)
        contract.check_dimensions(model, stored, dimensions, table.where)
        await _check_indexes(connection, table, model, dimensions)
    await _rehearse(connection, table)
    return table


async def look_up(connection: Any, target: Target) -> Table:
    """Return the table as it is now; raise SinkConfigError if it does not exist or does not fit."""
    extension = await find_extension(connection)
    table = await _find(connection, target, extension) if extension else None
    if table is None:
        raise SinkConfigError(f"{target.where} does not exist: ingest into it first")
    return table


async def _find(connection: Any, target: Target, extension: Extension) -> Table | None:
    found = await connection.fetchrow(
        "SELECT c.oid, n.nspname, "
        "EXISTS (SELECT FROM pg_class WHERE relname = $2 AND relnamespace = n.oid) AS models "
        "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass($1::text)",
        target.sql_name,
        contract.MODELS_TABLE,
    )
    if found is None:
        return None
    columns = await connection.fetch(
        # PostgreSQL's varchar.c, VARHDRSZ: the modifier of varchar(n) is n + 4
        "SELECT attname, format_type(atttypid, NULL) AS type, "
        "CASE WHEN atttypmod > 0 THEN atttypmod - CASE atttypid WHEN 'varchar'::regtype THEN 4 ELSE 0 END END AS size, "
        "attnotnull AND NOT atthasdef AND attidentity = '' AS required "
        "FROM pg_attribute WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped",
        found["oid"],
    )
    keys = await connection.fetch(
        # the indexes that ON CONFLICT can infer: not partial, not deferred, over plain columns
        "SELECT array_agg(a.attname::text) AS names FROM pg_index i JOIN pg_attribute a "
        "ON a.attrelid = i.indrelid AND a.attnum = ANY((i.indkey::int2[])[0:i.indnkeyatts - 1]) "
        "WHERE i.indrelid = $1 AND i.indisunique AND i.indisvalid AND i.indimmediate "
        "AND i.indpred IS NULL AND i.indexprs IS NULL GROUP BY i.indexrelid",
        found["oid"],
    )
    table = Table(
        **{**asdict(target), "schema": found["nspname"]},
        extension=extension,
        catalog={row["attname"]: Column(row["type"], row["size"], row["required"]) for row in columns},
        unique=tuple(frozenset(row["names"]) for row in keys),
        has_models=found["models"],
    )
    table.check()
    return table


async def _create_extension(connection: Any, target: Target) -> Extension:
    try:
        await connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    except Exception as error:
        problem = _NO_EXTENSION.get(sqlstate_of(error) or "")
        if problem is None:
            raise
        raise SinkConfigError(f"{target.where} needs pgvector, {problem}") from error
    extension = await find_extension(connection)
    assert extension is not None
    return extension


async def _create(connection: Any, target: Target, extension: Extension, dimensions: int | None) -> None:
    if target.update_only:
        raise SinkConfigError(f"{target.where} does not exist, and update_only= fills only rows that exist")
    vector = f"{quoted(extension.schema)}.vector"
    if "model" not in target.columns and dimensions is not None:
        vector += f"({dimensions})"  # a table for one model has one size for good
    columns = [f"{quoted(name)} {_TYPES[role].format(vector=vector)}" for role, name in target.columns.items()]
    key = ", ".join(quoted(name) for name in target.key)
    await connection.execute(f"CREATE TABLE {target.sql_name} ({', '.join(columns)}, PRIMARY KEY ({key}))")


async def _check_indexes(connection: Any, table: Table, model: str, dimensions: int) -> None:
    """Raise SinkConfigError if an index was built for vectors of another size of this model: it refuses every row."""
    indexes = await connection.fetch(
        "SELECT indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid) AS definition FROM pg_index "
        "WHERE indrelid = to_regclass($1::text) AND indexprs IS NOT NULL AND (indpred IS NULL OR "
        "strpos(pg_get_expr(indpred, indrelid), quote_literal($2::text)) > 0)",
        table.sql_name,
        model,
    )
    # as PostgreSQL prints it: ((embedding)::vector(1536)); indexes over other columns do not matter
    cast = re.compile(rf'\("?{table.columns["embedding"]}"?\)::(?:\S+\.)?(?:vector|halfvec)\((\d+)\)')
    for name, definition in indexes:
        sizes = {int(size) for size in cast.findall(definition)}
        if sizes and dimensions not in sizes:
            raise SinkConfigError(
                f"{table.where} has an index over {sizes.pop()} dimensions of model {model!r}, "
                f"which takes no vectors of {dimensions}: DROP INDEX {name}"
            )


async def _rehearse(connection: Any, table: Table) -> None:
    """Have the server refuse now what it would refuse when rows are written, for instance for lack of rights."""
    statement = statements.update(table) if table.update_only else statements.insert(table)
    await connection.execute("SAVEPOINT rehearsal")
    try:
        await connection.fetch(f"EXPLAIN {statement}", *[None] * len(table.written_roles))
    except Exception as error:
        if verdict_on(error) != "row":
            raise
        await connection.execute("ROLLBACK TO SAVEPOINT rehearsal")  # the plan depends on values, and these are NULL
    await connection.execute(f"SELECT FROM {table.sql_name} LIMIT 0 FOR UPDATE")  # fails in a read-only transaction
    if table.ours:
        await connection.execute(f"SELECT FROM {table.sql_models} LIMIT 0 FOR UPDATE")
        await connection.execute(f"EXPLAIN INSERT INTO {table.sql_models} VALUES ('', '', 1)")
