"""asyncpg, for what reads rows and for what writes them: how a connection is made, and what it raises."""

from __future__ import annotations

import re
import socket
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs

from ..errors import ConfigError

__all__ = ["CLOSE_S", "CONNECT_S", "FOREIGN", "Connection", "Pool", "connect", "create_pool", "described", "widen"]

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

# What the system may hold of what the server has not read yet. Linux lets a TCP connection have 4 MiB when it needs
# them (net.ipv4.tcp_wmem), a Unix socket 208 KiB (net.core.wmem_default): then the server waits for the event loop to
# come back. (20,000 records in 10 requests of 1 s, by turns: `ingest` took 1.22 times as long as embedding alone, now
# 1.12; of 50 ms: 0.8 of what it took.)
SEND_BYTES = 4 << 20

# No cached statements, so that a pooler may change the backend between transactions.
_OPTIONS: dict[str, Any] = {"timeout": CONNECT_S, "statement_cache_size": 0}


async def connect(dsn: str) -> Connection:
    """Return a connection of its own."""
    return await asyncpg.connect(dsn, **_OPTIONS)


def create_pool(dsn: str, **options: Any) -> Pool:
    """Return a pool that connects when it is asked for a connection."""
    return asyncpg.create_pool(dsn, **_OPTIONS, **options)


def widen(connection: Connection) -> None:
    """Let the system hold more of what is written to the connection, if that is a Unix socket; else do nothing."""
    transport = getattr(connection, "_transport", None)  # asyncpg has no other word for it
    sock = transport and transport.get_extra_info("socket")
    if sock and sock.family == getattr(socket, "AF_UNIX", None):
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)


# Users and passwords are percent-encoded, or asyncpg takes a part of the password for host or port, and shows it in
# its error. So nothing is an address here that could be read in two ways.
_HOST = r"(?:[^@:/?#,\[\]]*|\[[0-9A-Fa-f:.%]+\])(?::[0-9]+)?"
_DSN = re.compile(
    rf"postgres(?:ql)?://(?:[^:@/?#\[\]]*(?::[^@/?#\[\]]*)?@)?({_HOST}(?:,{_HOST})*)(?:/([^@/?#]*))?(?:\?([^@#]*))?"
)


def described(dsn_or_pool: object) -> str:
    """Return host and database for messages, or that it is a pool.

    Raises:
        ConfigError: The address is none. It is not shown: it may hold a password.
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
