"""The meaning of a PostgreSQL error for a batch: repeat it, wait, give up a row, or report the configuration. Pure.

The server's errors are recognised by their SQLSTATE, so no driver is imported. PostgreSQL documentation, appendix A:
the first two characters of a code are its class, and new codes keep to their class.
"""

from __future__ import annotations

import ssl
from typing import Literal, TypeAlias

Verdict: TypeAlias = Literal["again", "busy", "row", "config", "fatal"]

_CODES: dict[str, Verdict] = {
    "40001": "again",  # serialization_failure
    "40P01": "again",  # deadlock_detected
    "25006": "again",  # read_only_sql_transaction: after a failover the old primary still answers
    "57P01": "again",  # admin_shutdown
    "57P02": "again",  # crash_shutdown
    "57P03": "again",  # cannot_connect_now
    "57P05": "again",  # idle_session_timeout
    "25P03": "again",  # idle_in_transaction_session_timeout
    "57014": "again",  # query_canceled, by a statement_timeout or a person
    "53300": "busy",  # too_many_connections
    "55P03": "busy",  # lock_not_available
    "26000": "config",  # invalid_sql_statement_name: a pooler has changed the backend under a prepared statement
    "42P05": "config",  # duplicate_prepared_statement: the same
    "42501": "config",  # insufficient_privilege
}

_CLASSES: dict[str, Verdict] = {
    "08": "again",  # connection exception
    "28": "config",  # invalid authorization specification
    "3D": "config",  # invalid catalog name: no such database
    "3F": "config",  # invalid schema name
    "42": "config",  # no such table, column, type, operator
    "0A": "config",  # feature not supported: no such extension on this server
}

# PostgreSQL's own classes for transactions, resources, the system and the server itself. All others are about a row:
# data exceptions (22), constraints (23), triggers (P0), limits (54), other routines, and the user's own codes.
_SYSTEM = frozenset(("00", "01", "02", "03", "09", "0B", "0L", "0P", "24", "25", "27", "2B", "2D", "34", "40", "53"))
_SYSTEM |= {"57", "58", "72", "F0", "HV", "XX"}

# After a failover only a new connection leads to the new primary.
NEW_CONNECTION = ("25006",)

# asyncpg has dropped its cached statements when it raises this (SQLSTATE 0A000), so the next attempt succeeds.
_STALE = "InvalidCachedStatementError"


def sqlstate_of(error: BaseException) -> str | None:
    """Return the code that the server sent; None if the error is not the server's."""
    # asyncpg raises some of the server's errors by itself, but only the server sends a severity
    state: str | None = getattr(error, "sqlstate", None) if getattr(error, "severity", None) else None
    return state


def is_our_fault(error: BaseException) -> bool:
    """Return whether asyncpg could not read an address or encode a value. Then its message quotes it."""
    return sqlstate_of(error) is None and (isinstance(error, ValueError) or type(error).__name__ == "DataError")


def verdict_on(error: BaseException, *, reached: bool = True) -> Verdict:
    """Return what to do about an error; "fatal" for an unknown one.

    Args:
        error: The driver's error.
        reached: Whether the server has ever answered. If not, the address may be wrong, so it is not waited for.
    """
    state = sqlstate_of(error)
    if type(error).__name__ == _STALE:
        return "again"
    if state is not None:
        return _CODES.get(state) or _CLASSES.get(state[:2]) or ("fatal" if state[:2] in _SYSTEM else "row")
    if is_our_fault(error) or isinstance(error, ssl.SSLCertVerificationError):
        return "config"
    if isinstance(error, OSError) and not reached:
        return "config"
    return "busy" if isinstance(error, TimeoutError) else "again"


def reason_of(error: Exception, verdict: Verdict, *, waited_s: float) -> str:
    """Return the error as text that may be shown.

    Args:
        error: The driver's error. Its message is left out where it may quote a row or an address.
        verdict: See `verdict_on`.
        waited_s: Seconds that an attempt, or connecting, may take.
    """
    state, kind = sqlstate_of(error), type(error).__name__
    if state is not None:
        # an error inside a function has a context, and may be about a row whatever its code
        message = "" if verdict == "row" or getattr(error, "context", None) else f": {error.args[0]}"
        return f"{kind}{message} (SQLSTATE {state})"
    if isinstance(error, TimeoutError):
        return f"no free connection, or no answer on it, within {waited_s:g} s"
    if is_our_fault(error):
        return f"{kind} in the driver: look at the address, the values in args=, and the codecs of a pool handed in"
    if isinstance(error, OSError):
        return f"the server cannot be reached: {kind}: {error}"
    return f"{kind}: {error}"
