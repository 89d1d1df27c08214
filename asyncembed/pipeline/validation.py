"""Checks records before anything is paid for them. Pure."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..errors import InputError, InvalidRecordError
from ..sinks.contract import why_unstorable
from ..sources.records import as_record
from ..types import Failure, Record, RecordId, check_text

WhyUnfit: TypeAlias = Callable[[RecordId], str | None]
"""Returns why a sink cannot store an id, None if it can; see `types.CheckingSink`."""

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


@dataclass(slots=True, eq=False)
class Pending:
    """A valid record that is not stored yet: its position, and its id, hash and metadata as they are stored."""

    index: int
    record: Record
    key: str
    content_hash: str = field(repr=False)
    metadata: str | None = field(repr=False)


def checked(
    first: int, some: Sequence[Any], why_unfit: WhyUnfit, stored_id: Callable[[RecordId], str]
) -> tuple[float, list[Pending], list[Failure]]:
    """Return the seconds that the check took, the valid records, and the failures. `first` is the first position.

    The seconds are the thread's CPU time: the time it waits for the GIL does not depend on the records.
    """
    began = time.thread_time()
    good: list[Pending] = []
    bad: list[Failure] = []
    for index, value in enumerate(some, start=first):
        record: Record | None = None
        try:
            record = as_record(value)
            good.append(_pending(index, record, why_unfit, stored_id))
        except InputError as error:
            bad.append(Failure(index, error, record.id if record is not None else getattr(value, "record_id", None)))
    return time.thread_time() - began, good, bad


def _pending(index: int, record: Record, why_unfit: WhyUnfit, stored_id: Callable[[RecordId], str]) -> Pending:
    check_text(record.text)
    key = stored_id(record.id)  # two spellings of an id are one row
    metadata = _as_json(record.metadata)
    reason = why_unstorable(key, record.text, metadata) or why_unfit(record.id)
    if reason is not None:
        raise InvalidRecordError(reason)
    return Pending(index, record, key, hashlib.sha256(record.text.encode()).hexdigest(), metadata)


def _as_json(metadata: object) -> str | None:
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping):
        raise InvalidRecordError(f"has metadata that is {type(metadata).__name__}; it must be a mapping or None")
    try:
        return _encode(dict(metadata))
    except (TypeError, ValueError, RecursionError) as error:
        # from None: the original error may show the metadata
        raise InvalidRecordError(f"has metadata that JSON cannot hold ({type(error).__name__})") from None
