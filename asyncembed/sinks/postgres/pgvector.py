"""pgvector in a database: where it is, and its types on a connection, in their binary format."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from pgvector import HalfVector, Vector

from ..contract import quoted


@dataclass(frozen=True, slots=True)
class Extension:
    """pgvector as it was found.

    Attributes:
        schema: The schema it is in; not always one that the search_path names.
        version: Such as (0, 8).
    """

    schema: str
    version: tuple[int, ...]


async def find_extension(connection: Any) -> Extension | None:
    """Return where pgvector is in this database, None if it was not created."""
    row = await connection.fetchrow(
        "SELECT n.nspname, e.extversion FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace "
        "WHERE e.extname = 'vector'"
    )
    return None if row is None else Extension(row[0], tuple(int(part) for part in row[1].split(".")[:2]))


async def teach(connection: Any) -> bool:
    """Let vectors travel in pgvector's binary format on this connection from now on; return whether there is one."""
    extension = await find_extension(connection)
    if extension is None:
        return False
    for kind in ("vector", "halfvec") if extension.version >= (0, 7) else ("vector",):
        await _set_codec(connection, extension.schema, kind)
    return True


async def is_untaught(connection: Any, schema: str, kind: str) -> bool:
    """Return whether vectors travel as text on this connection, since whoever made it has not seen to that."""
    return isinstance(await connection.fetchval(f"SELECT '[1]'::{quoted(schema)}.{kind}"), str)


@asynccontextmanager
async def taught(connection: Any, schema: str, kind: str) -> AsyncIterator[None]:
    """Let them travel in binary for a while, on a connection that is not ours."""
    await _set_codec(connection, schema, kind)
    try:
        yield
    except Exception:
        try:
            await connection.execute("ROLLBACK")  # in a failed transaction it cannot be untaught
            await connection.reset_type_codec(kind, schema=schema)
        except BaseException:
            connection.terminate()
        raise
    except BaseException:
        connection.terminate()
        raise
    await connection.reset_type_codec(kind, schema=schema)


async def _set_codec(connection: Any, schema: str, kind: str) -> None:
    encode, decode = _CODECS[kind]
    await connection.set_type_codec(kind, schema=schema, encoder=encode, decoder=decode, format="binary")


# As pgvector receives a vector (vector_recv in its vector.c): two bytes for its size, two that are 0, and its numbers,
# all big-endian. Its own classes take 5 us for 1,536 numbers, and 13 us for halves, by way of Python's array; these 2
# and 8.
_HEADER = struct.Struct(">HH")


def _encode(vector: Any) -> bytes:
    numbers = np.asarray(vector)
    return _HEADER.pack(numbers.size, 0) + numbers.astype(">f4").tobytes()


def _encode_half(vector: Any) -> bytes:
    numbers = np.asarray(vector)
    with np.errstate(over="ignore"):  # to infinity, which the server then refuses for its row alone
        return _HEADER.pack(numbers.size, 0) + numbers.astype(">f2").tobytes()


_CODECS: dict[str, tuple[Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    "vector": (_encode, Vector.from_binary),
    "halfvec": (_encode_half, HalfVector.from_binary),
}
