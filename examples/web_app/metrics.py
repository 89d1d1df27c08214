"""Numbers in the text format that Prometheus reads; no library needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4"
"""https://prometheus.io/docs/instrumenting/exposition_formats/, read 2026-11."""


def exposition(stats: Any, prefix: str = "asyncembed") -> str:
    """Return a line for each number in a dataclass, `embedder.stats()` for instance."""
    return "".join(_lines(stats, prefix))


def _lines(stats: Any, prefix: str) -> Iterator[str]:
    for one in fields(stats):
        value = getattr(stats, one.name)
        if isinstance(value, int | float):
            yield f"{prefix}_{one.name} {float(value):.17g}\n"
