"""The table of a sink: as the user described it, as the catalog has it, and whether the two fit. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from ...errors import SinkConfigError
from ...types import RecordId
from .. import contract
from ..contract import quoted
from .pgvector import MAX_INDEXED, Extension

# The roles that a column can have.
ROLES = ("id", "model", "embedding", "content_hash", "text", "metadata", "created_at", "updated_at")
CLOCKS = ("created_at", "updated_at")

HASH_CHARACTERS = 64  # SHA-256 in hex

_INTEGER_BITS = {"smallint": 16, "integer": 32, "bigint": 64}
_TEXTS = ("text", "character varying")
_TYPES = {"model": _TEXTS, "content_hash": _TEXTS, "text": _TEXTS, "metadata": ("jsonb",)}
_INTEGER = re.compile(r"-?[0-9]{1,20}")


@dataclass(frozen=True, slots=True)
class Column:
    """One column as the catalog has it."""

    type: str  # without a modifier
    size: int | None  # n of `vector(n)` and `varchar(n)`; None if it is not limited
    required: bool  # whether an INSERT must give a value


def check_columns(columns: Mapping[str, str] | None, update_only: bool) -> dict[str, str]:
    """Return the name of the column for each role, by default its own; raise SinkConfigError if they are not valid."""
    if columns is None:
        if update_only:
            raise SinkConfigError("update_only needs columns=, the names of your table's columns")
        return {role: role for role in ROLES}
    if not {"id", "embedding"} <= set(columns) <= set(ROLES):
        raise SinkConfigError(
            f"columns= names the columns of your table for {', '.join(ROLES)}, id and embedding at least; "
            f"it has {sorted(columns)}"
        )
    return {role: contract.check_name(columns[role], f"{role} column") for role in ROLES if role in columns}


@dataclass(frozen=True, slots=True)
class Target:
    """The table as the user described it."""

    schema: str | None  # None for the first one on the search_path
    name: str  # without the schema
    columns: Mapping[str, str]  # the name of the column for each role
    ours: bool  # whether it has our columns, and the sizes of its vectors are recorded in a second table
    update_only: bool  # whether existing rows are filled, and none is inserted
    where: str  # table and database, for messages

    @property
    def sql_name(self) -> str:
        """The table, quoted, and qualified if the schema is known."""
        return ".".join(quoted(name) for name in (self.schema, self.name) if name is not None)

    @property
    def key(self) -> list[str]:
        """The names of the columns that make up the key: id, and model if the table has one."""
        return [self.columns[role] for role in ("id", "model") if role in self.columns]


@dataclass(frozen=True, slots=True)
class Table(Target):
    """A target that was found in the database."""

    schema: str
    extension: Extension
    catalog: Mapping[str, Column]  # all columns, by name
    unique: tuple[frozenset[str], ...]  # the columns of each unique index that ON CONFLICT can use
    has_models: bool  # whether the second table exists

    @property
    def sql_models(self) -> str:
        """The second table, which records the size of each model's vectors, qualified."""
        return f"{quoted(self.schema)}.{contract.MODELS_TABLE}"

    @property
    def vector_type(self) -> str:
        """`vector` or `halfvec`."""
        return self._column("embedding").type.rpartition(".")[2]

    @property
    def fixed_size(self) -> int | None:
        """The dimensions in the type of the embedding column; None if it takes any."""
        return self._column("embedding").size

    @property
    def id_type(self) -> str:
        """The type of the id column, without a modifier."""
        return self._column("id").type

    @property
    def has_text_ids(self) -> bool:
        """Whether ids are texts in the database, too."""
        return self.id_type in _TEXTS

    @property
    def written_roles(self) -> list[str]:
        """The roles that a write gives values to; rows that are only filled keep their texts."""
        kept = ("text", "metadata", *CLOCKS) if self.update_only else CLOCKS
        return [role for role in ROLES if role in self.columns and role not in kept]

    @property
    def clock_roles(self) -> list[str]:
        """The roles that are set to the time of writing; a column of another type keeps its default."""
        roles = [role for role in CLOCKS if role in self.columns]
        return [role for role in roles if self._column(role).type.startswith(("timestamp", "date"))]

    def _column(self, role: str) -> Column:
        return self.catalog[self.columns[role]]

    def sql(self, role: str) -> str:
        """Return the role's column, quoted; NULL if there is none."""
        return quoted(self.columns[role]) if role in self.columns else "NULL"

    def pgvector(self, name: str) -> str:
        """Return a type or function of pgvector, qualified."""
        return f"{quoted(self.extension.schema)}.{name}"

    # ---- does it fit? ----

    def check(self) -> None:
        """Raise SinkConfigError, with all problems, unless the table can be used as it is."""
        missing = sorted(name for name in self.columns.values() if name not in self.catalog)
        if missing:
            raise SinkConfigError(f"{self.where} has no columns {missing}; it has {sorted(self.catalog)}")
        if problems := list(self._problems()):
            raise SinkConfigError(f"{self.where} does not fit: {'; '.join(problems)}")

    def _problems(self) -> Iterable[str]:
        if self.vector_type not in MAX_INDEXED:
            yield f"{self.columns['embedding']} is {self.vector_type}, not vector or halfvec"
        if self.id_type not in (*_TEXTS, *_INTEGER_BITS, "uuid"):
            yield f"{self.columns['id']} is {self.id_type}, not a text, an integer or a uuid"
        for role, types in _TYPES.items():
            if role in self.columns and self._column(role).type not in types:
                yield f"{self.columns[role]} is {self._column(role).type}, not {types[0]}"
        if self.update_only:
            return  # no row is inserted
        if set(self.key) not in self.unique:
            yield f"it has no unique index on exactly ({', '.join(sorted(self.key))})"
        given = {self.columns[role] for role in (*self.written_roles, *self.clock_roles)}
        required = sorted(name for name, column in self.catalog.items() if column.required and name not in given)
        if required:
            yield f"{', '.join(required)} must be given, but no column maps to it"

    def check_lengths(self, model: str) -> None:
        """Raise SinkConfigError if the model's name, or any content hash, is too long for its column."""
        for role, needed in (("model", len(model)), ("content_hash", HASH_CHARACTERS)):
            most = self._column(role).size if role in self.columns else None
            if most is not None and needed > most:
                raise SinkConfigError(
                    f"{self.where}: its column {self.columns[role]} holds {most} characters; {needed} are needed"
                )

    # ---- ids ----

    def convert(self, key: str) -> Any:
        """Return the key as a value of the id column; raise ValueError if the column cannot hold it."""
        if self.has_text_ids:
            most = self._column("id").size
            if not contract.is_storable_text(key):
                raise ValueError("is no text")
            if most is not None and len(key) > most:
                raise ValueError(f"is longer than {most} characters")
            return key
        if self.id_type == "uuid":
            with suppress(ValueError):
                return UUID(key)
        elif _INTEGER.fullmatch(key):
            limit = 1 << (_INTEGER_BITS[self.id_type] - 1)
            if -limit <= int(key) < limit:
                return int(key)
        raise ValueError(f"is no {self.id_type}")

    def convert_all(self, ids: Iterable[RecordId]) -> dict[RecordId, Any]:
        """Return the ids with their values in the id column, without those that it cannot hold."""
        converted = {}
        for id in ids:
            with suppress(ValueError):
                converted[id] = self.convert(str(id))
        return converted
