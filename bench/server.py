"""A server that is never the bottleneck: every answer is prepared before it starts, and leaves without being copied.

    python -m bench.server --dimensions 1536 [--floats] [--latency 0.3] [--tokens-per-minute 6000000]

It prints its base URL in one line. `POST /v1/embeddings` answers any body with as many vectors as it has inputs, the
same ones every time: item i is item i of `items()`, whatever the text. `GET /stats` tells what came, `DELETE /stats`
forgets it.

The items of the longest answer lie one after the other in a file that the kernel keeps in memory, so an answer of n
vectors is the beginning of that file, and `sendfile` has the kernel send it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import IO, cast

import numpy as np
import numpy.typing as npt

from asyncembed.testing.rate_limits import ServerRateLimits

# The API's limit of inputs a request (API reference, embeddings.create), so the longest answer there can be.
MAX_INPUTS = 2_048
# Different vectors among them: enough to notice one in the wrong place, few enough to write as numbers in a second.
_DIFFERENT = 256
# Of the corpus in cl100k_base. So a text costs as much in ids as in bytes, and who sends ids is no faster for that.
_BYTES_A_TOKEN = 6.1
_INPUT = re.compile(rb'"input"\s*:\s*(?=("|\[\s*.))', re.DOTALL)
_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)\r\n", re.IGNORECASE)
_PREFIX = b'{"object":"list","data":['
_SUFFIX = b'],"model":"text-embedding-3-small","usage":{"prompt_tokens":%d,"total_tokens":%d}}'
_REFUSAL = json.dumps(
    {
        "error": {
            "message": "Rate limit reached on tokens per min (TPM). Please try again later.",
            "type": "tokens",
            "param": None,
            "code": "rate_limit_exceeded",
        }
    }
).encode()


def vectors(dimensions: int) -> npt.NDArray[np.float32]:
    """Return float32[256, d] at unit length: item i of an answer has row i % 256."""
    rows = np.random.default_rng(0).standard_normal((_DIFFERENT, dimensions)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def items(dimensions: int, *, floats: bool) -> Iterator[bytes]:
    """Yield the items of the longest answer, each but the first with the comma before it."""
    rows = vectors(dimensions)
    if floats:  # as the API does: every digit of the float64 that is nearest to the float32
        texts = [json.dumps(row.tolist(), separators=(",", ":")).encode() for row in rows]
    else:
        texts = [b'"' + base64.b64encode(row.astype("<f4").tobytes()) + b'"' for row in rows]
    for index in range(MAX_INPUTS):
        comma = b"," if index else b""
        text = texts[index % _DIFFERENT]
        yield comma + b'{"object":"embedding","index":%d,"embedding":' % index + text + b"}"


class Prepared:
    """The items in a file, and where each of them ends."""

    def __init__(self, dimensions: int, *, floats: bool) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the server runs
        self.ends = [0]
        for item in items(dimensions, floats=floats):
            self.file.write(item)
            self.ends.append(self.ends[-1] + len(item))
        self.file.flush()


@dataclass(slots=True)
class Stats:
    """What came since the last `DELETE /stats`; `inputs` and `tokens` of what was answered."""

    requests: int = 0
    refusals: int = 0
    inputs: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """What a body asks for, as far as the answer depends on it.

    Attributes:
        inputs: How many texts, or lists of token ids.
        tokens: What it is charged: UTF-8 bytes / 4 of texts, as the API's limiter does; the same for their ids.
        base64: Whether it asks for `encoding_format: base64`.
    """

    inputs: int
    tokens: int
    base64: bool


def read_body(body: bytes) -> Asked:
    """Return what a JSON body asks for, without parsing it: a megabyte takes a millisecond.

    What follows the input is taken to hold no `]`, as is true of a model, a number of dimensions and a format.

    Raises:
        ValueError: There is no `input`, or it is neither text nor token ids, nor a list of them.
    """
    found = _INPUT.search(body)
    if found is None:
        raise ValueError("no input")
    begin, kind = found.end(), found[1].translate(None, b" \n")
    if kind == b'"':
        text = _TEXT.match(body, begin)
        end = text.end() if text else len(body)
        inputs, tokens = 1, (end - begin) // 4
    else:
        end = body.rindex(b"]") + 1
        if kind == b'["':
            inputs = _quotes(body[begin:end]) // 2
            tokens = (end - begin - 3 * inputs) // 4  # two quotes and a comma each
        else:
            inputs = body.count(b"[", begin, end) - 1 if kind == b"[[" else 1
            tokens = int((body.count(b",", begin, end) + 1) * _BYTES_A_TOKEN / 4)
    wants_base64 = any(b'"base64"' in part for part in (body[: found.start()], body[end:]))
    return Asked(inputs, max(1, tokens), wants_base64)


def _quotes(part: bytes) -> int:
    """Count the quotes that begin or end a text."""
    if b"\\" in part:  # first the escaped backslashes, so that one before a closing quote escapes nothing
        part = part.replace(b"\\\\", b"").replace(b'\\"', b"")
    return part.count(b'"')


class Desk:
    """What all connections share: the answers, the rates, and the count of what came."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._latency_s: float = options.latency
        self._burst_s: float = options.burst
        self._tokens_per_minute: float | None = options.tokens_per_minute
        self._by_format = {True: Prepared(options.dimensions, floats=True)} if options.floats else {}
        self._dimensions: int = options.dimensions
        self._only_floats: bool = options.floats
        self.forget()

    def forget(self) -> None:
        """Begin anew: nothing came, and the bucket is full."""
        self.stats = Stats()
        self._rates = ServerRateLimits(None, self._tokens_per_minute, self._burst_s)

    def prepared(self, *, floats: bool) -> Prepared:
        """Return the answers in one format; numbers are prepared when somebody asks for them first."""
        floats = floats or self._only_floats
        if floats not in self._by_format:
            self._by_format[floats] = Prepared(self._dimensions, floats=floats)
        return self._by_format[floats]

    async def answer(self, transport: asyncio.Transport, body: bytes) -> None:
        """Answer one request for vectors."""
        now = asyncio.get_running_loop().time()
        asked = read_body(body)
        if not 1 <= asked.inputs <= MAX_INPUTS:
            raise ValueError(f"{asked.inputs} inputs; at most {MAX_INPUTS} are taken")
        self.stats.requests += 1
        exceeded = self._rates.take("tokens", asked.tokens, now)
        told = "".join(f"{name}: {value}\r\n" for name, value in self._rates.headers(now).items())
        if exceeded is not None:
            self.stats.refusals += 1
            wait_s = exceeded.wait_s or 60.0
            told += f"retry-after-ms: {wait_s * 1000:.0f}\r\nretry-after: {max(1, round(wait_s))}\r\n"
            transport.write(_head(b"429 Too Many Requests", len(_REFUSAL), told) + _REFUSAL)
            return
        self.stats.inputs += asked.inputs
        self.stats.tokens += asked.tokens
        await self._send(transport, self.prepared(floats=not asked.base64), asked, told)

    async def _send(self, transport: asyncio.Transport, prepared: Prepared, asked: Asked, told: str) -> None:
        if self._latency_s:
            await asyncio.sleep(self._latency_s)
        suffix = _SUFFIX % (asked.tokens, asked.tokens)
        length = prepared.ends[asked.inputs]
        transport.write(_head(b"200 OK", len(_PREFIX) + length + len(suffix), told) + _PREFIX)
        # without sendfile, asyncio would read through the one position of the file that all connections share
        await asyncio.get_running_loop().sendfile(transport, prepared.file, 0, length, fallback=False)
        transport.write(suffix)

    def tell(self, transport: asyncio.Transport) -> None:
        body = json.dumps(asdict(self.stats)).encode()
        transport.write(_head(b"200 OK", len(body), "") + body)


def _head(status: bytes, length: int, told: str) -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%b\r\n" % (
        status,
        length,
        told.encode(),
    )


class Connection(asyncio.Protocol):
    """One connection: one request at a time, each with a content-length, as every client here sends them."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._received = bytearray()
        self._expected: int | None = None
        """The length of the request that is coming, head and body; None until its head is whole."""
        self._answering: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._answering is not None:
            self._answering.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._expected is None:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            length = _LENGTH.search(self._received, 0, end + 2)
            self._expected = end + 4 + (int(length[1]) if length else 0)
            self._body_begins = end + 4
        if len(self._received) >= self._expected:
            request = bytes(self._received[: self._expected])
            del self._received[: self._expected]
            self._expected = None
            self._handle(request[:16], request[self._body_begins :])

    def _handle(self, line: bytes, body: bytes) -> None:
        if line.startswith(b"POST "):
            self._answering = asyncio.ensure_future(self._answer(body))
            return
        if line.startswith(b"DELETE "):
            self._desk.forget()
        self._desk.tell(self._transport)

    async def _answer(self, body: bytes) -> None:
        try:
            await self._desk.answer(self._transport, body)
        except ValueError as error:
            told = json.dumps({"error": {"message": str(error), "type": "invalid_request_error"}}).encode()
            self._transport.write(_head(b"400 Bad Request", len(told), "") + told)
        except ConnectionError:  # the client has left
            self._transport.abort()


async def serve(options: argparse.Namespace) -> None:
    desk = Desk(options)
    desk.prepared(floats=False)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(desk), "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    async with server:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", type=int, default=1_536)
    parser.add_argument("--floats", action="store_true", help="answer with numbers even if base64 is asked for")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before any answer")
    parser.add_argument("--tokens-per-minute", type=float, help="default: no limit")
    parser.add_argument("--burst", type=float, default=1.0, help="how many seconds of tokens may come at once")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
