"""Which table is meant: found as it is, or created, and checked, inside a transaction that the caller began."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...databases.postgres_errors import sqlstate_of, verdict_on
from ...errors import SinkConfigError
from .. import contract as schema
from ..contract import quoted
from .dimensions import agreed_size
from .pgvector import Extension, find_extension
from .statements import MAX_DIMENSIONS, Column, Facts, Layout

# Any number will do, if it is always the same: whoever creates tables holds this lock, so that many processes may
# start at once. CREATE … IF NOT EXISTS alone is no protection, it fails with unique_violation.
_SETUP_LOCK = 0x61_73_79_6E_63_65_6D_62  # "asyncemb"

# What CREATE is refused with when somebody who does not hold that lock, a migration, was a moment faster:
# unique_violation, duplicate_table, duplicate_object. Once more, and it is found.
ALREADY_THERE = ("23505", "42P07", "42710")

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
        extension = await find_extension(connection) or await self._create_extension(connection)
        facts = await self._facts(connection, extension)
        if facts is None:
            await self._create(connection, extension, dimensions)
            facts = await self._facts(connection, extension)
            assert facts is not None
        layout = self._layout(facts)
        if self.ours and not facts.has_models:
            await connection.execute(
                f"CREATE TABLE {layout.sql_models} "
                "(table_name text, model text, dimensions integer NOT NULL, PRIMARY KEY (table_name, model))"
            )
            layout = self._layout(replace(facts, has_models=True))
        layout.check_model(model)
        if dimensions is not None:
            if dimensions > MAX_DIMENSIONS:
                raise SinkConfigError(f"pgvector stores up to {MAX_DIMENSIONS} dimensions; {model!r} has {dimensions}")
            stored = await agreed_size(connection, layout, model, dimensions)
            schema.check_dimensions(model, stored, dimensions, self.where)
            await self._check_indexes(connection, layout, model, dimensions)
        await self._rehearse(connection, layout)
        return layout

    async def _check_indexes(self, connection: Any, layout: Layout, model: str, dimensions: int) -> None:
        """Find indexes over this model's vectors when they had another size: they refuse every row."""
        indexes = await connection.fetch(
            "SELECT indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid) AS definition FROM pg_index "
            "WHERE indrelid = to_regclass($1::text) AND indexprs IS NOT NULL AND (indpred IS NULL OR "
            "strpos(pg_get_expr(indpred, indrelid), quote_literal($2::text)) > 0)",
            layout.sql_table,
            model,
        )
        # as PostgreSQL writes it: ((embedding)::vector(1536)), and another column may have vectors, too
        cast = re.compile(rf'\("?{self.names["embedding"]}"?\)::(?:\S+\.)?(?:vector|halfvec)\((\d+)\)')
        for name, definition in indexes:
            sizes = {int(size) for size in cast.findall(definition)}
            if sizes and dimensions not in sizes:
                raise SinkConfigError(
                    f"{self.where} has an index over {sizes.pop()} dimensions of model {model!r}, "
                    f"which takes no vectors of {dimensions}: DROP INDEX {name}"
                )

    async def _rehearse(self, connection: Any, layout: Layout) -> None:
        """Have the server refuse now what it would refuse when rows are written: for want of rights, for instance."""
        statement = layout.update() if self.update_only else layout.insert()
        await connection.execute("SAVEPOINT rehearsal")
        try:
            await connection.fetch(f"EXPLAIN {statement}", *[None] * layout.parameter_count)
        except Exception as error:
            if verdict_on(error) != "row":
                raise
            await connection.execute("ROLLBACK TO SAVEPOINT rehearsal")  # it looks at the values: real ones will do
        await connection.execute(f"SELECT FROM {layout.sql_table} LIMIT 0 FOR UPDATE")  # not if all is read-only
        if self.ours:
            await connection.execute(f"SELECT FROM {layout.sql_models} LIMIT 0 FOR UPDATE")
            await connection.execute(f"EXPLAIN INSERT INTO {layout.sql_models} VALUES ('', '', 1)")

    async def look_up(self, connection: Any) -> Layout:
        """Return the layout of the table as it is.

        Raises:
            SinkConfigError: There is none, or it does not fit.
        """
        extension = await find_extension(connection)
        facts = await self._facts(connection, extension) if extension else None
        if facts is None:
            raise SinkConfigError(f"{self.where} does not exist: ingest into it first")
        return self._layout(facts)

    def _layout(self, facts: Facts) -> Layout:
        layout = Layout(self.names, facts, self.table, self.ours, self.update_only, self.where)
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
        extension = await find_extension(connection)
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
            "SELECT c.oid, n.nspname, "
            "EXISTS (SELECT FROM pg_class WHERE relname = $2 AND relnamespace = n.oid) AS models "
            "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass($1::text)",
            self._sql_name(),
            schema.MODELS_TABLE,
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
            table["models"],
        )

    def _sql_name(self) -> str:
        return ".".join(quoted(name) for name in (self.schema, self.table) if name is not None)
