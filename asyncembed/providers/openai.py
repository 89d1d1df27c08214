"""One request to OpenAI, Azure, or a server that speaks like them. The only module that imports `openai`.

The SDK carries keys, addresses, proxies and Azure. Its retries, its redirects, its encoding of the body and its
parsing of the reply are not used: they lose data, repeat what is refused for good, and block the loop (measured:
140 ms for a reply of 2,048 vectors). Bytes go in, bytes come out, up to as many as the reply can need.
"""

from __future__ import annotations

import asyncio
import importlib
import ipaddress
import json
import logging
import os
import ssl
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, TypeAlias
from urllib.parse import quote, urlsplit
from weakref import WeakKeyDictionary

from ..answers import error_of, rates_of, scrub
from ..decoding import decode, most_bytes
from ..errors import BadRequestError, CertificateError, ConfigError, ProtocolError, ProviderError, TransportError
from ..types import Reply

logger = logging.getLogger(__name__)

ApiKey: TypeAlias = str | Callable[[], Awaitable[str]]

OFFICIAL_HOST = "api.openai.com"

# Below this a body is encoded and a reply decoded where it is: 0.1 ms of work, as much as handing it to a thread.
INLINE_BYTES = 64 * 1024

# What `encoding_format` is tried with, in turn, when a server refuses it: base64 is a third of the bytes, old vLLM
# knows floats only (vllm issue 6174), and some proxies refuse the word itself (litellm issue 42421).
_ENCODINGS = ("base64", "float", None)


class OpenAIProvider:
    """Sends one batch a call; safe to use from many tasks, and on one event loop after another.

    Args:
        model: The model's (on Azure: the deployment's) name.
        dimensions: The size to ask for; None for the model's own.
        expected: The size a vector must have; None if the first reply may tell.
        timeout: Seconds, wall-clock, for one attempt: connecting, sending, waiting and reading.
        client: A ready AsyncOpenAI or AsyncAzureOpenAI; used as it is, never closed.
        http_client: A ready httpx or httpx2 AsyncClient for the SDK to use; never closed.
        api_key: The key, or an async function that returns it. None: `OPENAI_API_KEY`.
        base_url: None: `OPENAI_BASE_URL`, else OpenAI itself.
        connections: How many connections may be open at once.
        allow_insecure_http: Whether key and texts may travel in clear beyond this machine.

    Raises:
        ConfigError: Key or address cannot be used. Nothing was sent.
    """

    def __init__(
        self,
        model: str,
        *,
        dimensions: int | None = None,
        timeout: float = 60.0,
        client: Any = None,
        http_client: Any = None,
        api_key: ApiKey | None = None,
        base_url: str | None = None,
        connections: int = 8,
        allow_insecure_http: bool = False,
    ) -> None:
        self._model = model
        self._asked_dimensions = dimensions
        self._expected = dimensions
        self._timeout = timeout
        self._given_client = client
        self._http_client = http_client
        self._connections = connections
        self._encoding = 0
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, _Client] = WeakKeyDictionary()
        if client is None:
            base_url = base_url or os.environ.get("OPENAI_BASE_URL") or f"https://{OFFICIAL_HOST}/v1"
            self._base_url = check_base_url(base_url, allow_insecure_http=allow_insecure_http)
            self._api_key = check_key(api_key, self._base_url)
        else:
            self._base_url = str(client.base_url)
            self._api_key = str(getattr(client, "api_key", ""))

    def __repr__(self) -> str:
        return f"<OpenAIProvider {self._model!r} at {self.host}>"

    @property
    def host(self) -> str:
        """Where texts are sent to."""
        return urlsplit(self._base_url).netloc

    @property
    def identity(self) -> tuple[str, str]:
        """What the provider counts limits by, as far as we can tell: address and key."""
        key = self._api_key
        return self._base_url.rstrip("/"), key if isinstance(key, str) else str(id(key))

    @property
    def dimensions(self) -> int | None:
        """The size of the vectors, once it is known."""
        return self._expected

    async def embed(self, texts: Sequence[str]) -> Reply:
        """Send one request and return its validated reply.

        Raises:
            ProviderError: It failed; nothing of its reply is used. The connection is closed or clean.
        """
        try:
            async with asyncio.timeout(self._timeout):
                return await self._embed(texts)
        except TimeoutError:
            raise TransportError(f"no whole answer within {self._timeout:g} s") from None

    async def _embed(self, texts: Sequence[str]) -> Reply:
        client = await self._client()
        while True:
            encoding = self._encoding
            try:
                return await self._attempt(client, texts, _ENCODINGS[encoding])
            except BadRequestError as error:
                if not _blames_encoding(str(error)) or encoding + 1 == len(_ENCODINGS):
                    raise
                if self._encoding == encoding:  # else another request has found out already
                    self._encoding += 1
                    logger.warning("%s refuses encoding_format=%r", self.host, _ENCODINGS[encoding])

    async def _attempt(self, client: _Client, texts: Sequence[str], encoding: str | None) -> Reply:
        size = sum(map(len, texts))
        body = await _maybe_in_thread(size, self._encode, texts, encoding)
        limit = most_bytes(len(texts), self._expected)
        headers, answer = await self._post(client, body, limit)
        reply = await _maybe_in_thread(len(answer), decode, answer, len(texts), self._expected)
        self._expected = self._expected or reply.vectors.shape[1]
        if reply.vectors.shape[1] != self._expected:  # two first replies at once, of different sizes
            raise ProtocolError(f"expected {self._expected} dimensions, got {reply.vectors.shape[1]}")
        return Reply(reply.vectors, reply.tokens, rates_of(headers))

    def _encode(self, texts: Sequence[str], encoding: str | None) -> bytes:
        fields: dict[str, Any] = {"model": self._model, "input": list(texts)}
        if encoding is not None:
            fields["encoding_format"] = encoding
        if self._asked_dimensions is not None:
            fields["dimensions"] = self._asked_dimensions
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()

    async def _post(self, client: _Client, body: bytes, limit: int) -> tuple[Any, bytes]:
        sdk = client.openai
        try:
            response = await client.sdk.post(
                client.path(self._model),
                content=body,
                cast_to=client.response_type,
                options={
                    "headers": {
                        "Content-Type": "application/json",
                        # decompressing would run on the loop, and let 300 kB become 300 MB
                        "Accept-Encoding": "identity",
                        # the SDK's own word for: return the response before its body is read
                        "X-Stainless-Raw-Response": "stream",
                    },
                    "max_retries": 0,
                    "follow_redirects": False,
                    "timeout": self._timeout,
                    "security": {"bearer_auth": True},
                },
            )
            try:
                return response.headers, await _read(response, limit)
            finally:
                await response.aclose()
        # `from None` below: the SDK's errors hold the request, and with it the key and the texts
        except sdk.APIStatusError as error:
            answer = error.response
            raise self._error(answer.status_code, answer.headers, answer.content) from None
        except (sdk.APIError, *client.transport_errors) as error:
            raise _transport_error(error, self._secrets) from None

    @property
    def _secrets(self) -> tuple[str, ...]:
        return (self._api_key,) if isinstance(self._api_key, str) else ()

    def _error(self, status: int, headers: Any, body: bytes) -> ProviderError:
        error = error_of(status, headers, body, self._secrets)
        error.rates = rates_of(headers)
        return error

    async def _client(self) -> _Client:
        # A connection belongs to the loop it was opened on, so every loop gets its own client.
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            # in a thread: importing the SDK takes 0.7 s, and reading the system's certificates 30 ms
            client = await asyncio.to_thread(self._build)
            client = self._clients.setdefault(loop, client)
            if self._given_client is None and self._http_client is None and client.closing is None:
                client.closing = _closes_with_its_loop(client)
                await anext(client.closing)
        return client

    def _build(self) -> _Client:
        openai = importlib.import_module("openai")
        httpx2 = importlib.import_module("httpx2")
        if self._given_client is not None:
            return _Client(openai, httpx2, self._given_client)
        http_client = self._http_client or httpx2.AsyncClient(
            timeout=self._timeout,
            follow_redirects=False,
            limits=httpx2.Limits(max_connections=self._connections, max_keepalive_connections=self._connections),
        )
        sdk = openai.AsyncOpenAI(api_key=self._api_key, base_url=self._base_url, http_client=http_client, max_retries=0)
        return _Client(openai, httpx2, sdk)

    async def aclose(self) -> None:
        """Close the connections of this loop; clients that were handed in stay open."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None and client.closing is not None:
            await client.closing.aclose()


class _Client:
    """The SDK's client of one loop, and what has to be known of it."""

    def __init__(self, openai: Any, httpx2: Any, sdk: Any) -> None:
        self.openai = openai
        self.sdk = sdk
        self.response_type = httpx2.Response
        self.closing: AsyncGenerator[None, None] | None = None
        self._azure = isinstance(sdk, openai.AsyncAzureOpenAI) and "/deployments" not in str(sdk.base_url)
        legacy = sys.modules.get("httpx")  # loaded if the user's own client is one of the old httpx
        self.transport_errors: tuple[type[Exception], ...] = (
            httpx2.RequestError,
            httpx2.StreamError,
            OSError,
            *((legacy.RequestError, legacy.StreamError) if legacy else ()),
        )

    def path(self, model: str) -> str:
        # The SDK puts the deployment into the path only for bodies that it encodes itself.
        return f"/deployments/{quote(model, safe='')}/embeddings" if self._azure else "/embeddings"


async def _closes_with_its_loop(client: _Client) -> AsyncGenerator[None, None]:
    # `asyncio.run` closes the async generators that are still open: so who forgets `aclose` leaks no socket.
    try:
        yield
    finally:
        await client.sdk.close()


async def _read(response: Any, limit: int) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > limit:
            raise ProtocolError(f"expected a reply of at most {limit:,} bytes, got more")
    return bytes(body)


async def _maybe_in_thread(size: int, work: Callable[..., Any], *args: Any) -> Any:
    return work(*args) if size < INLINE_BYTES else await asyncio.to_thread(work, *args)


def _blames_encoding(message: str) -> bool:
    message = message.lower()
    return "encoding_format" in message or "base64" in message


def _transport_error(error: Exception, secrets: tuple[str, ...]) -> ProviderError:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for cause in chain:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return CertificateError(
                f"the server's certificate was not accepted: {cause.verify_message}. "
                "If it is right, add its authority to the system's trust store"
            )
    words = " <- ".join(f"{type(cause).__name__}" for cause in chain[:3])
    numbers = [cause.errno for cause in chain if isinstance(cause, OSError) and cause.errno]
    detail = f": {os.strerror(numbers[0])}" if numbers and numbers[0] > 0 else ""
    return TransportError(scrub(f"no whole answer came ({words}{detail})", secrets))


def check_key(key: ApiKey | None, base_url: str) -> ApiKey:
    """Return the key to use. What is wrong with it is said without showing it.

    Raises:
        ConfigError: There is none, or it cannot stand in an HTTP header.
    """
    if callable(key):
        return key
    found = key if key is not None else os.environ.get("OPENAI_API_KEY")
    if not found or not found.strip():
        if _is_loopback(urlsplit(base_url).hostname):
            return "none"  # the SDK wants one; Ollama and its like do not
        raise ConfigError('no API key: set OPENAI_API_KEY, pass api_key=, or use the embedded model, Embedder("local")')
    found = found.strip()  # a newline at its end comes from reading it out of a file
    if not (found.isascii() and found.isprintable()) or " " in found:
        raise ConfigError("the API key holds spaces, control or non-ASCII characters; it is not shown here")
    return found


def check_base_url(url: str, *, allow_insecure_http: bool) -> str:
    """Return the URL if key and texts may be sent there.

    Raises:
        ConfigError: It is no http(s) URL, holds a password, or would send in clear beyond this machine.
    """
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("base_url must start with https:// (or http:// on this machine) and name a host")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"base_url for {parts.hostname} holds a user name or password; pass api_key= instead")
    if parts.scheme == "http" and not _is_loopback(parts.hostname) and not allow_insecure_http:
        raise ConfigError(
            f"base_url would send key and texts in clear to {parts.hostname}; use https://, "
            "or allow_insecure_http=True if that network is yours"
        )
    return url.strip()


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
