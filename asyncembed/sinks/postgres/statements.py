"""A PostgreSQL table, ours or the user's, and the statements for it. Pure: it neither connects nor waits.

Names are checked, then quoted; values are always parameters. Types and operators of pgvector are qualified with
the schema the extension is in, so that no search_path is needed. Metadata travels as text, cast on the server, so
that it does not matter which codecs the user's pool has.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from ...errors import SinkConfigError
from ...types import RecordId, Row
from .. import contract as schema
from ..contract import has_bytes, quoted, why_unstorable
from .pgvector import Extension

# What a column can be for, and the field of a row that goes into it.
ROLES = ("id", "model", "embedding", "content_hash", "text", "metadata", "created_at", "updated_at")
CLOCKS = ("created_at", "updated_at")
_FIELDS = {"embedding": "vector", "content_hash": "content_hash", "text": "text", "metadata": "metadata"}

# pgvector README, "What if I want to index vectors with more than 2,000 dimensions?", and 16,000 for storage.
MAX_DIMENSIONS = 16_000
MAX_INDEXED = {"vector": 2_000, "halfvec": 4_000}

# The operator and the operator class for each way to measure nearness (pgvector README, "Querying", "HNSW").
METRICS = {"cosine": ("<=>", "cosine_ops"), "inner_product": ("<#>", "ip_ops"), "l2": ("<->", "l2_ops")}

# SHA-256 in hex.
HASH_CHARACTERS = 64

_INTEGER_BITS = {"smallint": 16, "integer": 32, "bigint": 64}
_TEXTS = ("text", "character varying")
_LITERAL = re.compile(r"'(?:[^']|'')*'")
_INTEGER = re.compile(r"-?[0-9]{1,20}")


@dataclass(frozen=True, slots=True)
class Column:
    """One column as the catalog has it: its type without modifiers, its modifier, whether it must be given."""

    type: str
    modifier: int
    required: bool

    @property
    def most_characters(self) -> int | None:
        """How long a text may be: n of `varchar(n)`; None if that does not bound it."""
        # PostgreSQL's varchar.c, VARHDRSZ: the modifier is n + 4
        return self.modifier - 4 if self.type == "character varying" and self.modifier > 4 else None


@dataclass(frozen=True, slots=True)
class Facts:
    """What the database says about the table.

    Attributes:
        schema: The table's.
        extension: Where pgvector is, and which.
        columns: By name.
        keys: The columns of each unique index that ON CONFLICT can name.
        has_models: Whether the table beside ours that records the sizes of vectors is there.
    """

    schema: str
    extension: Extension
    columns: Mapping[str, Column]
    keys: tuple[frozenset[str], ...]
    has_models: bool = False


def check_columns(columns: Mapping[str, str] | None, update_only: bool) -> dict[str, str]:
    """Return the column for each role; all of ours if none are given.

    Raises:
        SinkConfigError: A role or name is unknown or unusable, or id and embedding are not among them.
    """
    if columns is None:
        if update_only:
            raise SinkConfigError("update_only needs columns=, the names of your table's columns")
        return {role: role for role in ROLES}
    unknown = sorted(set(columns) - set(ROLES))
    if unknown or "id" not in columns or "embedding" not in columns:
        raise SinkConfigError(
            f"columns= names the columns of your table for {', '.join(ROLES)}, id and embedding at least; "
            f"it has {sorted(columns)}"
        )
    return {role: schema.check_name(columns[role], f"{role} column") for role in ROLES if role in columns}


@dataclass(frozen=True, slots=True)
class Layout:
    """The statements for one table, by the roles of its columns.

    Attributes:
        names: The column for each role.
        facts: The table as it is.
        table: Its name without schema.
        ours: Whether it is of our own making, with the sizes of vectors in a table beside it.
        update_only: Whether rows are only filled, never inserted.
        where: Table and database, for messages.
    """

    names: Mapping[str, str]
    facts: Facts
    table: str
    ours: bool
    update_only: bool
    where: str

    @property
    def sql_table(self) -> str:
        """The table, qualified and quoted."""
        return f"{quoted(self.facts.schema)}.{quoted(self.table)}"

    @property
    def sql_models(self) -> str:
        """The table beside ours that records the size of each model's vectors, qualified."""
        return f"{quoted(self.facts.schema)}.{schema.MODELS_TABLE}"

    @property
    def kind(self) -> str:
        """`vector` or `halfvec`."""
        return self._column("embedding").type.rpartition(".")[2]

    @property
    def fixed_size(self) -> int | None:
        """The dimensions that the column's type demands, None if any will do."""
        modifier = self._column("embedding").modifier
        return modifier if modifier > 0 else None

    @property
    def id_type(self) -> str:
        """The type of the id column."""
        return self._column("id").type

    @property
    def holds_any_text(self) -> bool:
        """Whether every id has a place in the id column."""
        return self.id_type in _TEXTS and self._column("id").most_characters is None

    def _column(self, role: str) -> Column:
        return self.facts.columns[self.names[role]]

    @property
    def parameter_count(self) -> int:
        """How many `insert` and `update` have."""
        return len(self._written())

    def of(self, role: str) -> str:
        """Return the role's column, quoted; NULL if there is none."""
        return quoted(self.names[role]) if role in self.names else "NULL"

    def pgvector(self, name: str) -> str:
        """Return a type or function of pgvector, qualified."""
        return f"{quoted(self.facts.extension.schema)}.{name}"

    def meant(self, model: str | None) -> str | None:
        """Return the model; None if no column tells models apart, so that any name means all rows."""
        return model if "model" in self.names else None

    # ---- does it fit? ----

    def check(self) -> None:
        """Raise SinkConfigError, with all that does not fit, unless the table can be used as it is."""
        missing = sorted(name for name in self.names.values() if name not in self.facts.columns)
        if missing:
            raise SinkConfigError(f"{self.where} has no columns {missing}; it has {sorted(self.facts.columns)}")
        problems = [*self._unfit_types(), *self._unfit_keys()]
        if problems:
            raise SinkConfigError(f"{self.where} does not fit: {'; '.join(problems)}")

    def _unfit_types(self) -> list[str]:
        problems = []
        if self.kind not in MAX_INDEXED:
            problems.append(f"{self.names['embedding']} is {self.kind}, not vector or halfvec")
        if self.id_type not in (*_TEXTS, *_INTEGER_BITS, "uuid"):
            problems.append(f"{self.names['id']} is {self.id_type}, not a text, an integer or a uuid")
        for role, types in (("model", _TEXTS), ("content_hash", _TEXTS), ("text", _TEXTS), ("metadata", ("jsonb",))):
            if role in self.names and self._column(role).type not in types:
                problems.append(f"{self.names[role]} is {self._column(role).type}, not {types[0]}")
        return problems

    def _unfit_keys(self) -> list[str]:
        if self.update_only:
            return []
        problems = []
        key = {self.names[role] for role in ("id", "model") if role in self.names}
        if key not in self.facts.keys:
            problems.append(f"it has no unique index on exactly ({', '.join(sorted(key))})")
        given = {self.names[role] for role in (*self._written(), *self._clocks())}
        required = sorted(name for name, column in self.facts.columns.items() if column.required and name not in given)
        if required:
            problems.append(f"{', '.join(required)} must be given, but no column maps to it")
        return problems

    def check_model(self, model: str) -> None:
        """Raise SinkConfigError if the model's name, or any content hash, is too long for its column."""
        for role, needed in (("model", len(model)), ("content_hash", HASH_CHARACTERS)):
            most = self._column(role).most_characters if role in self.names else None
            if most is not None and needed > most:
                raise SinkConfigError(
                    f"{self.where}: its column {self.names[role]} holds {most} characters; {needed} are needed"
                )

    # ---- ids ----

    def convert(self, key: str) -> Any:
        """Return the key as the id column takes it.

        Raises:
            ValueError: It cannot be one.
        """
        if not has_bytes(key):
            raise ValueError("is no text")
        if self.id_type in _TEXTS:
            most = self._column("id").most_characters
            if most is not None and len(key) > most:
                raise ValueError(f"is longer than {most} characters")
            return key
        if self.id_type == "uuid":
            return _uuid(key)
        limit = 1 << (_INTEGER_BITS[self.id_type] - 1)
        if not _INTEGER.fullmatch(key) or not -limit <= int(key) < limit:
            raise ValueError(f"is no {self.id_type}")
        return int(key)

    def convert_all(self, ids: Iterable[RecordId]) -> dict[RecordId, Any]:
        """Return what `convert` makes of the ids, without those that the column cannot hold: they are not in it."""
        converted = {}
        for id in ids:
            with suppress(ValueError):
                converted[id] = self.convert(str(id))
        return converted

    # ---- statements ----

    def insert(self) -> str:
        """Return the upsert of one row; its parameters are those of `parameters`."""
        clocks = [self.of(role) for role in self._clocks()]
        columns = [self.of(role) for role in self._written()]
        key = [self.of(role) for role in ("id", "model") if role in self.names]
        changes = [f"{column} = EXCLUDED.{column}" for column in columns if column not in key]
        changes += [f"{self.of(role)} = now()" for role in self._clocks() if role == "updated_at"]
        values = [*self._placeholders(), *["now()"] * len(clocks)]
        return (
            f"INSERT INTO {self.sql_table} ({', '.join([*columns, *clocks])}) VALUES ({', '.join(values)}) "
            f"ON CONFLICT ({', '.join(key)}) DO UPDATE SET {', '.join(changes)}"
        )

    def update(self) -> str:
        """Return the update of one row that exists; its parameters are those of `parameters`."""
        pairs = zip(self._written(), self._placeholders(), strict=True)
        changes = [f"{self.of(role)} = {placeholder}" for role, placeholder in pairs if role != "id"]
        changes += [f"{self.of(role)} = now()" for role in self._clocks() if role == "updated_at"]
        condition = f"{self.of('id')} = $1{self._of_no_other_model('$2')}"
        return f"UPDATE {self.sql_table} SET {', '.join(changes)} WHERE {condition}"

    def _of_no_other_model(self, parameter: str) -> str:
        if "model" not in self.names:
            return ""
        return f" AND ({self.of('model')} = {parameter} OR {self.of('model')} IS NULL)"

    def _written(self) -> list[str]:
        """The roles that a row has values for; of rows that are only filled, the texts are the user's own."""
        others = ("text", "metadata", *CLOCKS) if self.update_only else CLOCKS
        return [role for role in ROLES if role in self.names and role not in others]

    def _clocks(self) -> list[str]:
        """The roles that are set to the time of writing; a column of another type is left to its default."""
        return [
            role for role in CLOCKS if role in self.names and self._column(role).type.startswith(("timestamp", "date"))
        ]

    def _placeholders(self) -> list[str]:
        return [
            f"${number}{'::text::jsonb' if role == 'metadata' else ''}"
            for number, role in enumerate(self._written(), start=1)
        ]

    def parameters(self, model: str) -> Callable[[Any, Row], tuple[Any, ...]]:
        """Return the function from converted id and row to the parameters of `insert` or `update`."""
        roles = self._written()
        head = (model,) if "model" in roles else ()
        fields = [_FIELDS[role] for role in roles if role in _FIELDS]
        return lambda key, row: (key, *head, *[getattr(row, field) for field in fields])

    def lock(self) -> str:
        """Return the query for which of the ids $1 exist for no other model than $2, as text; locks them in order."""
        model = self._of_no_other_model("$2") or " AND $2::text IS NOT NULL"
        return (
            f"SELECT {self.of('id')}::text FROM {self.sql_table} WHERE {self.of('id')} = ANY($1::{self.id_type}[])"
            f"{model} ORDER BY {self._in_order()} FOR UPDATE"
        )

    def _in_order(self) -> str:
        """The order in which everybody locks: that of Python, in which rows are written."""
        return f'{self.of("id")} COLLATE "C"' if self.id_type in _TEXTS else self.of("id")

    def _for_model(self, parameter: str) -> str:
        # PostgreSQL wants every parameter used, also where no column tells the model
        of_model = (
            f"{self.of('model')} = {parameter}::text" if "model" in self.names else f"{parameter}::text IS NOT NULL"
        )
        return f"{self.of('embedding')} IS NOT NULL AND {of_model}"

    def hashes(self) -> str:
        """Return the query for id, as text, and content hash of those of the ids $2 that are stored for model $1."""
        return (
            f"SELECT {self.of('id')}::text, {self.of('content_hash')} FROM {self.sql_table} "
            f"WHERE {self.of('id')} = ANY($2::{self.id_type}[]) AND {self._for_model('$1')}"
        )

    def sizes(self) -> str:
        """Return the query for the size of one vector of model $1, if there is any."""
        return (
            f"SELECT {self.pgvector('vector_dims')}({self.of('embedding')}) FROM {self.sql_table} "
            f"WHERE {self._for_model('$1')} LIMIT 1"
        )

    def models(self) -> str:
        """Return the query for every model there is; one named "" if no column tells."""
        if "model" not in self.names:
            return f"SELECT '' FROM {self.sql_table} WHERE {self.of('embedding')} IS NOT NULL LIMIT 1"
        model = self.of("model")
        return (
            f"SELECT DISTINCT {model} FROM {self.sql_table} WHERE {self.of('embedding')} IS NOT NULL AND {model} <> ''"
        )

    def count(self, *, all_models: bool) -> str:
        """Return the query for the number of vectors, of model $1 unless of all."""
        condition = f"{self.of('embedding')} IS NOT NULL" if all_models else self._for_model("$1")
        return f"SELECT count(*) FROM {self.sql_table} WHERE {condition}"

    def ids(self) -> str:
        """Return the query for the $3 ids behind $2 (NULL for the first) that are stored for model $1."""
        return (
            f"SELECT {self.of('id')} FROM {self.sql_table} WHERE {self._for_model('$1')} "
            f"AND ($2::{self.id_type} IS NULL OR {self.of('id')} > $2) ORDER BY {self.of('id')} LIMIT $3"
        )

    def delete(self) -> str:
        """Return the statement that takes the vectors of model $1 and ids $2 away: rows, or only their vectors."""
        condition = f"WHERE {self.of('id')} = ANY($2::{self.id_type}[]) AND {self._for_model('$1')}"
        locked = f"SELECT {self.of('id')} FROM {self.sql_table} {condition} ORDER BY {self._in_order()} FOR UPDATE"
        rows = f"{self.of('id')} = ANY(ARRAY({locked})) AND {self._for_model('$1')}"
        if self.update_only:
            return f"UPDATE {self.sql_table} SET {self.of('embedding')} = NULL WHERE {rows}"
        return f"DELETE FROM {self.sql_table} WHERE {rows}"

    def measured(self, dimensions: int, *, by_index: bool) -> tuple[str, str]:
        """Return the expression whose distance is taken, and its type.

        An index needs a fixed size, and beyond 2,000 dimensions half the precision; without one both are kept.
        """
        kind = self.kind
        if by_index and dimensions > MAX_INDEXED[kind]:
            kind = "halfvec"
        typed = f"{self.pgvector(kind)}({dimensions})"
        if kind == self.kind and self.fixed_size is not None:
            return self.of("embedding"), typed
        return f"({self.of('embedding')}::{typed})", typed

    def condition(self, where: str | Mapping[str, Any] | None, args: Sequence[Any]) -> tuple[str, Sequence[Any]]:
        """Return the condition of a search as SQL, with the values of its parameters $1, $2, …

        Raises:
            SinkConfigError: It is none, or about metadata, and there is no column for them.
        """
        if isinstance(where, str):
            highest = max(map(int, re.findall(r"\$([0-9]{1,9})", _LITERAL.sub("", where))), default=0)
            if highest > len(args):
                raise SinkConfigError(f"where= speaks of ${highest}; args= has {len(args)} values")
            if "\0" in where:
                raise SinkConfigError("where= has a NUL in it, which is no SQL")
            return where or "true", args
        if where is None or where == {}:
            return "true", args
        if not isinstance(where, Mapping):
            raise SinkConfigError(f"where= is a {type(where).__name__}; it is a mapping or SQL")
        if "metadata" not in self.names:
            raise SinkConfigError(f"{self.where} has no column for metadata: give where= as SQL")
        try:
            wanted = json.dumps(dict(where), allow_nan=False, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise SinkConfigError(f"where= has a value that JSON cannot hold ({type(error).__name__})") from None
        if why_unstorable("where", "", wanted) is not None:
            raise SinkConfigError("where= has NUL or half a surrogate pair in it, which no metadata have")
        return f"{self.of('metadata')} @> $1::text::jsonb", [wanted]

    def nearest(self, dimensions: int, condition: str, first: int, *, by_index: bool) -> str:
        """Return the query for the rows nearest to a vector.

        Its parameters begin at `first`: the model, the vector as text, how many.
        """
        expression, typed = self.measured(dimensions, by_index=by_index)
        distance = f"{expression} OPERATOR({quoted(self.facts.extension.schema)}.<=>) ${first + 1}::text::{typed}"
        return (
            f"SELECT {self.of('id')}::text AS id, {self.of('text')}::text AS text, "
            f"{self.of('metadata')}::text AS metadata, "
            f"{self.pgvector('vector_send')}({self.of('embedding')}::{self.pgvector('vector')}) AS embedding "
            # on a line of its own, since the condition may end in a comment
            f"FROM {self.sql_table} WHERE {self._for_model(f'${first}')} AND ({condition}\n) "
            f'ORDER BY {distance}, {self.of("id")}::text COLLATE "C" LIMIT ${first + 2}'
        )

    # ---- an index ----

    def index_name(self, model: str, dimensions: int, metric: str) -> str:
        """Return the name of the index over a model's vectors, qualified and quoted; the same every time."""
        whose = "\0".join((self.table, self.names["embedding"], model, str(dimensions)))
        suffix = f"_{hashlib.sha256(whose.encode()).hexdigest()[:12]}_{metric}_hnsw"
        return f"{quoted(self.facts.schema)}.{quoted(self.table[: schema.MAX_NAME_BYTES - len(suffix)] + suffix)}"

    def create_index(self, name: str, model_literal: str, dimensions: int, metric: str, options: str) -> str:
        """Return the statement for an HNSW index over the vectors of one model, as `nearest` looks for it."""
        expression, typed = self.measured(dimensions, by_index=True)
        operators = "halfvec" if "halfvec(" in typed else "vector"
        of_model = f" WHERE {self.of('model')} = {model_literal}" if "model" in self.names else ""
        return (
            f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {name.rpartition('.')[2]} ON {self.sql_table} "
            f"USING hnsw ({expression} {self.pgvector(f'{operators}_{METRICS[metric][1]}')}) WITH ({options}){of_model}"
        )


def _uuid(key: str) -> UUID:
    try:
        return UUID(key)
    except ValueError:
        raise ValueError("is no uuid") from None
