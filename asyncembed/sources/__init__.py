"""Where records come from: `Sources` reads files of every kind, `PostgresSource` rows, lazily."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .files import SUFFIXES, Sources

if TYPE_CHECKING:
    from .postgres import PostgresSource

__all__ = ["SUFFIXES", "PostgresSource", "Sources"]


def __getattr__(name: str) -> Any:
    if name == "PostgresSource":  # its driver loads when it is asked for
        from .postgres import PostgresSource

        return PostgresSource
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
