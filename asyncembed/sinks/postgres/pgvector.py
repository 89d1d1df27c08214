"""pgvector in a database: its schema and version, its limits, and its binary format on a connection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from pgvector import HalfVector, Vector

from ..contract import quoted

# pgvector README, "What if I want to index vectors with more than 2,000 dimensions?", and 16,000 for storage.
MAX_DIMENSIONS = 16_000
MAX_INDEXED = {"vector": 2_000, "halfvec": 4_000}

# The operator class of each metric for an index (pgvector README, "HNSW").
METRICS = {"cosine": "cosine_ops", "inner_product": "ip_ops", "l2": "l2_ops"}

_CLASSES: dict[str, Any] = {"vector": Vector, "halfvec": HalfVector}


@dataclass(frozen=True, slots=True)
class Extension:
    """pgvector as installed in the database.

    Attributes:
        schema: Its schema, which may be outside of the search_path.
        version: For instance (0, 8).
    """

    schema: str
    version: tuple[int, ...]


async def find_extension(connection: Any) -> Extension | None:
    """Return the schema and version of pgvector in this database; None if it was not created."""
    row = await connection.fetchrow(
        "SELECT n.nspname, e.extversion FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace "
        "WHERE e.extname = 'vector'"
    )
    return None if row is None else Extension(row[0], tuple(int(part) for part in row[1].split(".")[:2]))


async def register_codec(connection: Any) -> bool:
    """Have the connection send and receive vectors in binary; return False if the database has no pgvector."""
    extension = await find_extension(connection)
    if extension is None:
        return False
    for kind in ("vector", "halfvec") if extension.version >= (0, 7) else ("vector",):
        await _set_codec(connection, extension.schema, kind)
    return True


async def lacks_codec(connection: Any, schema: str, kind: str) -> bool:
    """Return whether the connection sends vectors as text, because the owner of its pool has set no codec."""
    return isinstance(await connection.fetchval(f"SELECT '[1]'::{quoted(schema)}.{kind}"), str)


@asynccontextmanager
async def with_codec(connection: Any, schema: str, kind: str) -> AsyncIterator[None]:
    """Send vectors in binary inside the block, on a connection of a pool that was handed in."""
    await _set_codec(connection, schema, kind)
    try:
        yield
    except BaseException:
        connection.terminate()  # in a failed transaction the codec cannot be reset
        raise
    await connection.reset_type_codec(kind, schema=schema)


async def _set_codec(connection: Any, schema: str, kind: str) -> None:
    vector_class = _CLASSES[kind]

    def encode(vector: Any) -> bytes:
        with np.errstate(over="ignore"):  # beyond half precision is infinity, and the server refuses that row alone
            return bytes(vector_class(np.asarray(vector)).to_binary())

    await connection.set_type_codec(
        kind, schema=schema, encoder=encode, decoder=vector_class.from_binary, format="binary"
    )
