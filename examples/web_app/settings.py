"""What the app is told from outside: environment variables, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Settings:
    """Each is read from the variable of its name in capitals. The provider's key and address the `Embedder` reads.

    Attributes:
        host, port: Where to listen; port 0 is any free one.
        embedding_model: "local" needs no key and no network.
        embedding_cache: Where questions and sections that were embedded before are remembered: "memory", the path of an
            SQLite file that several workers may share, or nothing.
        database_url: The path of an SQLite file, or `postgresql://…`, which may hold a password.
        max_waiting: Texts that may wait for the provider; who comes then is told to come back later.
        search_deadline_s: Seconds for one search, waiting included.
        document_deadline_s: Seconds for one document.
        max_document_bytes: A larger one is refused, and not read to its end.
        section_tokens: The most tokens that a section of a document has.
        check_every_s: For how many seconds `/health` believes what provider and store said.
        shutdown_s: Seconds for requests that are under way when the server is asked to end.
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
            ValueError: A number is none. The message names its variable.
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
