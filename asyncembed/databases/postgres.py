"""asyncpg, for the PostgreSQL source and sink: how a connection is made, and the errors it raises."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qs

from ..errors import ConfigError

__all__ = ["CLOSE_S", "CONNECT_S", "FOREIGN", "Connection", "Pool", "connect", "create_pool", "described"]

try:
    import asyncpg
    from asyncpg import Connection, Pool
except ModuleNotFoundError as error:
    raise ConfigError('PostgreSQL needs asyncpg and pgvector: pip install "asyncembed[postgres]"') from error

# Seconds for a connection to be made (asyncpg's own default is 60), and for all to be closed.
CONNECT_S = 10.0
CLOSE_S = 5.0

# The errors of asyncpg, and those of other libraries that it passes on.
FOREIGN = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, ValueError)

# Without cached statements, so that a pooler may change the backend between transactions.
_OPTIONS: dict[str, Any] = {"timeout": CONNECT_S, "statement_cache_size": 0}


async def connect(dsn: str) -> Connection:
    """Return a new connection."""
    return await asyncpg.connect(dsn, **_OPTIONS)


def create_pool(dsn: str, **options: Any) -> Pool:
    """Return a pool that connects when a connection is acquired."""
    return asyncpg.create_pool(dsn, **_OPTIONS, **options)


# Users and passwords must be percent-encoded, or asyncpg takes a part of the password for host or port, and shows it
# in its error. So an address that could be read in two ways is refused.
_HOST = r"(?:[^@:/?#,\[\]]*|\[[0-9A-Fa-f:.%]+\])(?::[0-9]+)?"
_DSN = re.compile(
    rf"postgres(?:ql)?://(?:[^:@/?#\[\]]*(?::[^@/?#\[\]]*)?@)?({_HOST}(?:,{_HOST})*)(?:/([^@/?#]*))?(?:\?([^@#]*))?"
)


def described(dsn_or_pool: object) -> str:
    """Return host and database for messages, or "the given pool"; raise ConfigError if the address is not valid.

    The address is never shown: it may hold a password.
    """
    if not isinstance(dsn_or_pool, str):
        return "the given pool"
    parts = _DSN.fullmatch(dsn_or_pool)
    if parts is None:
        raise ConfigError(
            "the address is not postgresql://user:password@host:port/database: in user and password "
            "write / as %2F, # as %23, ? as %3F, @ as %40, [ as %5B and ] as %5D"
        )
    host, database, query = parts.groups()
    options = parse_qs(query or "")
    host = host or options.get("host", ["localhost"])[0]
    database = database or options.get("dbname", options.get("database", ["the default database"]))[0]
    return f"{database} on {host}"
