"""The sources of the command: files, and queries of PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Final

from .. import sources as library

_QUERIES: Final = ("postgresql://", "postgres://")


class FilesAndQueries:
    """An async iterable of the records in SOURCE...: those of the files first. Call `check` before reading.

    Raises:
        ConfigError: An address is not valid or has no query.
    """

    def __init__(self, sources: Sequence[str], *, id_field: str, text_field: str, chunk_tokens: int) -> None:
        fields = {"id_field": id_field, "text_field": text_field}
        addresses = [source for source in sources if source.startswith(_QUERIES)]
        files = [source for source in sources if source not in addresses]
        self._files = library.Sources(files, chunk_tokens=chunk_tokens, **fields)
        # the class is imported here, if there are any: its driver is an extra
        self._queries = [library.PostgresSource.from_url(address, **fields) for address in addresses]

    @property
    def empty_folders(self) -> list[str]:
        """Folders without a file to read; known after `check`."""
        return self._files.empty_folders

    def expected(self) -> int | None:
        """Return the number of records, an estimate until all are read; None if it is unknown."""
        return None if self._queries else self._files.expected()

    async def check(self, target: str | None = None) -> None:
        """Check all files, also that none is the target, and have the server prepare all queries; read nothing.

        Raises:
            ConfigError: A file cannot be read, or a query cannot be run.
            SourceError: A server does not answer.
        """
        await self._files.check(target)
        for query in self._queries:
            await query.check()

    async def __aiter__(self) -> AsyncIterator[Any]:
        every: list[Any] = [self._files, *self._queries]
        for source in every:
            async with aclosing(aiter(source)) as records:
                async for record in records:
                    yield record
