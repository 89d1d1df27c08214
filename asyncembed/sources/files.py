"""Reads records from files, folders, globs and standard input.

A source is a file, a folder (searched recursively, in order), a glob, or `-` for JSON Lines on standard input. The
suffix of a file's name decides how it is parsed. Reading and splitting run in threads, one group of records at a time,
and only as fast as the records are consumed.
"""

from __future__ import annotations

import asyncio
import errno
import glob
import os
import stat
import sys
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import chain
from pathlib import Path, PurePath
from typing import Any, Final, TypeAlias, TypeVar

from ..errors import ConfigError, InvalidRecordError
from .chunking import Splitter, markdown_chunks, plain_chunks
from .formats import Fields, RecordOrError, csv_records, json_records, line_blocks, text_lines

STDIN: Final = "-"

_JSON_LINES: Final = frozenset({".jsonl", ".ndjson"})
_CSV: Final = frozenset({".csv"})
_MARKDOWN: Final = frozenset({".md", ".markdown"})
# Only these are looked for in a folder. A file that is named, or matched by a glob, is read whatever its suffix.
SUFFIXES: Final = _JSON_LINES | _CSV | _MARKDOWN | {".txt", ".text", ".rst"}

# The bytes of one read, and roughly of one group of records: some milliseconds of work in a thread.
_BLOCK_BYTES: Final = 256 * 1024

_T = TypeVar("_T")
_Found: TypeAlias = str | InvalidRecordError  # the path of a file, or the error of a folder that cannot be searched


class Sources:
    """An async iterable of the records in files. An `InputError` stands in place of each broken one.

    Args:
        sources: Paths of files and folders, globs, or `-`.
        id_field: The field of JSON objects and the column of CSV files that holds the id.
        text_field: The one that holds the text. All others become metadata.
        chunk_tokens: The most tokens in a chunk of a Markdown or text file.

    Attributes:
        total_bytes: The size of all files; None before `check`, or if a pipe is among them.
        empty_folders: Folders without a file that has one of SUFFIXES.
    """

    def __init__(
        self, sources: Iterable[str], *, id_field: str = "id", text_field: str = "text", chunk_tokens: int = 512
    ) -> None:
        self._sources = list(dict.fromkeys(sources))
        self._fields = Fields(id_field, text_field)
        self._chunk_tokens = chunk_tokens
        self._checked = False
        self._read_bytes = self._read_records = 0
        self._finished = False
        self.total_bytes: int | None = None
        self.empty_folders: list[str] = []

    async def check(self, target: str | None = None) -> None:
        """Check that all sources exist and can be opened, and that none is the file to be written; read nothing.

        Raises:
            ConfigError: A source does not exist, cannot be opened, or is the target.
        """
        await asyncio.wrap_future(_in_thread(lambda: self._check(target)))
        self._checked = True

    def expected(self) -> int | None:
        """Return the number of records: an estimate from the bytes until all are read; None if it is unknown."""
        if self._finished:
            return self._read_records
        if not self.total_bytes or not self._read_bytes:
            return None
        return int(self._read_records * max(1.0, self.total_bytes / self._read_bytes))

    async def __aiter__(self) -> AsyncIterator[RecordOrError]:
        if not self._checked:
            await self.check()
        self._read_bytes, self._read_records, self._finished = 0, 0, False
        groups = self._groups()
        reading = _in_thread(lambda: next(groups, None))
        try:
            while (group := await asyncio.wrap_future(reading)) is not None:
                self._read_records += len(group)
                for record in group:
                    yield record
                reading = _in_thread(lambda: next(groups, None))
            self._finished = True
        finally:
            # closes the file that is being read: now, or when the thread that reads it is done
            reading.add_done_callback(lambda _: groups.close())

    def _check(self, target: str | None) -> None:
        forbidden = _status(target) if target is not None else None
        sizes: list[int | None] = []
        for source in self._sources:
            before, folder = len(sizes), os.path.isdir(source)
            sizes.extend(self._size(path, forbidden, must_open=not folder) for path in _files(source))
            if len(sizes) == before and not folder:
                raise ConfigError(f"no such file or folder, and nothing matches: {_shown(source)}")
            if len(sizes) == before:
                self.empty_folders.append(source)
        known = [size for size in sizes if size is not None]
        self.total_bytes = sum(known) if len(known) == len(sizes) else None

    def _size(self, path: _Found, forbidden: os.stat_result | None, *, must_open: bool) -> int | None:
        """Return the file's size in bytes, None for a pipe; 0 for a file that cannot be read and so fails alone."""
        if path == STDIN:
            return None
        if isinstance(path, InvalidRecordError):
            return 0
        try:
            status = os.stat(path)
            if forbidden is not None and os.path.samestat(status, forbidden):
                raise ConfigError(f"{_shown(path)} is a source and the target")
            if not stat.S_ISREG(status.st_mode):
                return None
            with open(path, "rb"):
                pass
        except OSError as error:
            if must_open:
                raise ConfigError(f"{_shown(path)}: {error.strerror}") from error
            return 0
        if _suffix(path) not in _JSON_LINES | _CSV:
            _ = self._splitter  # a missing splitter is reported now, not after the first records are paid for
        return status.st_size

    @cached_property
    def _splitter(self) -> Splitter:
        return Splitter(self._chunk_tokens)

    def _groups(self) -> Generator[list[RecordOrError], None, None]:
        """Group the records by the block. A None among them ends a group, because reading on may wait for a pipe."""
        group: list[RecordOrError] = []
        begun = 0
        for record in self._records():
            if record is not None:
                group.append(record)
            if group and (record is None or self._read_bytes - begun > _BLOCK_BYTES):
                yield group
                group, begun = [], self._read_bytes
        if group:
            yield group

    def _records(self) -> Iterator[RecordOrError | None]:
        for path in chain.from_iterable(map(_files, self._sources)):
            if isinstance(path, InvalidRecordError):
                yield path
            else:
                yield from self._file_records(path)

    def _file_records(self, path: str) -> Iterator[RecordOrError | None]:
        name = "standard input" if path == STDIN else PurePath(path).as_posix()
        try:
            name.encode()
            with _opened(path) as file:
                yield from self._parsed(path, name, file)
        except UnicodeEncodeError:
            yield InvalidRecordError(f"{_shown(path)}: the name of the file is not UTF-8")
        except OSError as error:
            yield InvalidRecordError(f"{name}: {error.strerror}")
        except InvalidRecordError as error:
            yield InvalidRecordError(f"{name} {error}")

    def _parsed(self, path: str, name: str, file: Any) -> Iterator[RecordOrError | None]:
        blocks = line_blocks(lambda: self._read(file))
        suffix = _suffix(path)
        if path == STDIN or suffix in _JSON_LINES:
            return json_records(blocks, name, self._fields)
        if suffix in _CSV:
            return csv_records(blocks, name, self._fields)
        if suffix == ".json":
            raise InvalidRecordError("is one JSON document; write one object a line, and name it .jsonl")
        chunks = markdown_chunks if suffix in _MARKDOWN else plain_chunks
        return chunks(text_lines(blocks), name, self._splitter)

    def _read(self, file: Any) -> bytes:
        block: bytes = file.read(_BLOCK_BYTES)
        self._read_bytes += len(block)
        return block


def _files(source: str) -> Iterator[_Found]:
    """Yield the paths of the files of a source; none if it does not exist and matches nothing."""
    if os.path.isdir(source) and source != STDIN:
        return _searched(source)
    if source == STDIN or os.path.lexists(source):
        return iter([source])
    return _matching(source) if glob.has_magic(source) else iter(())


def _searched(folder: str) -> Iterator[_Found]:
    """Search a folder, in order, without hidden files and folders. Links to folders are not followed."""
    problems: list[OSError] = []
    for root, folders, names in os.walk(folder, onerror=problems.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(root, name)
            if not name.startswith(".") and _suffix(name) in SUFFIXES and not _is_pipe(path):
                yield path
    for problem in problems:
        yield InvalidRecordError(f"{_shown(problem.filename)}: {problem.strerror}")


def _matching(pattern: str) -> Iterator[str]:
    """Expand a glob as a shell does: `**` means any folders, hidden names need a dot, links are not followed."""
    parts = PurePath(pattern).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    base = Path(*parts[:first])
    wanted = [*parts[first:], "*"] if parts[-1] == "**" else parts[first:]
    hidden = any(part.startswith(".") for part in wanted)
    for path in sorted(set(base.glob(os.path.join(*wanted)))):
        if path.is_file() and (hidden or not any(part.startswith(".") for part in path.relative_to(base).parts)):
            yield str(path)


def _suffix(path: str) -> str:
    return PurePath(path).suffix.lower()


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):  # the file does not exist, or the path is not one
        return None


def _is_pipe(path: str) -> bool:
    """Return whether opening the file could block forever."""
    status = _status(path)
    return status is not None and (stat.S_ISFIFO(status.st_mode) or stat.S_ISSOCK(status.st_mode))


def _shown(path: str) -> str:
    """Return the path for a message, in printable form; of a URL only the scheme, because it may hold a password."""
    scheme, separator, _ = path.partition("://")
    return f"{scheme}://…" if separator else path.encode(errors="replace").decode()


def _opened(path: str) -> AbstractContextManager[Any]:
    if path == STDIN:
        if sys.stdin is None:
            raise OSError(errno.EBADF, "there is no standard input")
        # unbuffered: a read returns what the pipe has, and a thread that waits in it does not block the exit
        return nullcontext(getattr(sys.stdin.buffer, "raw", sys.stdin.buffer))
    return open(path, "rb", buffering=0)


def _in_thread(work: Callable[[], _T]) -> Future[_T]:
    """Run `work` in a daemon thread: a thread that waits for standard input must not keep the process alive."""
    future: Future[_T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # every error belongs to the task that waits for the future
            future.set_exception(error)

    threading.Thread(target=run, name="asyncembed-read", daemon=True).start()
    return future
