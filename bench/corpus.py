"""The texts of the benchmarks, the same in every run and on every machine."""

from __future__ import annotations

import random

_WORDS = [
    "batch",
    "token",
    "vector",
    "request",
    "server",
    "answer",
    "limit",
    "retry",
    "store",
    "table",
    "index",
    "query",
    "row",
    "column",
    "text",
    "section",
    "model",
    "price",
    "rate",
    "second",
    "minute",
    "memory",
    "thread",
    "loop",
    "task",
    "socket",
    "reply",
    "header",
    "error",
    "record",
    "source",
    "sink",
    "window",
    "queue",
]


def sections(count: int, characters: int = 550, seed: int = 1) -> list[str]:
    """Return `count` different texts with lengths between half and one and a half times `characters`."""
    dice = random.Random(seed)
    texts = []
    for number in range(count):
        words = [f"Section {number}."]
        length = len(words[0])
        wanted = characters * dice.uniform(0.5, 1.5)
        while length < wanted:
            words.append(dice.choice(_WORDS))
            length += len(words[-1]) + 1
        texts.append(" ".join(words))
    return texts
