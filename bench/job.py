"""One measurement: the job that `run` gives to a process, and the result, each as one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class Job:
    """The job of one process. Only plain values, since it is passed as JSON.

    Attributes:
        client: A name in `clients.CLIENTS`.
        base_url: The server's, or "" if none is needed.
        texts: A file with one text per line.
        count: The number of texts; further texts are made of the file's lines and a number.
        model: The requested model.
        dimensions: The requested size; None for the model's own, which is then `expected_dimensions`.
        batch: Texts per request, for clients that need this; None for the client's best.
        concurrency: Requests at once, where that can be set.
        target: The store, as for `open_sink`; "" for none.
        floats: Whether replies have numbers instead of base64, for jobs that make the replies themselves.
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
    """A sequence of `count` texts, made of the lines when they are read, so that half a million need no memory."""

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
    """The result of one process. Unknown values are None.

    Attributes:
        version: The version of the library.
        seconds: From just before the call until its result; imports and warm-up are not included.
        cpu_s: CPU seconds of this process in that time, all threads.
        import_s: Seconds to import the library.
        start_mb: Resident memory just before the call, texts and library included.
        peak_mb: The largest resident memory during the call.
        stall_ms: The longest time for which no other task could run on the event loop.
        requests: Requests that the server counted; `refusals` of them got a 429.
        tokens: Tokens that the server charged for its answers.
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
"""Embeds texts and returns their vectors in order, as anything with a length and rows."""

Open: TypeAlias = Callable[[Job], AbstractAsyncContextManager[Embed]]
"""Opens a client as its documentation says."""
