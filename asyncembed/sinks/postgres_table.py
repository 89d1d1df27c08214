"""What is said to PostgreSQL on one connection, inside a transaction that the caller began.

Neither connects nor retries; errors of the driver pass through, but for those that mean something here: they are
known by their SQLSTATE, so that no driver is imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import RowRefusedError, SinkBusyError, SinkConfigError
from ..types import Hit, Row, Vectors
from . import pgvector_types, schema
from .layout import MAX_DIMENSIONS, MAX_INDEXED, Column, Facts, Layout
from .pgvector_types import Extension
from .postgres_errors import sqlstate_of, verdict_on
from .schema import quoted
from .search import Ranking

# Any number will do, if it is always the same: whoever creates tables holds this lock, so that many processes may
# start at once. CREATE … IF NOT EXISTS alone is no protection, it fails with unique_violation.
_SETUP_LOCK = 0x61_73_79_6E_63_65_6D_62  # "asyncemb"

_TYPES = {
    "id": 'text COLLATE "C" NOT NULL',  # sorted by code point, as Python does
    "embedding": "{vector} NOT NULL",
    "model": 'text COLLATE "C" NOT NULL',
    "content_hash": "text",
    "text": "text",
    "metadata": "jsonb",
    "created_at": "timestamptz NOT NULL DEFAULT now()",
    "updated_at": "timestamptz NOT NULL DEFAULT now()",
}

# Ranked here once more, from the stored numbers: the server's distances are float32, an index's even half of that.
_SPARE = 20

# pgvector README, "Query Options": ef_search is 40 by default, and at most 1,000.
_EF_SEARCH = (40, 1_000)


@dataclass(frozen=True, slots=True)
class Target:
    """Which table is meant, before anything is known of it.

    Attributes:
        schema: None for whatever the search_path finds.
        table: Its name.
        names: The column for each role.
        ours: Whether it is of our own making, with the sizes of vectors in a table beside it.
        update_only: Whether rows are only filled, never inserted.
        where: Table and database, for messages.
    """

    schema: str | None
    table: str
    names: Mapping[str, str]
    ours: bool
    update_only: bool
    where: str

    async def prepare(self, connection: Any, model: str, dimensions: int | None) -> Layout:
        """Create what is missing, check what is there, and agree on the size of the model's vectors."""
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _SETUP_LOCK)
        extension = await pgvector_types.find(connection) or await self._create_extension(connection)
        facts = await self._facts(connection, extension)
        if facts is None:
            await self._create(connection, extension, dimensions)
            facts = await self._facts(connection, extension)
            assert facts is not None
        layout = self._layout(facts)
        if self.ours and await connection.fetchval("SELECT to_regclass($1::text)", layout.sql_models) is None:
            await connection.execute(
                f"CREATE TABLE {layout.sql_models} "
                "(table_name text, model text, dimensions integer NOT NULL, PRIMARY KEY (table_name, model))"
            )
        if dimensions is not None:
            if dimensions > MAX_DIMENSIONS:
                raise SinkConfigError(f"pgvector stores up to {MAX_DIMENSIONS} dimensions; {model!r} has {dimensions}")
            stored = await agreed_size(connection, layout, model, dimensions, ours=self.ours)
            schema.check_dimensions(model, stored, dimensions, self.where)
        return layout

    async def look_up(self, connection: Any) -> Layout:
        """Return the layout of the table as it is.

        Raises:
            SinkConfigError: There is none, or it does not fit.
        """
        extension = await pgvector_types.find(connection)
        facts = await self._facts(connection, extension) if extension else None
        if facts is None:
            raise SinkConfigError(f"{self.where} does not exist yet: ingest into it first")
        return self._layout(facts)

    def _layout(self, facts: Facts) -> Layout:
        layout = Layout(self.names, facts, self.table, self.update_only, self.where)
        layout.check()
        return layout

    async def _create_extension(self, connection: Any) -> Extension:
        try:
            await connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        except Exception as error:
            state = sqlstate_of(error)
            if state == "42501":
                raise SinkConfigError(
                    f"{self.where} needs pgvector, and this user may not create it: have an administrator run "
                    "CREATE EXTENSION vector in this database"
                ) from error
            if state in ("0A000", "58P01"):
                raise SinkConfigError(
                    f"{self.where} needs pgvector, which is not installed on this server: "
                    "see github.com/pgvector/pgvector"
                ) from error
            raise
        extension = await pgvector_types.find(connection)
        assert extension is not None
        return extension

    async def _create(self, connection: Any, extension: Extension, dimensions: int | None) -> None:
        if self.update_only:
            raise SinkConfigError(f"{self.where} does not exist, and update_only= fills only rows that exist")
        vector = f"{quoted(extension.schema)}.vector"
        if "model" not in self.names and dimensions is not None:
            vector += f"({dimensions})"  # for good: with one model there is one size
        columns = [f"{quoted(name)} {_TYPES[role].format(vector=vector)}" for role, name in self.names.items()]
        key = ", ".join(quoted(self.names[role]) for role in ("id", "model") if role in self.names)
        await connection.execute(f"CREATE TABLE {self._sql_name()} ({', '.join(columns)}, PRIMARY KEY ({key}))")

    async def _facts(self, connection: Any, extension: Extension) -> Facts | None:
        table = await connection.fetchrow(
            "SELECT c.oid, n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE c.oid = to_regclass($1::text)",
            self._sql_name(),
        )
        if table is None:
            return None
        columns = await connection.fetch(
            "SELECT attname, format_type(atttypid, NULL) AS type, atttypmod, "
            "attnotnull AND NOT atthasdef AND attidentity = '' AS required "
            "FROM pg_attribute WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped",
            table["oid"],
        )
        keys = await connection.fetch(
            # what ON CONFLICT can infer: whole, at once, by plain columns
            "SELECT array_agg(a.attname::text) AS names FROM pg_index i JOIN pg_attribute a "
            "ON a.attrelid = i.indrelid AND a.attnum = ANY((i.indkey::int2[])[0:i.indnkeyatts - 1]) "
            "WHERE i.indrelid = $1 AND i.indisunique AND i.indisvalid AND i.indimmediate "
            "AND i.indpred IS NULL AND i.indexprs IS NULL GROUP BY i.indexrelid",
            table["oid"],
        )
        return Facts(
            table["nspname"],
            extension,
            {row["attname"]: Column(row["type"], row["atttypmod"], row["required"]) for row in columns},
            tuple(frozenset(row["names"]) for row in keys),
        )

    def _sql_name(self) -> str:
        return ".".join(quoted(name) for name in (self.schema, self.table) if name is not None)


async def agreed_size(connection: Any, layout: Layout, model: str, dimensions: int, *, ours: bool) -> int:
    """Return the size of the model's stored vectors; if there are none the given one, recorded if the table is ours."""
    if layout.fixed_size is not None:
        return layout.fixed_size
    key = (layout.table, model)
    of_model = f"{layout.sql_models} WHERE table_name = $1 AND model = $2"
    if ours:
        # locked, if it is the same size, so that nobody records another before this transaction has stored its rows
        same = await connection.fetchval(
            f"SELECT dimensions FROM {of_model} AND dimensions = $3 FOR SHARE", *key, dimensions
        )
        if same is not None:
            return dimensions
        record = f"INSERT INTO {layout.sql_models} VALUES ($1, $2, $3) ON CONFLICT DO NOTHING"
        await connection.execute(record, *key, dimensions)
        await connection.execute(f"SELECT dimensions FROM {of_model} FOR UPDATE", *key)
    # the rows decide, since they may have been put in or deleted by hand
    size = int(await connection.fetchval(layout.sizes(), model) or dimensions)
    if ours:
        await connection.execute(
            f"UPDATE {layout.sql_models} SET dimensions = $3 WHERE table_name = $1 AND model = $2", *key, size
        )
    return size


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


async def models(connection: Any, layout: Layout, *, ours: bool) -> dict[str, int]:
    """Return the models that have vectors, each with their size; "" for all if no column tells models apart."""
    if ours:
        has_rows = f"EXISTS (SELECT 1 FROM {layout.sql_table} AS stored WHERE stored.model = known.model)"
        return await _recorded(connection, layout, f" AND {has_rows}")
    return await _sizes(connection, layout, [row[0] for row in await connection.fetch(layout.models())])


async def candidates(connection: Any, layout: Layout, model: str | None, *, ours: bool) -> dict[str, int]:
    """Return what `models` does, but without looking through the table if that decides nothing about that model."""
    if ours:
        quick = await _recorded(connection, layout)
        enough = model in quick or len(quick) < 2
    else:
        quick = {} if model is None else await _sizes(connection, layout, [model])
        enough = bool(quick)
    return quick if enough else await models(connection, layout, ours=ours)


async def _recorded(connection: Any, layout: Layout, condition: str = "") -> dict[str, int]:
    sql = f"SELECT model, dimensions FROM {layout.sql_models} AS known WHERE table_name = $1{condition}"
    return {row[0]: row[1] for row in await connection.fetch(sql, layout.table)}


async def _sizes(connection: Any, layout: Layout, names: Sequence[str]) -> dict[str, int]:
    sizes = {name: await connection.fetchval(layout.sizes(), name) for name in names}
    return {name: size for name, size in sizes.items() if size is not None}


async def index_statements(
    connection: Any, layout: Layout, known: Mapping[str, int], model: str | None, metric: str, options: str
) -> list[str]:
    """Return what to run, outside of a transaction, to have an index over one model's vectors; nothing if there is.

    Raises:
        SinkConfigError: It is not clear over which model, or pgvector cannot index vectors of that size.
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
    name = layout.index_name(chosen, metric)
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
    return [create] if state is None else [f"DROP INDEX CONCURRENTLY IF EXISTS {name}", create]


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
    limit = 2 * k + _SPARE
    ef_search = min(max(limit, _EF_SEARCH[0]), _EF_SEARCH[1])
    # planned for this very vector: a pool's cached plan would read it anew for every row, and use no model's index
    settings = f"SET LOCAL plan_cache_mode = force_custom_plan; SET LOCAL hnsw.ef_search = {ef_search}"
    if layout.facts.extension.version >= (
        0,
        8,
    ):  # else an index looks at ef_search rows and leaves out what `where` refuses
        settings += "; SET LOCAL hnsw.iterative_scan = strict_order"
    await connection.execute(settings)
    by_index = len(query) > MAX_INDEXED[layout.kind] and await _has_half_index(connection, layout, len(query))
    found = await connection.fetch(
        layout.nearest(len(query), where, len(args) + 1, by_index=by_index),
        *args,
        model,
        json.dumps(query.tolist()),
        limit,
    )
    if not found:
        return []
    ranking.offer([row["id"] for row in found], np.array([row["embedding"] for row in found], dtype=np.float32))
    rest = {row["id"]: row for row in found}
    return [Hit(id, score, rest[id]["text"], schema.parsed(rest[id]["metadata"])) for id, score in ranking.best()]


async def _has_half_index(connection: Any, layout: Layout, dimensions: int) -> bool:
    return bool(
        await connection.fetchval(
            "SELECT EXISTS (SELECT 1 FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
            "WHERE i.indrelid = to_regclass($1::text) AND i.indisvalid AND pg_get_indexdef(c.oid) LIKE $2)",
            layout.sql_table,
            f"%halfvec({dimensions})%halfvec_cosine_ops%",
        )
    )
