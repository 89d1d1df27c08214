"""Embeds with OpenAI, Azure, or a compatible server, one request at a time. The only module that imports `openai`.

The SDK supplies keys, addresses, headers and Azure's paths. Its retries, redirects, request encoding and response
parsing are not used: they lose data, repeat requests that can never succeed, and block the loop (measured: 140 ms for a
reply of 2,048 vectors). The body is decoded while it is read, up to the length that a valid reply can have.

Errors of the SDK and of httpx hold the request, and with it key and texts. None leaves this module, not even as the
context of one of our errors.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import importlib
import inspect
import logging
import os
import re
import ssl
import sys
import threading
import warnings
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any, NoReturn
from urllib.parse import quote

from .. import models
from ..concurrency import finish_despite_cancel, run_in_thread_if
from ..errors import (
    AuthenticationError,
    BadRequestError,
    CertificateError,
    ConfigError,
    ProtocolError,
    ProviderError,
    RequestError,
    TransportError,
)
from ..types import ProviderInfo, Reply
from .credentials import ApiKey, check_base_url, check_key, usable_key
from .decoding import Decoder
from .redaction import WITHHELD, redact
from .responses import error_of, is_other_model, rates_of

logger = logging.getLogger(__name__)

OFFICIAL_HOST = "api.openai.com"

# Smaller requests and replies are processed on the event loop: 0.1 ms of work, which a thread would cost, too.
INLINE_BYTES = 64 * 1024

# The values of `encoding_format` to try in turn while a server refuses it. base64 takes a third of the bytes, old vLLM
# knows only floats (vllm issue 6174), and some proxies refuse the option itself (litellm issue 42421).
_ENCODINGS = ("base64", "float", None)

_CONNECT_S = 5.0  # openai/_constants.py of 3.52; a server that does not speak TLS may never answer

# The errors of httpx and httpx2 after which nothing was sent.
_NOT_CONNECTED = ("ConnectError", "ConnectTimeout", "PoolTimeout")


class OpenAIProvider:
    """Sends one batch per call. Safe for many tasks, for one event loop after another, and after a fork.

    The options are those of `Embedder`. Without `dimensions` the first reply sets them. `timeout` includes connecting,
    sending, waiting and reading. An async function as `api_key` is called for every request. At most `connections`
    requests run at once; a client that was passed in and has fewer connections sets its own limit.

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
        self._asked_dimensions = self._expected = dimensions
        self._timeout = timeout
        self._given_client, self._given_http_client = client, http_client
        self._is_given = client is not None or http_client is not None
        self._connections = connections
        self._encoding = 0
        self._warned = False
        # By process and loop: connections can be used and closed only where they were opened.
        self._clients: dict[tuple[int, asyncio.AbstractEventLoop], _Client] = {}
        self._opening = threading.Lock()
        if client is None:
            base_url = base_url or os.environ.get("OPENAI_BASE_URL") or f"https://{OFFICIAL_HOST}/v1"
            self._base_url = check_base_url(base_url, allow_insecure_http=allow_insecure_http)
            self._api_key = check_key(api_key, self._base_url)
        else:
            _check_client(client, base_url=base_url, api_key=api_key, http_client=http_client)
            self._base_url = str(client.base_url)
            self._api_key = str(getattr(client, "api_key", ""))
        host, key = self._base_url.rstrip("/"), self._api_key
        # the provider most likely counts rate limits by address and key
        identity = host, hashlib.sha256(key.encode()).digest() if isinstance(key, str) else key
        self._place = ProviderInfo(host, identity, validates=True)

    def __repr__(self) -> str:
        return f"<OpenAIProvider {self._model!r} at {self._place.host}>"

    def __del__(self) -> None:
        here, clients = os.getpid(), getattr(self, "_clients", {})
        if any(pid == here and client.closing is not None for (pid, _), client in clients.items()):
            advice = "write `async with Embedder(…)`, or await its aclose()"
            warnings.warn(f"{self!r} was never closed: {advice}", ResourceWarning, source=self, stacklevel=1)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an OpenAIProvider holds a key and connections: make one in each process, do not pickle it")

    @property
    def info(self) -> ProviderInfo:
        """The server and the model as far as they are known. The first replies add to it."""
        dimensions = self._expected
        if dimensions is None and self._place.host == OFFICIAL_HOST:
            # on another server a well-known name may stand for any model
            dimensions = models.lookup(self._model).dimensions
        return replace(self._place, dimensions=dimensions, encoding_format=_ENCODINGS[self._encoding])

    async def embed(self, texts: Sequence[str]) -> Reply:
        """Send one request and return its validated reply.

        Raises:
            ProviderError: It failed; nothing of its reply is used. Its connection is closed or clean.
        """
        client = await self._client()
        try:
            # a request that waits for a connection has not begun
            async with client.room, asyncio.timeout(self._timeout):
                return await self._embed(client, texts, self._encoding)
        except TimeoutError:
            raise TransportError(f"no whole answer within {self._timeout:g} s", timed_out=True) from None

    async def _embed(self, client: _Client, texts: Sequence[str], encoding: int, requests: int = 1) -> Reply:
        try:
            reply = await self._attempt(client, texts, encoding)
        except ProviderError as error:
            error.requests = requests
            raise
        if reply is None:
            return await self._embed(client, texts, encoding + 1, requests + 1)
        if encoding > self._encoding:  # else another request has found this meanwhile
            self._encoding = encoding
            logger.warning("%s refuses encoding_format=%r", self._place.host, _ENCODINGS[encoding - 1])
        return replace(reply, requests=requests) if requests > 1 else reply

    async def _attempt(self, client: _Client, texts: Sequence[str], encoding: int) -> Reply | None:
        """Return the reply, or None if the server refuses the encoding and there is another one to try."""
        size = sum(map(len, texts))
        options = {"encoding_format": _ENCODINGS[encoding], "dimensions": self._asked_dimensions}
        given = {name: value for name, value in options.items() if value is not None}
        fields = {"model": self._model, "input": list(texts), **given}
        body = await run_in_thread_if(size >= INLINE_BYTES, client.http.to_json, fields)
        decoder = Decoder(len(texts), self._expected)
        response, refused = await self._post(client, body, decoder)
        if not response.is_success:
            error, is_about_encoding = await run_in_thread_if(size >= INLINE_BYTES, _refusal, response, refused, texts)
            if is_about_encoding and encoding + 1 < len(_ENCODINGS):
                return None
            raise error
        reply = await run_in_thread_if(decoder.size >= INLINE_BYTES, decoder.finish)
        self._expected = self._expected or reply.vectors.shape[1]
        if reply.vectors.shape[1] != self._expected:  # two first replies at once, of different sizes
            raise ProtocolError(f"expected {self._expected} dimensions, got {reply.vectors.shape[1]}")
        # Azure is given the name of a deployment, not of a model
        if not (self._warned or client.is_azure) and is_other_model(self._model, reply.model):
            self._warned = True
            logger.warning("%s answers with another model than the requested %r", self._place.host, self._model)
        return replace(reply, rates=rates_of(response.headers))

    async def _post(self, client: _Client, body: bytes, decoder: Decoder) -> tuple[Any, bytes]:
        """Return the response, and its body if it is an error. Any other body is passed to the decoder."""
        sdk = client.openai
        # the SDK puts the deployment into the path only for bodies that it encodes itself
        deployment = f"/deployments/{quote(self._model, safe='')}" if client.is_azure else ""
        try:
            response = await client.sdk.post(
                f"{deployment}/embeddings",
                content=body,
                cast_to=client.http.httpx2.Response,
                options={
                    "headers": {
                        "Content-Type": "application/json",
                        # decompression would run on the loop, and could turn 300 kB into 300 MB
                        "Accept-Encoding": "identity",
                        # makes the SDK return the response before its body is read
                        "X-Stainless-Raw-Response": "stream",
                    },
                    "max_retries": 0,
                    "follow_redirects": False,
                    "timeout": client.timeout,
                    "security": {"bearer_auth": True},
                },
            )
            try:
                await client.http.read(response, decoder.most_bytes, decoder.feed)
                return response, b""
            finally:
                await response.aclose()
        except client.http.RefusedError as refused:
            return refused.response, refused.body
        except sdk.APIStatusError as error:
            return error.response, error.response.content
        except ProviderError:
            raise
        except (sdk.APIError, OSError, *client.http.transport_errors()) as error:
            failure: Exception = _transport_error(error)
        except RuntimeError as error:
            failure = self._lost_client(client, error)
        raise failure  # here, outside of the `except`, it gets no context

    def _lost_client(self, client: _Client, error: RuntimeError) -> Exception:
        """Return our error for a RuntimeError of httpx or asyncio about a closed client or another loop."""
        if client.sdk.is_closed():
            return (RequestError if self._is_given else TransportError)("the HTTP client is closed")
        if "event loop" in str(error).lower():
            return TransportError("a connection was lost: it belongs to another event loop")
        return error

    async def _client(self) -> _Client:
        here = os.getpid(), asyncio.get_running_loop()
        client = self._clients.get(here)
        if client is None:
            if self._is_given and any(pid != here[0] for pid, _ in self._clients):
                raise RequestError("the client that was passed in was used before os.fork(): make one in each process")
            self._forget_closed_loops(here[0])
            # in a thread, because importing the SDK takes 0.7 s, and reading the system's certificates 30 ms
            client = await asyncio.to_thread(self._open, here)
        if client.closing is None and not self._is_given:
            client.closing = _closes_with_its_loop(client)
            await anext(client.closing)
        return client

    def _forget_closed_loops(self, pid: int) -> None:
        for other, loop in list(self._clients):
            if other == pid and loop.is_closed():
                self._clients.pop((other, loop), None)

    def _open(self, here: tuple[int, asyncio.AbstractEventLoop]) -> _Client:
        """Return the client for a process and a loop. Blocks while another thread makes it."""
        with self._opening:
            if here not in self._clients:
                openai, http = _load()
                try:
                    self._clients[here] = _Client(
                        openai, http, self._sdk(openai, http), self._timeout, self._connections
                    )
                except Exception as error:  # the address, or a proxy in the environment, is malformed
                    name = type(error).__name__
                    raise RequestError(f"no client can be made for {self._place.host}: {name}") from None
            return self._clients[here]

    def _sdk(self, openai: Any, http: Any) -> Any:
        if self._given_client is not None:
            return self._given_client
        http_client = self._given_http_client or http.client_for(self._base_url, self._connections)
        key = self._fresh_key if callable(self._api_key) else self._api_key
        return openai.AsyncOpenAI(api_key=key, base_url=self._base_url, http_client=http_client, max_retries=0)

    async def _fresh_key(self) -> str:
        assert callable(self._api_key)
        try:
            return usable_key(await self._api_key(), self._base_url)
        except Exception as error:
            reason = str(error) if isinstance(error, ConfigError) else type(error).__name__
            raise AuthenticationError(f"api_key() gave no key that can be used: {reason}") from error

    async def aclose(self) -> None:
        """Close the connections of this event loop. Clients that were passed in stay open."""
        pid = os.getpid()
        self._forget_closed_loops(pid)
        client = self._clients.pop((pid, asyncio.get_running_loop()), None)
        if client is not None and client.closing is not None:
            await finish_despite_cancel(client.closing.aclose())  # cancelled halfway, it would leak connections


def _load() -> tuple[Any, Any]:
    blocks = sys.getallocatedblocks()
    openai = importlib.import_module("openai")
    http = importlib.import_module(".http", __package__)
    if gc.isenabled() and sys.getallocatedblocks() > 1.25 * blocks:
        # With a quarter more objects the collector would soon run by itself. Measured 2026-11: without this, the first
        # bulk job stalls the loop for 50 ms.
        gc.collect()
    return openai, http


def _check_client(client: Any, **others: object) -> None:
    kind = type(client).__name__
    if not (hasattr(client, "base_url") and hasattr(client, "post")):
        raise TypeError(f"client= is {kind}; it must be an AsyncOpenAI or AsyncAzureOpenAI")
    if not inspect.iscoroutinefunction(client.post):
        raise TypeError(f"client= is {kind}, which would block the event loop; pass an AsyncOpenAI")
    given = [f"{name}=" for name, value in others.items() if value is not None]
    if given:
        raise ConfigError(f"client= has its own address, key and connections; leave out {' and '.join(given)}")


class _Client:
    """The SDK's client for one event loop, with its settings."""

    def __init__(self, openai: Any, http: Any, sdk: Any, timeout_s: float, connections: int) -> None:
        self.openai, self.http, self.sdk = openai, http, sdk
        self.timeout = http.httpx2.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_S))
        pool = getattr(getattr(getattr(sdk, "_client", None), "_transport", None), "_pool", None)
        self.room = asyncio.Semaphore(getattr(pool, "_max_connections", connections))
        self.is_azure = isinstance(sdk, openai.AsyncAzureOpenAI) and "/deployments" not in str(sdk.base_url)
        self.closing: AsyncGenerator[None, None] | None = None


async def _closes_with_its_loop(client: _Client) -> AsyncGenerator[None, None]:
    # `asyncio.run` closes the async generators that are still open, so a forgotten `aclose` leaks no socket
    try:
        yield
    finally:
        await client.sdk.close()


def _refusal(response: Any, body: bytes, texts: Sequence[str]) -> tuple[ProviderError, bool]:
    """Return the error that an answer stands for, without texts and keys, and whether it is about the encoding."""
    headers = response.request.headers
    keys = [key for key in (headers.get("authorization", "").partition(" ")[2], headers.get("api-key")) if key]
    error = error_of(response.status_code, response.headers, body, keys)
    message = str(error)
    redacted = redact(message, texts, keys)
    error.args = (f"HTTP {error.status}: {redacted}" if redacted == WITHHELD else redacted,)
    if error.code and redact(error.code, texts, keys) != error.code:
        error.code = None
    error.rates = rates_of(response.headers)
    blames_encoding = re.search("encoding_format|base64", message, re.IGNORECASE) is not None
    return error, isinstance(error, BadRequestError) and blames_encoding


def _transport_error(error: BaseException) -> ProviderError:
    """Return our error, with the class names and errno of the original ones, whose messages may hold key or address."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for cause in chain:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return CertificateError(
                f"the server's certificate was not accepted: {cause.verify_message}. "
                "If it is right, add its authority to the system's trust store"
            )
        if isinstance(cause, ssl.SSLError) and cause.reason == "WRONG_VERSION_NUMBER":
            return RequestError("the server does not speak TLS: base_url must begin with http://, or name another port")
    words = " <- ".join(type(cause).__name__ for cause in chain[:3])
    numbers = [cause.errno for cause in chain if isinstance(cause, OSError) and cause.errno]
    detail = f": {os.strerror(numbers[0])}" if numbers and numbers[0] > 0 else ""
    connected = not any(type(cause).__name__ in _NOT_CONNECTED for cause in chain)
    return TransportError(f"no whole answer came ({words}{detail})", connected=connected)
