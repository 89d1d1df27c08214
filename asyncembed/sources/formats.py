"""Parses the bytes of one file: into lines, and lines of JSON or CSV into records.

The parsers block, are lazy, and hold one block of the file, or one line or row of at most MAX_LINE_BYTES. A broken
record fails alone: an `InputError` with the file's name and the line's number is yielded in its place. If nothing
after it can be trusted (a quote that is never closed), the rest of the file is not read. No message quotes a line.
"""

from __future__ import annotations

import csv
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, starmap
from typing import Any, Final, TypeAlias

import jiter

from ..errors import ConfigError, InputError, InvalidRecordError, InvalidTextError, WrongTypeError
from ..types import Record
from .chunking import Line

RecordOrError: TypeAlias = Record | InputError
"""A record, or the error of a record that could not be read."""

RawLine: TypeAlias = tuple[int, bytes | None]
"""A line's number (from 1), and its bytes without the newline; None if they are more than MAX_LINE_BYTES."""

# The longest text that a model accepts, 8,192 tokens of 128 bytes, has 1 MiB, and JSON may write a byte as six.
MAX_LINE_BYTES: Final = 16 * 1024 * 1024

_UTF8_MARK: Final = b"\xef\xbb\xbf"
_UTF16_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Fields:
    """The names of the fields that hold a record's id and its text."""

    id: str = "id"
    text: str = "text"

    def __post_init__(self) -> None:
        if self.id == self.text:
            raise ConfigError(f'id_field and text_field are both "{self.id}"; name two fields')


def line_blocks(read: Callable[[], bytes]) -> Iterator[list[RawLine]]:
    r"""Yield the lines that each call of `read` completes. Only "\n" ends a line; a byte order mark is removed.

    Raises:
        InvalidRecordError: The file is UTF-16.
    """
    number, unfinished = 1, _UnfinishedLine()
    while block := read():
        *whole, rest = block.split(b"\n")
        lines: list[RawLine] = []
        if whole:
            unfinished.add(whole[0])
            lines = [unfinished.take(number), *enumerate(whole[1:], start=number + 1)]
        unfinished.add(rest)
        yield lines
        number += len(lines)
    if unfinished.size:
        yield [unfinished.take(number)]


@dataclass(slots=True)
class _UnfinishedLine:
    """The pieces of a line whose end is not read yet. They are dropped when the line exceeds MAX_LINE_BYTES."""

    size: int = 0
    pieces: list[bytes] = field(default_factory=list)

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        if self.size > MAX_LINE_BYTES:
            self.pieces.clear()
        elif piece:
            self.pieces.append(piece)

    def take(self, number: int) -> RawLine:
        line = None if self.size > MAX_LINE_BYTES else b"".join(self.pieces)
        self.size, self.pieces = 0, []
        if number == 1 and line is not None:
            if line.startswith(_UTF16_MARKS):
                raise InvalidRecordError("is UTF-16; convert it to UTF-8")
            line = line.removeprefix(_UTF8_MARK)
        return number, line


def text_lines(blocks: Iterator[list[RawLine]]) -> Iterator[Line]:
    """Yield the decoded lines with their line ends; one that is not text has a `problem`."""
    return starmap(_decoded, chain.from_iterable(blocks))


def _decoded(number: int, raw: bytes | None) -> Line:
    if raw is None:
        return Line(number, "", f"is longer than {MAX_LINE_BYTES:,} bytes")
    problem = f"has a NUL at byte {raw.index(0) + 1}, so it is not text" if b"\0" in raw else None
    try:
        return Line(number, raw.decode() + "\n", problem)
    except UnicodeDecodeError as error:
        problem = f"has 0x{raw[error.start]:02x} at byte {error.start + 1}, which is not UTF-8"
        return Line(number, raw.decode(errors="replace") + "\n", problem)


def json_records(blocks: Iterator[list[RawLine]], name: str, fields: Fields) -> Iterator[RecordOrError | None]:
    """Yield a record for each line that is not blank, and None after each block: reading the next one may wait."""
    for lines in blocks:
        for number, raw in lines:
            if raw is None or raw.strip():
                yield _json_record(raw, f"{name} line {number}", fields)
        yield None


def _json_record(raw: bytes | None, where: str, fields: Fields) -> RecordOrError:
    if raw is None:
        return InvalidRecordError(f"{where}: is longer than {MAX_LINE_BYTES:,} bytes")
    try:
        value = jiter.from_json(raw, allow_inf_nan=False, cache_mode="keys", catch_duplicate_keys=True)
    except ValueError as error:
        # from its message only the words before a quoted key, and the column
        why = str(error).partition('"')[0].partition(" at line ")[0].strip()
        return InvalidRecordError(f"{where}: is not JSON: {why} at column {str(error).rpartition(' ')[2]}")
    if not isinstance(value, dict):
        return InvalidRecordError(f"{where}: holds a JSON {type(value).__name__}; a record is an object")
    return record_from_fields(value, where, fields)


def record_from_fields(value: dict[str, Any], where: str, fields: Fields) -> RecordOrError:
    """Return a record with the id and text in `value`; the other fields are metadata, a mapping `metadata` is merged.

    `value` is modified. `where` is the record's place in its source, for messages.
    """
    id = value.pop(fields.id, None)
    if not isinstance(id, str | int) or isinstance(id, bool) or id == "":
        what = "is missing or null" if id is None else "is empty" if id == "" else f"is {type(id).__name__}"
        return InvalidRecordError(f'{where}: field "{fields.id}" {what}; an id is a str or an int')
    try:
        text = _text(value, fields.text)
    except InputError as error:
        named = type(error)(f"{where}: {error}")
        named.record_id = id
        return named
    inner = value.pop("metadata") if isinstance(value.get("metadata"), dict) else {}
    return Record(id, text, value | inner or None)


def _text(value: dict[str, Any], name: str) -> str:
    """Pop the text; without a field "text", join title and content as `sources.records` does."""
    if name == "text" and "text" not in value and "content" in value:
        parts = [_str(value.pop(part), part) for part in ("title", "content") if value.get(part) not in (None, "")]
        return _str("\n".join(parts), "content")
    return _str(value.pop(name, None), name)


def _str(text: object, name: str) -> str:
    if text is None:
        raise InvalidRecordError(f'field "{name}" is missing or null')
    if not isinstance(text, str):
        raise WrongTypeError(f'field "{name}" is {type(text).__name__}; a text is a str')
    if not text:
        raise InvalidTextError(f'field "{name}" is empty')
    return text


def csv_records(blocks: Iterator[list[RawLine]], name: str, fields: Fields) -> Iterator[RecordOrError]:
    """Yield a record for each row below the header, or its error.

    Raises:
        InvalidRecordError: The header cannot be used, or a row does not end. Earlier records stay valid.
    """
    lines = _RowLines(text_lines(blocks))
    rows = _rows(lines)
    header, problem = next(rows, ([], None))
    if why := problem or (_header_problem(header, fields) if header else None):
        raise InvalidRecordError(f"line {lines.first}: {why}")
    for row, problem in rows:
        where = f"{name} line {lines.first}" + (f" to {lines.last}" if lines.last > lines.first else "")
        if problem:
            yield InvalidRecordError(f"{where}: {problem}")
        elif len(row) != len(header):
            yield InvalidRecordError(f"{where}: the row has {len(row)} fields, the header {len(header)}")
        else:
            yield record_from_fields(dict(zip(header, row, strict=True)), where, fields)


def _header_problem(header: list[str], fields: Fields) -> str | None:
    # The columns are counted, not shown: in a file without a header they are texts.
    if len(set(header)) < len(header):
        return f"the header names one of its {len(header)} columns twice"
    if fields.id not in header:
        return f'the header has no "{fields.id}" among its {len(header)} columns (they are separated by commas)'
    if fields.text not in header and not (fields.text == "text" and "content" in header):
        return f'the header has no "{fields.text}" among its {len(header)} columns'
    return None


class _RowLines:
    """The lines that a csv reader reads, and where the current row is among them."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self.begin_row()

    def begin_row(self) -> None:
        self.first = self.last = self._size = 0  # first and last are line numbers; 0 before one is read
        self.problem: str | None = None  # the first problem in one of its lines

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines, None)
        if line is None and self.first:  # the reader wants another line only within quotes
            raise self._endless()
        if line is None:
            raise StopIteration
        self.first, self.last = self.first or line.number, line.number
        self.problem = self.problem or line.problem
        self._size += len(line.text)
        if not line.text:  # too long a line: the quotes in it are unknown
            raise InvalidRecordError(f"line {line.number}: {line.problem}; not read on from there")
        if self._size > MAX_LINE_BYTES:
            raise self._endless()
        return line.text

    def _endless(self) -> InvalidRecordError:
        return InvalidRecordError(f"line {self.first}: a quote is opened and not closed; not read on from there")


def _rows(lines: _RowLines) -> Iterator[tuple[list[str], str | None]]:
    """Yield each row that is not blank, and its problem or None."""
    reader = csv.reader(lines, strict=True)
    while True:
        lines.begin_row()
        try:
            with _wide_fields():
                row, problem = next(reader), lines.problem
        except StopIteration:
            return
        except csv.Error as error:
            # its messages name rules, not texts; a dash separates advice for Python programmers
            row, problem = [], lines.problem or str(error).partition(" - ")[0]
        if row or problem:
            yield row, problem


# The csv module has one limit for the whole process, 131,072 characters by default.
_csv_limit = threading.Lock()


@contextmanager
def _wide_fields() -> Iterator[None]:
    with _csv_limit:
        before = csv.field_size_limit(MAX_LINE_BYTES + 1)  # `_RowLines` ends a row before it is that long
        try:
            yield
        finally:
            csv.field_size_limit(before)
