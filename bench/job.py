"""One measurement: what `run` asks of a process of its own, and what that answers, in one line of JSON each."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class Job:
    """What one process is to do. Paths, sizes and limits, no objects: it travels as JSON.

    Attributes:
        client: A name of `clients.CLIENTS`.
        base_url: The server's, or "" where no server is needed.
        texts: A file with one text a line.
        count: How many texts; more than the file has are made of its lines and a number.
        model: What the server is asked for.
        dimensions: The size to ask for; None for the model's own, which is then `expected_dimensions`.
        batch: Texts a request, for clients that have to be told; None for what suits the client best.
        concurrency: Requests under way at once, where that can be set.
        target: Where records are stored, as for `open_sink`; "" for nowhere.
        floats: Whether answers have numbers, where the client makes them itself.
    """

    client: str
    base_url: str
    texts: str
    count: int
    model: str = "text-embedding-3-small"
    dimensions: int | None = None
    expected_dimensions: int = 1_536
    batch: int | None = None
    concurrency: int = 8
    target: str = ""
    floats: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Job:
        return cls(**json.loads(line))

    def texts_to_embed(self) -> Texts:
        return Texts(Path(self.texts).read_text().split("\n"), self.count)


class Texts(Sequence[str]):
    """So many texts, made of some lines as they are asked for: half a million need no memory."""

    def __init__(self, lines: list[str], count: int) -> None:
        self._lines = lines
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(self._count))]
        if index >= self._count:
            raise IndexError(index)
        line = self._lines[index % len(self._lines)]
        return line if index < len(self._lines) else f"{index} {line}"


@dataclass(frozen=True, slots=True)
class Measured:
    """What one process saw. What it cannot know is None.

    Attributes:
        version: The library's.
        seconds: From just before the call to the result in hand; imports and the warm-up are outside.
        cpu_s: CPU seconds of this process in that time, all threads.
        import_s: The import of the library.
        start_mb: Resident memory just before the call, texts and library included.
        peak_mb: The most of it during the call.
        stall_ms: The longest time for which nothing else could run on the event loop.
        requests: What the server counted; `refusals` of them got a 429.
        tokens: What the server charged for what it answered.
    """

    client: str
    version: str
    count: int
    seconds: float
    cpu_s: float
    import_s: float
    start_mb: float | None = None
    peak_mb: float | None = None
    stall_ms: float | None = None
    requests: int | None = None
    refusals: int | None = None
    tokens: int | None = None

    def to_json(self) -> str:
        return json.dumps({name: round(v, 4) if isinstance(v, float) else v for name, v in asdict(self).items()})


Embed: TypeAlias = Callable[[Sequence[str]], Awaitable[Any]]
"""Embeds texts and returns their vectors in order: anything with a length and rows."""

Open: TypeAlias = Callable[[Job], AbstractAsyncContextManager[Embed]]
"""Opens a client as its documents say."""
