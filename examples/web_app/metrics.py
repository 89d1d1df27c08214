"""Numbers in the text format of Prometheus, without a library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4"
"""https://prometheus.io/docs/instrumenting/exposition_formats/, read 2026-11."""


def exposition(stats: Any, prefix: str = "asyncembed") -> str:
    """Return a line for each number in a dataclass such as `embedder.stats()`, and for each number in its mappings."""
    return "".join(f"{prefix}_{name} {number:.17g}\n" for name, number in _numbers(stats))


def _numbers(stats: Any) -> Iterator[tuple[str, float]]:
    for one in fields(stats):
        value = getattr(stats, one.name)
        if isinstance(value, Mapping):
            for kind, count in value.items():
                yield f'{one.name}{{kind="{kind}"}}', float(count)
        elif isinstance(value, int | float):
            yield one.name, float(value)
