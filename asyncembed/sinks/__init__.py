"""Stores for vectors: `SQLiteSink`, `PostgresSink`, and `open_sink` for either. Drivers are loaded at first use."""

from __future__ import annotations

import os
import re
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import SinkConfigError

if TYPE_CHECKING:
    from .postgres import PostgresSink
    from .sqlite import SQLiteSink

__all__ = ["PostgresSink", "SQLiteSink", "open_sink"]

_MODULES = {"SQLiteSink": "sqlite", "PostgresSink": "postgres"}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def open_sink(url: str | os.PathLike[str], **options: Any) -> SQLiteSink | PostgresSink:
    """Return the sink for an address; it connects at first use.

    Args:
        url: `sqlite:///relative.db`, `sqlite:////absolute.db`, the path of a file, or `postgresql://…`.
        options: Passed to the sink unchanged, for instance `table="docs"`.

    Raises:
        SinkConfigError: The address is none of these. The message does not show it: it may hold a password.
    """
    address = os.fspath(url)
    if not address:
        raise SinkConfigError("the address of the sink is empty; use a file path, or postgresql://…")
    found = _SCHEME.match(address)
    scheme = found[1] if found else None
    if scheme == "sqlite":
        path = address.removeprefix("sqlite:///")
        if path == address or not path or "?" in path:
            raise SinkConfigError(
                "an SQLite address is sqlite:///relative.db or sqlite:////absolute.db, without options"
            )
        scheme, address = None, path
    if scheme is None:
        from .sqlite import SQLiteSink

        return SQLiteSink(address, **options)
    if scheme in ("postgresql", "postgres"):
        from .postgres import PostgresSink

        return PostgresSink(address, **options)
    raise SinkConfigError(
        f"no sink for addresses that begin with {scheme}://; "
        "use sqlite:///file.db, a file path, or postgresql://user@host/database"
    )


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
