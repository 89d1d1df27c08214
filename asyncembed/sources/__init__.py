"""Where records come from: `Sources` reads files of every kind, lazily; the command is built on it."""

from .files import SUFFIXES, Sources

__all__ = ["SUFFIXES", "Sources"]
