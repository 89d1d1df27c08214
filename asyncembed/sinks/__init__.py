"""Where vectors go: `SQLiteSink`, `PostgresSink`, and `open_sink` for either. Drivers load at first use."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from ..errors import SinkConfigError

if TYPE_CHECKING:
    from .postgres import PostgresSink
    from .sqlite import SQLiteSink

__all__ = ["PostgresSink", "SQLiteSink", "open_sink"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def open_sink(url: str | os.PathLike[str], **options: Any) -> SQLiteSink | PostgresSink:
    """Return the sink that the address names; it connects at first use.

    Args:
        url: `sqlite:///relative.db`, `sqlite:////absolute.db`, the path of a file, or `postgresql://…`.
        options: Handed to the sink as they are, for instance `table="docs"`.

    Raises:
        SinkConfigError: The address is none of these. The message does not show it: it may hold a password.
    """
    address = os.fspath(url)
    if not address:
        raise SinkConfigError("the address of the sink is empty; name a file, or postgresql://…")
    scheme = _SCHEME.match(address)
    if scheme is None:
        from .sqlite import SQLiteSink

        return SQLiteSink(address, **options)
    if scheme[1] == "sqlite":
        from .sqlite import SQLiteSink

        return SQLiteSink(_sqlite_path(address), **options)
    if scheme[1] in ("postgresql", "postgres"):
        from .postgres import PostgresSink

        return PostgresSink(address, **options)
    raise SinkConfigError(
        f"no sink for addresses that begin with {scheme[0]!r}; "
        "there are sqlite:///file.db, the path of a file, and postgresql://user@host/database"
    )


def _sqlite_path(address: str) -> str:
    path = address.removeprefix("sqlite:///")
    if path == address or not path or "?" in path:
        raise SinkConfigError(
            "an SQLite address is sqlite:///relative.db or sqlite:////absolute.db, without options behind it"
        )
    return path


def __getattr__(name: str) -> Any:
    if name == "SQLiteSink":
        from .sqlite import SQLiteSink

        return SQLiteSink
    if name == "PostgresSink":
        from .postgres import PostgresSink

        return PostgresSink
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
