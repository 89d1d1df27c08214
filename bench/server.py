"""The benchmark server, fast enough never to be the bottleneck: all answers are prepared, and sent without a copy.

    python -m bench.server --dimensions 1536 [--floats] [--latency 0.3] [--tokens-per-minute 6000000]

It prints its base URL in one line. `POST /v1/embeddings` answers with one vector per input, the same ones every time:
item i is item i of `items()`, whatever the text. `GET /stats` returns the counts, `DELETE /stats` resets them.

The items of the longest answer are in a file that the kernel keeps in memory. An answer of n vectors is the beginning
of that file, which `sendfile` lets the kernel send.
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

# The API's limit of inputs per request (API reference, embeddings.create), so also the size of the longest answer.
MAX_INPUTS = 2_048
# Different vectors: enough to notice one in the wrong place, few enough to format as numbers in a second.
_DIFFERENT = 256
# The corpus' average in cl100k_base. Token ids are charged like the bytes of their text, so sending ids gains nothing.
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
    """Yield the items of the longest answer, each except the first with a comma before it."""
    rows = vectors(dimensions)
    if floats:  # like the API: all digits of the float64 that is equal to the float32
        texts = [json.dumps(row.tolist(), separators=(",", ":")).encode() for row in rows]
    else:
        texts = [b'"' + base64.b64encode(row.astype("<f4").tobytes()) + b'"' for row in rows]
    for index in range(MAX_INPUTS):
        comma = b"," if index else b""
        text = texts[index % _DIFFERENT]
        yield comma + b'{"object":"embedding","index":%d,"embedding":' % index + text + b"}"


class Prepared:
    """The items in a file, and the offset at which each of them ends."""

    def __init__(self, dimensions: int, *, floats: bool) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the server runs
        self.ends = [0]
        for item in items(dimensions, floats=floats):
            self.file.write(item)
            self.ends.append(self.ends[-1] + len(item))
        self.file.flush()


@dataclass(slots=True)
class Stats:
    """The counts since the last `DELETE /stats`; `inputs` and `tokens` count only answered requests."""

    requests: int = 0
    refusals: int = 0
    inputs: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """The parts of a request that its answer depends on.

    Attributes:
        inputs: The number of texts, or of lists of token ids.
        tokens: The charge: UTF-8 bytes / 4 of the texts, as by the API's limiter; about the same for their token ids.
        base64: Whether `encoding_format` is base64.
    """

    inputs: int
    tokens: int
    base64: bool


def read_body(body: bytes) -> Asked:
    """Read a JSON body without parsing it: a megabyte takes a millisecond.

    The part after the input must contain no `]`, which holds for model, dimensions and format.

    Raises:
        ValueError: There is no `input`, or it is not a text, token ids, or a list of them.
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
    """Count the quotes that open or close a text."""
    if b"\\" in part:  # remove escaped backslashes first, so that one before a closing quote escapes nothing
        part = part.replace(b"\\\\", b"").replace(b'\\"', b"")
    return part.count(b'"')


class Service:
    """The state shared by all connections: answers, rate limits and counts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._latency_s: float = options.latency
        self._burst_s: float = options.burst
        self._tokens_per_minute: float | None = options.tokens_per_minute
        self._by_format = {True: Prepared(options.dimensions, floats=True)} if options.floats else {}
        self._dimensions: int = options.dimensions
        self._only_floats: bool = options.floats
        self.reset()

    def reset(self) -> None:
        """Reset the counts and refill the bucket."""
        self.stats = Stats()
        self._rates = ServerRateLimits(None, self._tokens_per_minute, self._burst_s)

    def prepared(self, *, floats: bool) -> Prepared:
        """Return the answers in one format; numbers are prepared at the first request for them."""
        floats = floats or self._only_floats
        if floats not in self._by_format:
            self._by_format[floats] = Prepared(self._dimensions, floats=floats)
        return self._by_format[floats]

    async def answer(self, transport: asyncio.Transport, body: bytes) -> None:
        """Answer one request for vectors."""
        now = asyncio.get_running_loop().time()
        asked = read_body(body)
        if not 1 <= asked.inputs <= MAX_INPUTS:
            raise ValueError(f"{asked.inputs} inputs; the limit is {MAX_INPUTS}")
        self.stats.requests += 1
        exceeded = self._rates.take("tokens", asked.tokens, now)
        headers = "".join(f"{name}: {value}\r\n" for name, value in self._rates.headers(now).items())
        if exceeded is not None:
            self.stats.refusals += 1
            wait_s = exceeded.wait_s or 60.0
            headers += f"retry-after-ms: {wait_s * 1000:.0f}\r\nretry-after: {max(1, round(wait_s))}\r\n"
            transport.write(_head(b"429 Too Many Requests", len(_REFUSAL), headers) + _REFUSAL)
            return
        self.stats.inputs += asked.inputs
        self.stats.tokens += asked.tokens
        await self._send(transport, self.prepared(floats=not asked.base64), asked, headers)

    async def _send(self, transport: asyncio.Transport, prepared: Prepared, asked: Asked, headers: str) -> None:
        if self._latency_s:
            await asyncio.sleep(self._latency_s)
        suffix = _SUFFIX % (asked.tokens, asked.tokens)
        length = prepared.ends[asked.inputs]
        transport.write(_head(b"200 OK", len(_PREFIX) + length + len(suffix), headers) + _PREFIX)
        # no fallback: without sendfile, asyncio would use the file's position, which all connections share
        await asyncio.get_running_loop().sendfile(transport, prepared.file, 0, length, fallback=False)
        transport.write(suffix)

    def send_stats(self, transport: asyncio.Transport) -> None:
        body = json.dumps(asdict(self.stats)).encode()
        transport.write(_head(b"200 OK", len(body), "") + body)


def _head(status: bytes, length: int, headers: str) -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%b\r\n" % (
        status,
        length,
        headers.encode(),
    )


class Connection(asyncio.Protocol):
    """One connection. Handles one request at a time, each with a content-length, as all clients here send them."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._received = bytearray()
        self._expected: int | None = None
        """The length of the current request, head and body; None until its head is complete."""
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
            self._service.reset()
        self._service.send_stats(self._transport)

    async def _answer(self, body: bytes) -> None:
        try:
            await self._service.answer(self._transport, body)
        except ValueError as error:
            refusal = json.dumps({"error": {"message": str(error), "type": "invalid_request_error"}}).encode()
            self._transport.write(_head(b"400 Bad Request", len(refusal), "") + refusal)
        except ConnectionError:  # the client has disconnected
            self._transport.abort()


async def serve(options: argparse.Namespace) -> None:
    service = Service(options)
    service.prepared(floats=False)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(service), "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    async with server:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", type=int, default=1_536)
    parser.add_argument("--floats", action="store_true", help="answer with numbers even if base64 is requested")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before any answer")
    parser.add_argument("--tokens-per-minute", type=float, help="default: no limit")
    parser.add_argument("--burst", type=float, default=1.0, help="seconds of tokens that a burst may use")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
