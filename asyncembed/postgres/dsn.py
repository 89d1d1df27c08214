"""The address of a PostgreSQL database: is it one, and what of it may be shown. Pure."""

from __future__ import annotations

import re
from urllib.parse import parse_qs

from ..errors import ConfigError

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
