"""The address of a PostgreSQL database: is it one, and what of it may be shown. Pure."""

from __future__ import annotations

import re
from urllib.parse import parse_qs

from ..errors import SinkConfigError

# Everything between the slashes is percent-encoded, or asyncpg takes a part of the password for host or port, and
# shows it in its error.
_DSN = re.compile(r"postgres(?:ql)?://(?:[^:@/?#]*(?::[^:@/?#]*)?@)?([^@/?#]*)(?:/([^@/?#]*))?(?:\?([^#]*))?")


def described(dsn: str) -> str:
    """Return host and database for messages.

    Raises:
        SinkConfigError: The address is none. It is not shown: it may hold a password.
    """
    parts = _DSN.fullmatch(dsn)
    if parts is None:
        raise SinkConfigError(
            "the address is not postgresql://user:password@host:port/database: in user and password "
            "write / as %2F, # as %23, ? as %3F, @ as %40 and : as %3A"
        )
    host, database, options = parts.groups()
    options = parse_qs(options or "")
    host = host or options.get("host", ["localhost"])[0]
    database = database or options.get("dbname", options.get("database", ["the default database"]))[0]
    return f"{database} on {host}"
