"""Faults that alter the vectors of a reply (`alter`) or its delivery (`send`)."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from random import Random
from typing import Literal

import numpy as np
import pybase64

from ..types import Vectors
from .faults import Fault
from .http import Wire
from .replies import JSON, Answer, ServerReply, write_vectors
from .vectors import as_base64, embeddings_of

# A drip every twentieth of a second triggers no read timeout.
_DRIPS_PER_S = 20


@dataclass(frozen=True, slots=True)
class WrongCount(Fault):
    """`by` items more than texts (the last item is repeated), or fewer if negative."""

    by: int = -1

    def alter(self, reply: ServerReply) -> ServerReply:
        count = max(0, len(reply.embeddings) + self.by)
        extra = count - len(reply.embeddings)
        return replace(
            reply,
            embeddings=reply.embeddings[:count] + reply.embeddings[-1:] * extra,
            indices=reply.indices[:count] + tuple(range(len(reply.indices), count)),
        )


@dataclass(frozen=True, slots=True)
class Shuffled(Fault):
    """Items in another order, with correct indices. Harmless to a client that reads the indices."""

    seed: int = 0

    def alter(self, reply: ServerReply) -> ServerReply:
        order = list(range(len(reply.embeddings)))
        Random(self.seed).shuffle(order)
        return replace(
            reply,
            embeddings=tuple(reply.embeddings[position] for position in order),
            indices=tuple(reply.indices[position] for position in order),
        )


@dataclass(frozen=True, slots=True)
class DuplicateIndex(Fault):
    """The last item has the index of the first. In a reply of one item the index is 1 instead of 0."""

    def alter(self, reply: ServerReply) -> ServerReply:
        first = reply.indices[0] if len(reply.indices) > 1 else 1
        return replace(reply, indices=(*reply.indices[:-1], first))


@dataclass(frozen=True, slots=True)
class MissingIndex(Fault):
    """The first item has no index; with `everywhere` no item has one, so that only the order is left."""

    everywhere: bool = False

    def alter(self, reply: ServerReply) -> ServerReply:
        missing = len(reply.indices) if self.everywhere else 1
        return replace(reply, indices=(None,) * missing + reply.indices[missing:])


@dataclass(frozen=True, slots=True)
class ForeignVector(Fault):
    """The embedding of one row is replaced by these bytes of JSON, null by default.

    `b"[]"`, `b'""'`, `b'"%%%%"'` (not base64), `b'"AAA="'` (two bytes), `b'["a"]'`, `b"[NaN]"` and `b"[1e999]"` were
    all seen, or are close to what was.
    """

    raw: bytes = b"null"
    row: int = 0

    def alter(self, reply: ServerReply) -> ServerReply:
        return _with_row(reply, self.row, self.raw)


def _with_row(reply: ServerReply, row: int, raw: bytes) -> ServerReply:
    rows = list(reply.embeddings)
    rows[row % len(rows)] = raw
    return replace(reply, embeddings=tuple(rows))


@dataclass(frozen=True, slots=True)
class NaNVector(Fault):
    """One number of one row is NaN, or `value`, in the encoding of the reply."""

    value: float = math.nan
    row: int = 0

    def alter(self, reply: ServerReply) -> ServerReply:
        if reply.base64:
            vector = np.full((1, reply.dimensions), 0.02, np.float32)
            vector[0, 0] = self.value
            return _with_row(reply, self.row, as_base64(vector)[0])
        # json writes NaN and Infinity, which JSON does not have, as most servers' languages do
        numbers = json.dumps([self.value] + [0.02] * (reply.dimensions - 1))
        return _with_row(reply, self.row, numbers.encode())


@dataclass(frozen=True, slots=True)
class WrongDimensions(Fault):
    """All vectors, or only the vector of `row`, have another size than the model's."""

    dimensions: int
    row: int | None = None

    def alter(self, reply: ServerReply) -> ServerReply:
        return _rewritten(reply, write_vectors(_vectors(reply, self.dimensions), base64=reply.base64), self.row)


@dataclass(frozen=True, slots=True)
class OtherEncoding(Fault):
    """Numbers where base64 was requested, and base64 where numbers were; for all vectors, or only for `row`."""

    row: int | None = None

    def alter(self, reply: ServerReply) -> ServerReply:
        written = write_vectors(_vectors(reply, reply.dimensions), base64=not reply.base64)
        return _rewritten(reply, written, self.row)


@dataclass(frozen=True, slots=True)
class Float64(Fault):
    """Base64 of float64, which a reader of float32 takes for twice as many numbers: vLLM 0.5.3 (vllm issue 5734)."""

    def alter(self, reply: ServerReply) -> ServerReply:
        rows = _vectors(reply, reply.dimensions).astype("<f8")
        return _rewritten(reply, [b'"%b"' % pybase64.b64encode(row.tobytes()) for row in rows], None)


def _vectors(reply: ServerReply, dimensions: int) -> Vectors:
    return embeddings_of(reply.request.texts, dimensions, reply.request.model)


def _rewritten(reply: ServerReply, written: list[bytes], row: int | None) -> ServerReply:
    """Return the reply with all vectors, or the one at position `row`, replaced; `written` is in the texts' order."""
    order = [place if index is None else index for place, index in enumerate(reply.indices)]
    if row is None:
        return replace(reply, embeddings=tuple(written[index] for index in order))
    return _with_row(reply, row, written[order[row % len(order)]])


@dataclass(frozen=True, slots=True)
class Beside(Fault):
    """Other values for the keys beside `data`: `Beside({"usage": None})`, `Beside({"model": "another"})`.

    The keys in `without` are left out.
    """

    values: Mapping[str, object] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    def alter(self, reply: ServerReply) -> ServerReply:
        others = {**reply.others, **self.values}
        return replace(reply, others={name: others[name] for name in others if name not in self.without})


@dataclass(frozen=True, slots=True)
class Late(Fault):
    """The correct answer, `seconds` late, as from a server that must load the model first."""

    seconds: float

    async def send(self, wire: Wire, answer: Answer) -> None:
        await wire.sleep(self.seconds)
        await wire.send(answer)


@dataclass(frozen=True, slots=True)
class Hang(Fault):
    """No more bytes until the client disconnects: before the answer, or after half of its body."""

    when: Literal["before", "mid-body"] = "before"

    async def send(self, wire: Wire, answer: Answer) -> None:
        if self.when == "mid-body":
            await wire.write(wire.head(answer) + _half(answer))
        await wire.until_client_leaves()


@dataclass(frozen=True, slots=True)
class Drip(Fault):
    """The correct answer, a few bytes at a time: each wait is short, the sum of them is long."""

    bytes_per_s: float = 200.0

    async def send(self, wire: Wire, answer: Answer) -> None:
        raw = wire.head(answer) + answer.body
        step = max(1, int(self.bytes_per_s / _DRIPS_PER_S))
        last = (len(raw) - 1) // step * step
        for start in range(0, last, step):
            await wire.write(raw[start : start + step])
            await wire.sleep(step / self.bytes_per_s)
        await wire.write_last(raw[last:], answer.status)


@dataclass(frozen=True, slots=True)
class Disconnect(Fault):
    """The connection is closed before a byte is sent, after half of the body, or after the whole answer.

    With "after", the answer promises to keep the connection open. It is reset when the next request arrives, and that
    request is not logged.
    """

    when: Literal["before", "mid-body", "after"] = "before"

    async def send(self, wire: Wire, answer: Answer) -> None:
        if self.when == "after":
            await wire.send(answer)
            if not wire.closing:
                await wire.until_next_request()
                wire.reset()
        elif self.when == "mid-body":
            await wire.write(wire.head(answer) + _half(answer))
        wire.close()


@dataclass(frozen=True, slots=True)
class Reset(Fault):
    """The connection is reset (RST) before a byte is sent, or after half of the body."""

    when: Literal["before", "mid-body"] = "before"

    async def send(self, wire: Wire, answer: Answer) -> None:
        if self.when == "mid-body":
            await wire.write(wire.head(answer) + _half(answer))
        wire.reset()


@dataclass(frozen=True, slots=True)
class CutBody(Fault):
    """Only the first bytes of the body, after a head that announces all of them.

    Args:
        size_bytes: How many bytes are sent; None for half of them.
        chunked: Send chunks, without the last one.
    """

    size_bytes: int | None = None
    chunked: bool = False

    async def send(self, wire: Wire, answer: Answer) -> None:
        part = _half(answer) if self.size_bytes is None else answer.body[: self.size_bytes]
        if self.chunked:
            part = b"%x\r\n%b\r\n" % (len(part), part)
        await wire.write(wire.head(answer, chunked=self.chunked) + part)
        wire.close()


def _half(answer: Answer) -> bytes:
    return answer.body[: len(answer.body) // 2]


@dataclass(frozen=True, slots=True)
class TruncatedJSON(Fault):
    """Correct HTTP around JSON that ends too early."""

    size_bytes: int | None = None

    async def send(self, wire: Wire, answer: Answer) -> None:
        await wire.send(replace(answer, body=answer.body[: self.size_bytes or len(answer.body) // 2]))


@dataclass(frozen=True, slots=True)
class BrokenGzip(Fault):
    """`content-encoding: gzip`, and a body that ends in the middle, or is damaged there if `corrupt`."""

    corrupt: bool = False

    async def send(self, wire: Wire, answer: Answer) -> None:
        packed = bytearray(gzip.compress(answer.body, compresslevel=1, mtime=0))
        middle = len(packed) // 2
        if self.corrupt:
            packed[middle : middle + 64] = b"\xff" * 64
        body = bytes(packed) if self.corrupt else bytes(packed[:middle])
        await wire.send(replace(answer, body=body, headers={**answer.headers, "content-encoding": "gzip"}))


@dataclass(frozen=True, slots=True)
class GzipBomb(Fault):
    """A few hundred kilobytes that unpack to `size_bytes` of blanks."""

    size_bytes: int = 300_000_000

    def answer(self) -> Answer:
        return Answer(200, _packed_blanks(self.size_bytes), {**JSON, "content-encoding": "gzip"})


@lru_cache(maxsize=4)
def _packed_blanks(size_bytes: int) -> bytes:
    packer = zlib.compressobj(wbits=31)  # 31: with gzip's header and trailer
    blanks = b" " * 1_000_000
    parts = [packer.compress(blanks) for _ in range(size_bytes // len(blanks))]
    return b"".join([*parts, packer.compress(blanks[: size_bytes % len(blanks)]), packer.flush()])


@dataclass(frozen=True, slots=True)
class Flood(Fault):
    """The correct head, then an endless body of blanks in chunks, until the client disconnects."""

    async def send(self, wire: Wire, answer: Answer) -> None:
        chunk = b"10000\r\n%b\r\n" % (b" " * 0x10000)
        await wire.write(wire.head(answer, chunked=True))
        while True:
            await wire.write(chunk)


@dataclass(frozen=True, slots=True)
class Interim(Fault):
    """An informational response (100, 103 Early Hints) before the correct one."""

    status: int = 103

    async def send(self, wire: Wire, answer: Answer) -> None:
        await wire.write(f"HTTP/1.1 {self.status} Interim\r\nlink: </style.css>\r\n\r\n".encode())
        await wire.send(answer)


@dataclass(frozen=True, slots=True)
class HugeHeader(Fault):
    """The correct answer with a header of `size_bytes`."""

    size_bytes: int = 1_000_000

    async def send(self, wire: Wire, answer: Answer) -> None:
        await wire.send(replace(answer, headers={**answer.headers, "x-padding": "x" * self.size_bytes}))


@dataclass(frozen=True, slots=True)
class NotHTTP(Fault):
    """Bytes that are not HTTP, then the end of the connection."""

    raw: bytes = b"SSH-2.0-OpenSSH_9.6\r\n"

    async def send(self, wire: Wire, answer: Answer) -> None:
        await wire.write(self.raw)
        wire.close()
