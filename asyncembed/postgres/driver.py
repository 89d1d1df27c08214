"""asyncpg, for what reads rows and for what writes them: how a connection is made, and what it raises."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError

__all__ = ["CLOSE_S", "CONNECT_S", "FOREIGN", "Connection", "Pool", "connect", "create_pool"]

try:
    import asyncpg
    from asyncpg import Connection, Pool
except ModuleNotFoundError as error:
    raise ConfigError('PostgreSQL needs asyncpg and pgvector: pip install "asyncembed[postgres]"') from error

# Seconds for a connection to be made (asyncpg's own default is 60), and for all to be closed.
CONNECT_S = 10.0
CLOSE_S = 5.0

# What asyncpg raises, and what comes through it.
FOREIGN = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, ValueError)

# No cached statements, so that a pooler may change the backend between transactions.
_OPTIONS: dict[str, Any] = {"timeout": CONNECT_S, "statement_cache_size": 0}


async def connect(dsn: str) -> Connection:
    """Return a connection of its own."""
    return await asyncpg.connect(dsn, **_OPTIONS)


def create_pool(dsn: str, **options: Any) -> Pool:
    """Return a pool that connects when it is asked for a connection."""
    return asyncpg.create_pool(dsn, **_OPTIONS, **options)
