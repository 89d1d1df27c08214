"""The app's settings, read from environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Settings:
    """Each setting is read from the variable with its name in capitals; the `Embedder` reads its own key and URL.

    Attributes:
        host, port: The address to listen at; port 0 is any free port.
        embedding_model: "local" needs no key and no network.
        embedding_cache: The cache of embedded questions and sections: "memory", the path of an SQLite file that several
            workers may share, or empty for none.
        database_url: The path of an SQLite file, or `postgresql://…`, which may contain a password.
        max_waiting: Limit of texts that wait for the provider; further requests get 503 with `Retry-After`.
        search_deadline_s: Seconds for one search, including the time in the queue.
        document_deadline_s: Seconds for one document.
        max_document_bytes: A larger document is refused, and not read to its end.
        section_tokens: The largest number of tokens in a section of a document.
        check_every_s: For how many seconds `/health` reuses the last check.
        shutdown_s: Seconds for open requests when the server shuts down.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    embedding_model: str = "local"
    embedding_cache: str = "memory"
    database_url: str = field(default="search.db", repr=False)
    max_waiting: int = 2_000
    search_deadline_s: float = 5.0
    document_deadline_s: float = 120.0
    max_document_bytes: int = 5_000_000
    section_tokens: int = 256
    check_every_s: float = 10.0
    shutdown_s: int = 20

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Self:
        """Return the settings of an environment, for instance `os.environ`.

        Raises:
            ValueError: A value is not a number. The message names the variable.
        """
        given: dict[str, Any] = {}
        for one in fields(cls):
            variable = one.name.upper()
            if variable in environment:
                kind: Any = type(one.default)
                try:
                    given[one.name] = kind(environment[variable])
                except ValueError:
                    raise ValueError(f"{variable} is {environment[variable]!r}; it must be a number") from None
        return cls(**given)
