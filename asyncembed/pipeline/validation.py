"""Sorts records into good ones and failures before anything is paid for. Pure."""

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
"""What a sink may have as `why_unfit`, so that an id it cannot hold is not paid for: returns what is wrong with it."""


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


@dataclass(slots=True, eq=False)
class Pending:
    """A good record between source and store."""

    index: int
    record: Record
    key: str
    content_hash: str = field(repr=False)
    metadata: str | None = field(repr=False)


def checked(
    first: int, some: Sequence[Any], why_unfit: WhyUnfit, stored_id: Callable[[RecordId], str]
) -> tuple[float, list[Pending], list[Failure]]:
    """Tell the good records of a slice from the bad ones, before anything is paid for either; and the time it took.

    The thread's own time, in seconds: what it waits for the interpreter says nothing of the records.
    """
    began = time.thread_time()
    good: list[Pending] = []
    bad: list[Failure] = []
    for index, value in enumerate(some, start=first):
        record_id = getattr(value, "record_id", None)
        try:
            record = as_record(value)
            record_id = record.id
            check_text(record.text)
            key = stored_id(record.id)  # two spellings of one id are one row
            metadata = _as_json(record.metadata)
            reason = why_unstorable(key, record.text, metadata) or why_unfit(record.id)
            if reason is not None:
                raise InvalidRecordError(reason)
        except InputError as error:
            bad.append(Failure(index, error, record_id))
        else:
            content_hash = hashlib.sha256(record.text.encode()).hexdigest()
            good.append(Pending(index, record, key, content_hash, metadata))
    return time.thread_time() - began, good, bad


def _as_json(metadata: object) -> str | None:
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping):
        raise InvalidRecordError(f"has metadata that is {type(metadata).__name__}; it must be a mapping or None")
    try:
        return _encode(dict(metadata))
    except (TypeError, ValueError, RecursionError) as error:
        # from None: the original may show the metadata
        raise InvalidRecordError(f"has metadata that JSON cannot hold ({type(error).__name__})") from None
