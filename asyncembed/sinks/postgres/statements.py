"""The SQL for a table. Pure: it neither connects nor waits.

Names are checked, then quoted; values are always parameters. Types and operators of pgvector are qualified with
its schema, so no search_path is needed. Metadata are sent as text and cast on the server, so the codecs of a pool
do not matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from ...types import Row
from ..contract import MAX_NAME_BYTES, quoted
from .pgvector import MAX_INDEXED, METRICS
from .table import Table

# ---- writing ----


def insert(table: Table) -> str:
    """Return the upsert of one row; see `parameters`."""
    clocks = [table.sql(role) for role in table.clock_roles]
    columns = [table.sql(role) for role in table.written_roles]
    key = [quoted(name) for name in table.key]
    changes = [f"{column} = EXCLUDED.{column}" for column in columns if column not in key]
    values = [*_placeholders(table), *["now()"] * len(clocks)]
    return (
        f"INSERT INTO {table.sql_name} ({', '.join([*columns, *clocks])}) VALUES ({', '.join(values)}) "
        f"ON CONFLICT ({', '.join(key)}) DO UPDATE SET {', '.join([*changes, *_touched(table)])}"
    )


def update(table: Table) -> str:
    """Return the update of one existing row; see `parameters`."""
    pairs = zip(table.written_roles, _placeholders(table), strict=True)
    changes = [f"{table.sql(role)} = {placeholder}" for role, placeholder in pairs if role != "id"]
    of_model = f" AND {_of_no_other_model(table)}" if "model" in table.columns else ""
    changed = ", ".join([*changes, *_touched(table)])
    return f"UPDATE {table.sql_name} SET {changed} WHERE {table.sql('id')} = $1{of_model}"


def parameters(table: Table, model: str) -> Callable[[Any, Row], tuple[Any, ...]]:
    """Return the function from converted id and row to the parameters of `insert` and `update`."""
    head = (model,) if "model" in table.columns else ()
    fields = [role.replace("embedding", "vector") for role in table.written_roles if role not in ("id", "model")]
    return lambda key, row: (key, *head, *[getattr(row, field) for field in fields])


def _placeholders(table: Table) -> list[str]:
    casts = ["::text::jsonb" if role == "metadata" else "" for role in table.written_roles]
    return [f"${number}{cast}" for number, cast in enumerate(casts, start=1)]


def _touched(table: Table) -> list[str]:
    return [f"{table.sql('updated_at')} = now()"] if "updated_at" in table.clock_roles else []


def _of_no_other_model(table: Table) -> str:
    return f"({table.sql('model')} = $2::text OR {table.sql('model')} IS NULL)"


def lock(table: Table) -> str:
    """Return the query that locks, in order, those of the ids $1 that no model but $2 owns; it yields them as text."""
    return (
        f"SELECT {table.sql('id')}::text FROM {table.sql_name} WHERE {_is_among(table, '$1')} "
        f"AND {_of_no_other_model(table)} ORDER BY {_in_order(table)} FOR UPDATE"
    )


def delete(table: Table) -> str:
    """Return the statement that deletes the rows of model $1 and ids $2; or only their vectors, if `update_only`."""
    condition = f"{_is_among(table, '$2')} AND {_for_model(table, '$1')}"
    locked = f"SELECT {table.sql('id')} FROM {table.sql_name} WHERE {condition} ORDER BY {_in_order(table)} FOR UPDATE"
    rows = f"{table.sql('id')} = ANY(ARRAY({locked})) AND {_for_model(table, '$1')}"
    if table.update_only:
        return f"UPDATE {table.sql_name} SET {table.sql('embedding')} = NULL WHERE {rows}"
    return f"DELETE FROM {table.sql_name} WHERE {rows}"


def _in_order(table: Table) -> str:
    # all writers lock rows in the order in which Python sorts their keys
    return f'{table.sql("id")} COLLATE "C"' if table.has_text_ids else table.sql("id")


# ---- reading ----


def _is_among(table: Table, parameter: str) -> str:
    return f"{table.sql('id')} = ANY({parameter}::{table.id_type}[])"


def _for_model(table: Table, parameter: str) -> str:
    # PostgreSQL wants every parameter to be used, even if no column holds the model
    of_model = (
        f"{table.sql('model')} = {parameter}::text" if "model" in table.columns else f"{parameter}::text IS NOT NULL"
    )
    return f"{table.sql('embedding')} IS NOT NULL AND {of_model}"


def hashes(table: Table) -> str:
    """Return the query for id, as text, and content hash of those of the ids $2 that are stored for model $1."""
    return (
        f"SELECT {table.sql('id')}::text, {table.sql('content_hash')} FROM {table.sql_name} "
        f"WHERE {_is_among(table, '$2')} AND {_for_model(table, '$1')}"
    )


def size(table: Table) -> str:
    """Return the query for the dimensions of one vector of model $1, if there is any."""
    return (
        f"SELECT {table.pgvector('vector_dims')}({table.sql('embedding')}) FROM {table.sql_name} "
        f"WHERE {_for_model(table, '$1')} LIMIT 1"
    )


def models(table: Table) -> str:
    """Return the query for all models that have vectors; one named "" if no column holds the model."""
    stored = f"FROM {table.sql_name} WHERE {table.sql('embedding')} IS NOT NULL"
    if "model" not in table.columns:
        return f"SELECT '' {stored} LIMIT 1"
    return f"SELECT DISTINCT {table.sql('model')} {stored} AND {table.sql('model')} <> ''"


def count(table: Table) -> str:
    """Return the query for the number of vectors of model $1; of all models if it is NULL."""
    of_all = f"{table.sql('embedding')} IS NOT NULL AND $1::text IS NULL"
    return f"SELECT count(*) FROM {table.sql_name} WHERE {of_all} OR {_for_model(table, '$1')}"


def ids(table: Table) -> str:
    """Return the query for the first $3 ids of model $1 after $2, which is NULL for the first page."""
    return (
        f"SELECT {table.sql('id')} FROM {table.sql_name} WHERE {_for_model(table, '$1')} "
        f"AND ($2::{table.id_type} IS NULL OR {table.sql('id')} > $2) ORDER BY {table.sql('id')} LIMIT $3"
    )


# ---- searching ----


def nearest(table: Table, dimensions: int, condition: str, first: int, *, by_index: bool) -> str:
    """Return the query for the rows nearest to a vector.

    Its parameters, from number `first` on, are the model, the vector as text, and how many rows.
    """
    expression, typed = _measured(table, dimensions, by_index=by_index)
    distance = f"{expression} OPERATOR({quoted(table.extension.schema)}.<=>) ${first + 1}::text::{typed}"
    return (
        f"SELECT {table.sql('id')}::text AS id, {table.sql('text')}::text AS text, "
        f"{table.sql('metadata')}::text AS metadata, "
        f"{table.pgvector('vector_send')}({table.sql('embedding')}::{table.pgvector('vector')}) AS embedding "
        # with a line break, since the condition may end in a comment
        f"FROM {table.sql_name} WHERE {_for_model(table, f'${first}')} AND ({condition}\n) "
        f'ORDER BY {distance}, {table.sql("id")}::text COLLATE "C" LIMIT ${first + 2}'
    )


def _measured(table: Table, dimensions: int, *, by_index: bool) -> tuple[str, str]:
    """Return the expression whose distance is computed, and its type.

    An index needs a fixed size, and half precision beyond 2,000 dimensions; a scan of the table needs neither.
    """
    kind = "halfvec" if by_index and dimensions > MAX_INDEXED[table.vector_type] else table.vector_type
    typed = f"{table.pgvector(kind)}({dimensions})"
    if kind == table.vector_type and table.fixed_size is not None:
        return table.sql("embedding"), typed
    return f"({table.sql('embedding')}::{typed})", typed


def index_name(table: Table, model: str, dimensions: int, metric: str) -> str:
    """Return the name of the index over a model's vectors, qualified and quoted; always the same one."""
    parts = "\0".join((table.name, table.columns["embedding"], model, str(dimensions)))
    suffix = f"_{hashlib.sha256(parts.encode()).hexdigest()[:12]}_{metric}_hnsw"
    return f"{quoted(table.schema)}.{quoted(table.name[: MAX_NAME_BYTES - len(suffix)] + suffix)}"


def create_index(table: Table, name: str, model_literal: str, dimensions: int, metric: str, options: str) -> str:
    """Return the statement for an HNSW index over the vectors of one model, which `nearest` can use."""
    expression, typed = _measured(table, dimensions, by_index=True)
    operators = f"{'halfvec' if 'halfvec(' in typed else 'vector'}_{METRICS[metric]}"
    of_model = f" WHERE {table.sql('model')} = {model_literal}" if "model" in table.columns else ""
    return (
        f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {name.rpartition('.')[2]} ON {table.sql_name} "
        f"USING hnsw ({expression} {table.pgvector(operators)}) WITH ({options}){of_model}"
    )
