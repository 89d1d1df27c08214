"""The rules that all sinks share, so that the same input gives the same rows in each of them. Pure.

In this order: names in SQL, models and the sizes of their vectors, texts and ids, batches of rows, values in columns.
A row that one store cannot hold is refused by every store.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import compress
from typing import Any

import numpy as np

from ..errors import AsyncEmbedError, RowRefusedError, SinkConfigError, SinkError
from ..types import RecordId, Row, Vectors

TABLE = "embeddings"

# The second table, which records the models of our tables and the size of their vectors.
MODELS_TABLE = "asyncembed_models"

# PostgreSQL documentation, 4.1.1: "By default, NAMEDATALEN is 64 so the maximum identifier length is 63 bytes."
MAX_NAME_BYTES = 63

# PostgreSQL's nbtree.h, BTMaxItemSize: a third of an 8 KiB page, 2,704 bytes; the key is id and model together.
MAX_ID_BYTES = 2_000
MAX_MODEL_BYTES = 500

# Vectors that are checked for NaN at a time, through a copy that fits into a processor's cache.
ROWS_PER_CHECK = 32

IDS_PER_PAGE = 10_000  # when all ids are listed

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")

Refusals = dict[RecordId, AsyncEmbedError]
"""The rows that a store refuses: the error of each, by id as given."""


# ---- names in SQL ----


def check_name(name: str, what: str = "table") -> str:
    """Return the SQL identifier unchanged; raise SinkConfigError unless it is short, of ASCII letters, digits and _."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > MAX_NAME_BYTES:
        raise SinkConfigError(
            f"{what} name {str(name)[:80]!r} is not valid: use 1 to {MAX_NAME_BYTES} ASCII letters, digits and "
            "underscores, and no digit at the beginning"
        )
    return name


def check_table(name: str) -> str:
    """Return the table's name unchanged, or raise SinkConfigError."""
    if name == MODELS_TABLE:
        raise SinkConfigError(f"table name {name!r} is reserved for the sizes of vectors: use another")
    return check_name(name)


def quoted(name: str) -> str:
    """Return the name as a quoted SQL identifier; it may hold any character."""
    return '"' + name.replace('"', '""') + '"'


# ---- models and the sizes of their vectors ----


def check_model_key(model: str, dimensions: int | None = None) -> None:
    """Raise SinkConfigError unless the model's name can be part of a key, and its vectors have at least 1 dimension."""
    if not model or not is_storable_text(model) or len(model.encode()) > MAX_MODEL_BYTES:
        raise SinkConfigError(
            f"model {str(model)[:80]!r} cannot be part of a key: use 1 to {MAX_MODEL_BYTES} bytes of UTF-8 without NUL"
        )
    if dimensions is not None and dimensions < 1:
        raise SinkConfigError(f"model {model!r} has vectors of {dimensions} dimensions; the least is 1")


def check_dimensions(model: str, stored: int, given: int, where: str) -> None:
    """Raise SinkConfigError unless the sizes are equal: vectors of two sizes cannot be compared."""
    if stored != given:
        raise SinkConfigError(
            f"{where} holds vectors of {stored} dimensions for model {model!r}, and these have {given}: "
            f"ask for dimensions={stored}, or use another table"
        )


def choose_model(models: Mapping[str, int], model: str | None, dimensions: int | None, where: str) -> str | None:
    """Return the model that a search or an index is about, from the stored ones; None if nothing is stored.

    The caller may have named a `model`, and a query has `dimensions`. `where` is table and store, for messages.

    Raises:
        SinkConfigError: The model is not stored, none is named and there are several, or its vectors have another
            size than the query.
    """
    if not models:
        return None
    names = ", ".join(f"{name!r} ({size} dimensions)" for name, size in sorted(models.items()))
    if model is None and len(models) > 1:
        raise SinkConfigError(f"{where} holds vectors of several models; choose one with model=: {names}")
    chosen = next(iter(models)) if model is None else model
    if chosen not in models:
        raise SinkConfigError(f"{where} holds no vectors of model {chosen!r}; it holds: {names}")
    if dimensions is not None and models[chosen] != dimensions:
        raise SinkConfigError(f"the query has {dimensions} dimensions; {where} holds: {names}")
    return chosen


# ---- texts and ids ----


def is_storable_text(text: str) -> bool:
    """Return whether stores take the text: it can be encoded as UTF-8 and has no NUL."""
    if "\x00" in text:
        return False
    if text.isascii():  # which CPython knows without a look at the characters
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def why_unstorable(key: str, text: str, metadata: str | None) -> str | None:
    """Return why no store takes a record with `str(id)`, a text, and metadata as JSON; None if all do."""
    if not key or not is_storable_text(key) or len(key.encode()) > MAX_ID_BYTES:
        return f"has no usable id: 1 to {MAX_ID_BYTES:,} bytes of UTF-8 without NUL"
    bad = "with NUL or half a surrogate pair in it, which stores cannot hold; remove it"
    if not is_storable_text(text):
        return f"has a text {bad}"
    if metadata is not None and (
        not is_storable_text(metadata) or ("\\u0000" in metadata and _ESCAPED_NUL.search(metadata))
    ):
        return f"has metadata {bad}"
    return None


def keys_of(ids: Iterable[RecordId]) -> list[str]:
    """Return the keys of the ids, sorted, without duplicates and without those that no store can hold."""
    return sorted({key for id in ids if is_storable_text(key := str(id))})  # SQLite's JSON ends a text at a NUL


def shown(key: str) -> str:
    """Return the id for a message: quoted, and shortened to one line."""
    return repr(key if len(key) <= 80 else f"{key[:77]}...")


# ---- batches of rows ----


def admit(
    model: str, rows: Sequence[Row], dimensions: int, where: str, convert: Callable[[str], Any] = str
) -> tuple[dict[Any, Row], Refusals]:
    """Split a batch into the rows to store, sorted by key, and the rows that no store takes.

    The last of several rows with one key counts, even when it is refused. Sorted keys prevent deadlocks between
    concurrent writers. `convert` makes the key that the store uses from `str(id)`, or raises ValueError.

    Raises:
        SinkConfigError: No row has the given number of dimensions.
    """
    shape = (dimensions,)
    if all(row.vector.shape != shape for row in rows):
        check_dimensions(model, dimensions, rows[0].vector.size, where)
    last: dict[Any, Row] = {}
    refused: Refusals = {}
    for row in rows:
        try:
            last[convert(str(row.id))] = row
        except ValueError:
            refused[row.id] = RowRefusedError(f"row {shown(str(row.id))} has an id that {where} cannot hold")
    admitted = {key: last[key] for key in sorted(last)}
    not_finite = _not_finite([row for row in admitted.values() if row.vector.shape == shape])
    for key, row in list(admitted.items()):
        if row.vector.shape != shape:
            reason: str | None = f"has a vector of shape {row.vector.shape}; its model has {dimensions} dimensions"
        elif id(row) in not_finite:
            reason = "has a vector with NaN or infinity in it"
        elif row.metadata is not None and not _is_json(row.metadata):
            reason = "has metadata that is not plain JSON, without NaN and half surrogate pairs"
        else:
            reason = why_unstorable(str(row.id), row.text, row.metadata)
        if reason is not None:
            refused[row.id] = RowRefusedError(f"row {shown(str(row.id))} {reason}")
            del admitted[key]
    return admitted, refused


def _not_finite(rows: Sequence[Row]) -> set[int]:
    """Return the `id()` of the rows, all of one size, whose vectors are not finite as float32.

    Many rows at a time: numpy releases the GIL in each call, and waits to get it back while other threads compute.
    """
    found: set[int] = set()
    with np.errstate(over="ignore"):  # numbers beyond float32 become infinity
        for start in range(0, len(rows), ROWS_PER_CHECK):
            some = rows[start : start + ROWS_PER_CHECK]
            numbers = np.frombuffer(b"".join([little_endian(row.vector) for row in some]), "<f4")
            is_good = np.isfinite(numbers)
            if not is_good.all():
                found.update(compress(map(id, some), ~is_good.reshape(len(some), -1).all(axis=1)))
    return found


def left_out(
    rows: Mapping[Any, Row], refused: Refusals, stored: Mapping[str, str | None], where: str, *, has_hashes: bool = True
) -> Refusals:
    """Return the rows that a trigger dropped without an error: not refused, but not stored either.

    `stored` has the content hash of each key that is stored now, if the table has a column for hashes.
    """
    return {
        row.id: RowRefusedError(f"row {shown(str(row.id))} was left out by a trigger of {where}")
        for key, row in rows.items()
        if row.id not in refused and (str(key) not in stored or (has_hashes and stored[str(key)] != row.content_hash))
    }


# ---- values in columns ----


def little_endian(vector: Vectors) -> memoryview:
    """Return float32[d] as stored: 4 * d bytes, little-endian, without a header. Copies only if it must convert."""
    return np.ascontiguousarray(vector, "<f4").data


def parsed(metadata: str | None) -> Mapping[str, Any] | None:
    """Return stored metadata as a mapping; raise SinkError if it is no JSON."""
    if metadata is None:
        return None
    # PostgreSQL writes 1e5000 with all its zeros, and Python's int refuses that many digits
    for parse_int in (int, float):
        with suppress(ValueError):
            value: Mapping[str, Any] = json.loads(metadata, parse_int=parse_int)
            return value
    raise SinkError("a row holds metadata that is no JSON: another program wrote it")


def _is_json(metadata: str) -> bool:
    try:
        value = _decode(metadata)
        if "\\u" in metadata:  # an escape may hide half a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


_decode = json.JSONDecoder(parse_constant=int).decode  # int("NaN") and int("Infinity") raise ValueError
