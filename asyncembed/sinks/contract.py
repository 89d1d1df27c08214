"""What all sinks agree on, so that the same input gives the same rows in each of them. Pure.

Keys are `str(id)`, sorted and without doubles. A row that one store could not take is refused by every store.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import compress
from typing import Any, NoReturn

import jiter
import numpy as np

from ..errors import AsyncEmbedError, RowRefusedError, SinkConfigError, SinkError
from ..types import RecordId, Row, Vectors

TABLE = "embeddings"

# Which models a table holds, and the size of their vectors: one such table beside ours.
MODELS_TABLE = "asyncembed_models"

# PostgreSQL documentation, 4.1.1: "By default, NAMEDATALEN is 64 so the maximum identifier length is 63 bytes."
MAX_NAME_BYTES = 63

# Vectors whose numbers are looked at in one go, by a copy that stays in a processor's cache.
ROWS_LOOKED_AT = 32

# Ids a page when all are listed.
IDS_PER_PAGE = 10_000

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

Refusals = dict[RecordId, AsyncEmbedError]
"""The rows which a store refuses, by their id as it was given."""


def check_name(name: str, what: str = "table") -> str:
    """Return the SQL identifier unchanged.

    Raises:
        SinkConfigError: It is not made of ASCII letters, digits and underscores, or is too long.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > MAX_NAME_BYTES:
        raise SinkConfigError(
            f"{what} name {str(name)[:80]!r} is not made of ASCII letters, digits and underscores, "
            f"not beginning with a digit, {MAX_NAME_BYTES} at most"
        )
    return name


def quoted(name: str) -> str:
    """Return the name as SQL takes it, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


def check_table(name: str) -> str:
    """Return the name of a table of ours unchanged, or raise SinkConfigError."""
    if name == MODELS_TABLE:
        raise SinkConfigError(f"table name {name!r} is taken: the sizes of the vectors are kept there")
    return check_name(name)


def check_model(model: str, dimensions: int | None = None) -> None:
    """Raise SinkConfigError unless the model can be part of a key, and the size be that of a vector."""
    if not model or not has_bytes(model) or len(model.encode()) > MAX_MODEL_BYTES:
        raise SinkConfigError(
            f"model {str(model)[:80]!r} cannot be part of a key: 1 to {MAX_MODEL_BYTES} bytes of UTF-8 without NUL"
        )
    if dimensions is not None and dimensions < 1:
        raise SinkConfigError(f"model {model!r} has vectors of {dimensions} dimensions; there is at least 1")


def shown(key: str) -> str:
    """Return the id for a message: quoted, and not longer than a line."""
    return repr(key if len(key) <= 80 else f"{key[:77]}...")


def admit(
    model: str, rows: Sequence[Row], dimensions: int, where: str, convert: Callable[[str], Any] = str
) -> tuple[dict[Any, Row], Refusals]:
    """Sort the rows into those to store, by key and in the order of the keys, and those no store takes.

    Of rows with the same key the last one counts, also when it is refused. The order of the keys is what
    keeps concurrent writers from waiting for each other in a circle.

    Args:
        model: Whose vectors they are, for messages.
        rows: At least one.
        dimensions: The size of the model's vectors.
        where: Table and store, for messages.
        convert: From `str(id)` to the key as the store has it; raises ValueError for what cannot be one.

    Raises:
        SinkConfigError: Not one row has the given number of dimensions.
    """
    if all(row.vector.shape != (dimensions,) for row in rows):
        check_dimensions(model, dimensions, rows[0].vector.size, where)
    last: dict[Any, Row] = {}
    refused: Refusals = {}
    for row in rows:
        try:
            last[convert(str(row.id))] = row
        except ValueError:
            refused[row.id] = RowRefusedError(f"row {shown(str(row.id))} has an id that {where} cannot hold")
    keys = sorted(last)
    shape = (dimensions,)
    fitting = [row for key in keys if (row := last[key]).vector.shape == shape]
    not_finite = _not_finite(fitting)
    for key in keys:
        row = last[key]
        if row.vector.shape != shape:
            reason: str | None = f"has a vector of shape {row.vector.shape}; its model has {dimensions} dimensions"
        elif not_finite and id(row) in not_finite:
            reason = "has a vector with NaN or infinity in it"
        elif row.metadata is not None and not _is_json(row.metadata):
            reason = "has metadata that is not plain JSON, without NaN and half surrogate pairs"
        else:
            reason = why_unstorable(str(row.id), row.text, row.metadata)
        if reason is not None:
            refused[row.id] = RowRefusedError(f"row {shown(str(row.id))} {reason}")
            del last[key]
    return {key: last[key] for key in keys if key in last}, refused


def left_out(
    rows: Mapping[Any, Row], refused: Refusals, stored: Mapping[str, str | None], where: str, *, has_hashes: bool = True
) -> Refusals:
    """Return the rows that a trigger has left out without a word: neither refused, nor among what is stored.

    Args:
        rows: What was written, by key.
        refused: What the store has refused of it.
        stored: The content hash of each key that is stored now.
        where: Table and store, for messages.
        has_hashes: Whether the table has a column for them.
    """
    return {
        row.id: RowRefusedError(f"row {shown(str(row.id))} was left out by a trigger of {where}")
        for key, row in rows.items()
        if row.id not in refused and (str(key) not in stored or (has_hashes and stored[str(key)] != row.content_hash))
    }


def _not_finite(rows: Sequence[Row]) -> set[int]:
    """Return the `id()` of the rows, all of one size, that hold numbers which are not finite as they are stored.

    Many at a time, since numpy lets go of the interpreter in each call, and gets it back when others let go of it.
    """
    found: set[int] = set()
    with np.errstate(over="ignore"):  # what is beyond float32 becomes infinity
        for start in range(0, len(rows), ROWS_LOOKED_AT):
            some = rows[start : start + ROWS_LOOKED_AT]
            numbers = np.frombuffer(b"".join([little_endian(row.vector) for row in some]), "<f4")
            is_good = np.isfinite(numbers)
            if not is_good.all():
                bad = ~is_good.reshape(len(some), -1).all(axis=1)
                found.update(compress(map(id, some), bad))
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


_decode = json.JSONDecoder(parse_constant=_refuse_constant).decode


def _is_json(metadata: str) -> bool:
    with suppress(ValueError):
        jiter.from_json(metadata.encode(), allow_inf_nan=False)
        return True
    try:  # jiter takes no NaN and no half of a pair, but nothing that is nested 200 deep, either
        value = _decode(metadata)
        if "\\u" in metadata:  # escapes may hide what text must not hold
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


def little_endian(vector: Vectors) -> memoryview:
    """Return float32[d] as the 4 * d bytes that are stored: little-endian IEEE 754, no header. No copy if it is so."""
    return np.ascontiguousarray(vector, "<f4").data


def keys_of(ids: Iterable[RecordId]) -> list[str]:
    """Return the keys of the ids, sorted and without doubles, and without those that no store holds."""
    return sorted({key for id in ids if has_bytes(key := str(id))})  # at a NUL SQLite's JSON ends a text


def parsed(metadata: str | None) -> Mapping[str, Any] | None:
    """Return stored metadata as the mapping it was."""
    if metadata is None:
        return None
    # PostgreSQL writes 1e5000 with all its zeros, and Python makes no int of so many digits
    for parse_int in (int, float):
        with suppress(ValueError):
            value: Mapping[str, Any] = json.loads(metadata, parse_int=parse_int)
            return value
    raise SinkError("a row holds metadata that is no JSON: something else wrote it")


def choose_model(models: Mapping[str, int], model: str | None, dimensions: int | None, where: str) -> str | None:
    """Decide which model is meant, by a query of that size if there is one; None if nothing at all is stored.

    Raises:
        SinkConfigError: The model is not among those stored, none is named and there are several, or its vectors
            have another size.
    """
    if not models:
        return None
    names = ", ".join(f"{name!r} ({size} dimensions)" for name, size in sorted(models.items()))
    if model is None and len(models) > 1:
        raise SinkConfigError(f"{where} holds vectors of several models; say which with model=: {names}")
    chosen = next(iter(models)) if model is None else model
    if chosen not in models:
        raise SinkConfigError(f"{where} holds no vectors of model {chosen!r}; it holds: {names}")
    if dimensions is not None and models[chosen] != dimensions:
        raise SinkConfigError(f"the query has {dimensions} dimensions; {where} holds: {names}")
    return chosen


def check_dimensions(model: str, stored: int, given: int, where: str) -> None:
    """Raise SinkConfigError unless the sizes are the same: vectors of two sizes cannot be compared."""
    if stored != given:
        raise SinkConfigError(
            f"{where} holds vectors of {stored} dimensions for model {model!r}, and these have {given}: "
            f"ask for dimensions={stored}, or use another table"
        )


# PostgreSQL's nbtree.h, BTMaxItemSize: a third of an 8 KiB page, 2,704 bytes; the key is id and model together.
MAX_ID_BYTES = 2_000
MAX_MODEL_BYTES = 500

_ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def why_unstorable(key: str, text: str, metadata: str | None) -> str | None:
    """Return why no store takes a record, None if all do.

    Args:
        key: `str(id)`.
        text: What was, or will be, embedded.
        metadata: JSON text, or None.
    """
    if not key or not has_bytes(key) or len(key.encode()) > MAX_ID_BYTES:
        return f"has no usable id: 1 to {MAX_ID_BYTES:,} bytes of UTF-8 without NUL"
    if not has_bytes(text):
        return "has a text with NUL or half a surrogate pair in it, which stores cannot hold; remove it"
    if metadata is not None and (not has_bytes(metadata) or ("\\u0000" in metadata and _ESCAPED_NUL.search(metadata))):
        return "has metadata with NUL or half a surrogate pair in it, which stores cannot hold; remove it"
    return None


def has_bytes(text: str) -> bool:
    """Return whether the text is UTF-8 without NUL, which is what a store calls a text."""
    if "\x00" in text:
        return False
    if text.isascii():  # known, not looked for
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
