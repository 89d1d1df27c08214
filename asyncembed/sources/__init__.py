"""Sources of records: `Sources` reads files, `PostgresSource` the rows of a query. Both read lazily."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .files import SUFFIXES, Sources
    from .postgres import PostgresSource

__all__ = ["SUFFIXES", "PostgresSource", "Sources"]

# Imported at first use: an embedder needs `sources.records` only, and neither the parsers of files nor a driver.
_MODULES = {"SUFFIXES": "files", "Sources": "files", "PostgresSource": "postgres"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
