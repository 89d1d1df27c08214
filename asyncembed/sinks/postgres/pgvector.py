"""pgvector in a database: its schema and version, its limits, and its binary format on a connection."""

from __future__ import annotations

import struct
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


@dataclass(frozen=True, slots=True)
class Extension:
    """pgvector as installed in the database."""

    schema: str  # may be outside of the search_path
    version: tuple[int, ...]  # for instance (0, 8)


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
    encode, decode = _CODECS[kind]
    await connection.set_type_codec(kind, schema=schema, encoder=encode, decoder=decode, format="binary")


def _encode(vector: Any, number_type: str = ">f4") -> bytes:
    """Return a vector as pgvector receives it: two bytes for its size, two zero bytes, its numbers; all big-endian.

    See `vector_recv` in its vector.c. Its own classes take 5 us for 1,536 numbers and 13 us for halves; these 2 and 8.
    """
    numbers = np.asarray(vector)
    return struct.pack(">HH", numbers.size, 0) + numbers.astype(number_type).tobytes()


def _encode_half(vector: Any) -> bytes:
    with np.errstate(over="ignore"):  # numbers beyond half precision become infinity, which the server refuses
        return _encode(vector, ">f2")


_CODECS = {"vector": (_encode, Vector.from_binary), "halfvec": (_encode_half, HalfVector.from_binary)}
