"""The meaning of a PostgreSQL error for a batch: repeat it, wait, give up a row, or report the configuration. Pure.

The server's errors are recognised by their SQLSTATE, so no driver is imported. PostgreSQL documentation, appendix A:
the first two characters of a code are its class, and new codes keep to their class.
"""

from __future__ import annotations

import ssl
from typing import Literal, TypeAlias

Verdict: TypeAlias = Literal["again", "busy", "row", "config", "fatal"]

# By code, otherwise by class.
_VERDICTS: dict[str, Verdict] = {
    "25006": "again",  # read_only_sql_transaction: after a failover the old primary still answers
    "25P03": "again",  # idle_in_transaction_session_timeout
    "53300": "busy",  # too_many_connections
    "55P03": "busy",  # lock_not_available
    "08": "again",  # connection exception
    "40": "again",  # transaction rollback: serialization failure, deadlock
    "57": "again",  # operator intervention: shutdown, crash, idle_session_timeout; query_canceled by statement_timeout
    "0A": "config",  # feature not supported: no such extension on this server
    "26": "config",  # invalid SQL statement name: a pooler has changed the backend under a prepared statement
    "28": "config",  # invalid authorization specification
    "3D": "config",  # invalid catalog name: no such database
    "3F": "config",  # invalid schema name
    "42": "config",  # no such table, column, type, operator; insufficient privilege
}

# PostgreSQL's own classes for transactions, resources, the system and the server itself. All others are about a row:
# data exceptions (22), constraints (23), triggers (P0), limits (54), other routines, and the user's own codes.
_SYSTEM = frozenset(("00", "01", "02", "03", "09", "0B", "0L", "0P", "24", "25", "27", "2B", "2D", "34", "53", "58"))
_SYSTEM |= {"72", "F0", "HV", "XX"}


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

    A server that was never reached is not waited for, because its address may be wrong.
    """
    state = sqlstate_of(error)
    if type(error).__name__ == "InvalidCachedStatementError":  # 0A000; asyncpg has dropped its cached statements
        return "again"
    if state is not None:
        return _VERDICTS.get(state) or _VERDICTS.get(state[:2]) or ("fatal" if state[:2] in _SYSTEM else "row")
    never_reached = isinstance(error, OSError) and not reached
    if never_reached or is_our_fault(error) or isinstance(error, ssl.SSLCertVerificationError):
        return "config"
    return "busy" if isinstance(error, TimeoutError) else "again"


def shown_cause(error: Exception, verdict: Verdict) -> Exception | None:
    """Return the error as a cause to show; None if it may quote a row, or an address with its password."""
    return None if verdict == "row" or is_our_fault(error) or getattr(error, "context", None) else error


def reason_of(error: Exception, verdict: Verdict, *, waited_s: float) -> str:
    """Return the error as text that may be shown, without its message where that may quote a row or an address.

    `waited_s` are the seconds that an attempt, or connecting, may take.
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
