"""One request to OpenAI, Azure, or a server that speaks like them. The only module that imports `openai`.

The SDK carries keys, addresses, proxies and Azure. Its retries, its redirects, its encoding of the body and its
parsing of the reply are not used: they lose data, repeat what is refused for good, and block the loop (measured:
140 ms for a reply of 2,048 vectors). Bytes go in; bytes come out, as many as can be needed, and are decoded at once.

An error of the SDK or of httpx holds its request, and with it key and texts. None leaves this module, not even as
the context of one of ours.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import importlib
import inspect
import logging
import os
import ssl
import sys
import warnings
from collections.abc import AsyncGenerator, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn
from urllib.parse import quote

from .. import models
from ..concurrency import finished, in_thread_if
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
from .redaction import veil
from .responses import error_of, is_other_model, rates_of

logger = logging.getLogger(__name__)

OFFICIAL_HOST = "api.openai.com"

# Below this a body is encoded and a reply looked through where it is: 0.1 ms of work, no more than a thread costs.
INLINE_BYTES = 64 * 1024

# What `encoding_format` is tried with, in turn, when a server refuses it: base64 is a third of the bytes, old vLLM
# knows floats only (vllm issue 6174), and some proxies refuse the word itself (litellm issue 42421).
_ENCODINGS = ("base64", "float", None)

# openai/_constants.py of 3.52: 5 s to connect. A server that does not speak TLS is silent for as long as it is let.
_CONNECT_S = 5.0

# What httpx and httpx2 raise before anything is sent.
_NOT_CONNECTED = ("ConnectError", "ConnectTimeout", "PoolTimeout")


class OpenAIProvider:
    """Sends one batch a call; safe to use from many tasks, on one event loop after another, and after a fork.

    Args:
        model: The model's (on Azure: the deployment's) name.
        dimensions: The size to ask for; None for the model's own, which the first reply then tells.
        timeout: Seconds, wall-clock, for one attempt: connecting, sending, waiting and reading.
        client: A ready AsyncOpenAI or AsyncAzureOpenAI; used as it is, never closed.
        http_client: A ready httpx or httpx2 AsyncClient for the SDK to use; never closed.
        api_key: The key, or an async function that returns it, called for every request. None: `OPENAI_API_KEY`.
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
        self._given_http_client = http_client
        self._connections = connections
        self._encoding = 0
        self._warned = False
        # By process and loop: what was opened on one of them is no use to any other, and not theirs to close.
        self._clients: dict[tuple[int, asyncio.AbstractEventLoop], _Client] = {}
        if client is None:
            base_url = base_url or os.environ.get("OPENAI_BASE_URL") or f"https://{OFFICIAL_HOST}/v1"
            self._base_url = check_base_url(base_url, allow_insecure_http=allow_insecure_http)
            self._api_key = check_key(api_key, self._base_url)
        else:
            _check_client(client, base_url=base_url, api_key=api_key, http_client=http_client)
            self._base_url = str(client.base_url)
            self._api_key = str(getattr(client, "api_key", ""))
        self._place = ProviderInfo(self._base_url.rstrip("/"), _identity(self._base_url, self._api_key), validates=True)

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
        """What is known of the server and the model; the first replies add to it."""
        dimensions = self._expected
        if dimensions is None and self._place.host == OFFICIAL_HOST:
            # elsewhere a well-known name may stand for any model
            dimensions = models.lookup(self._model).dimensions
        return replace(self._place, dimensions=dimensions, encoding_format=_ENCODINGS[self._encoding])

    async def embed(self, texts: Sequence[str]) -> Reply:
        """Send one request and return its validated reply.

        Raises:
            ProviderError: It failed; nothing of its reply is used. The connection is closed or clean.
        """
        client = await self._client()
        try:
            async with client.room, asyncio.timeout(self._timeout):
                return await self._embed(client, texts)
        except TimeoutError:
            raise TransportError(f"no whole answer within {self._timeout:g} s", timed_out=True) from None

    async def _embed(self, client: _Client, texts: Sequence[str]) -> Reply:
        first = self._encoding
        for encoding in range(first, len(_ENCODINGS)):
            try:
                reply = await self._attempt(client, texts, _ENCODINGS[encoding])
            except ProviderError as error:
                error.requests = encoding - first + 1
                is_about_it = isinstance(error, BadRequestError) and _blames_encoding(str(error))
                if not is_about_it or encoding + 1 == len(_ENCODINGS):
                    raise
            else:
                break
        if encoding > self._encoding:  # else another request has found it out already
            self._encoding = encoding
            logger.warning("%s refuses encoding_format=%r", self._place.host, _ENCODINGS[encoding - 1])
        return replace(reply, requests=encoding - first + 1) if encoding > first else reply

    async def _attempt(self, client: _Client, texts: Sequence[str], encoding: str | None) -> Reply:
        size = sum(map(len, texts))
        body = await in_thread_if(size >= INLINE_BYTES, client.http.to_json, self._fields(texts, encoding))
        decoder = Decoder(len(texts), self._expected)
        response, refused = await self._post(client, body, decoder)
        if not response.is_success:
            raise await in_thread_if(size >= INLINE_BYTES, _refusal, response, refused, texts)
        reply = await in_thread_if(decoder.size >= INLINE_BYTES, decoder.finish)
        self._expected = self._expected or reply.vectors.shape[1]
        if reply.vectors.shape[1] != self._expected:  # two first replies at once, of different sizes
            raise ProtocolError(f"expected {self._expected} dimensions, got {reply.vectors.shape[1]}")
        # Azure is asked for a deployment, not for a model
        if not (self._warned or client.is_azure) and is_other_model(self._model, reply.model):
            self._warned = True
            logger.warning("%s was asked for the model %r and answers with another one", self._place.host, self._model)
        return replace(reply, rates=rates_of(response.headers))

    def _fields(self, texts: Sequence[str], encoding: str | None) -> dict[str, Any]:
        options = {"encoding_format": encoding, "dimensions": self._asked_dimensions}
        asked = {name: value for name, value in options.items() if value is not None}
        return {"model": self._model, "input": list(texts), **asked}

    async def _post(self, client: _Client, body: bytes, decoder: Decoder) -> tuple[Any, bytes]:
        """Return the response and, if it is an error, its body; else that has gone to the decoder."""
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
        except (sdk.APIError, *client.transport_errors) as error:
            failure: Exception = _transport_error(error)
        except RuntimeError as error:
            failure = self._lost_client(client, error)
        raise failure  # out here it has no context

    def _lost_client(self, client: _Client, error: RuntimeError) -> Exception:
        """Say what a RuntimeError of httpx or asyncio is about: clients that are closed, or of another loop."""
        given = self._given_client or self._given_http_client
        if client.sdk.is_closed():
            return (RequestError if given else TransportError)("the HTTP client is closed")
        if "event loop" in str(error).lower():
            return TransportError("a connection was lost: it belongs to another event loop")
        return error

    async def _client(self) -> _Client:
        # A connection belongs to the loop it was opened on, so every loop gets its own client.
        here = os.getpid(), asyncio.get_running_loop()
        client = self._clients.get(here)
        if client is None:
            self._check_process(here[0])
            client = self._clients.setdefault(here, _Client())
        if client.sdk is None:
            async with client.building:
                if client.sdk is None:
                    await self._build(client)
        return client

    def _check_process(self, pid: int) -> None:
        given = self._given_client or self._given_http_client
        if given and any(other != pid for other, _ in self._clients):
            raise RequestError("the client that was handed in has been used before os.fork(): make one in each process")
        self._forget_closed_loops(pid)

    def _forget_closed_loops(self, pid: int) -> None:
        for other, loop in list(self._clients):
            if other == pid and loop.is_closed():
                self._clients.pop((other, loop), None)

    async def _build(self, client: _Client) -> None:
        # in a thread: importing the SDK takes 0.7 s, and reading the system's certificates 30 ms
        try:
            loaded = await asyncio.to_thread(self._load)
        except ModuleNotFoundError:  # of the SDK itself
            raise
        except Exception as error:  # an address of the user's or a proxy of the environment's that is none
            raise RequestError(f"no client can be made for {self._place.host}: {type(error).__name__}") from None
        client.adopt(*loaded, self._timeout, self._connections)
        if self._given_client is None and self._given_http_client is None:
            client.closing = _closes_with_its_loop(client)
            await anext(client.closing)

    def _load(self) -> tuple[Any, Any, Any]:
        blocks = sys.getallocatedblocks()
        openai = importlib.import_module("openai")
        http = importlib.import_module(".http", __package__)
        if gc.isenabled() and sys.getallocatedblocks() > 1.25 * blocks:
            gc.collect()  # due by its own rule, a quarter more: 60 ms, not felt here, but in the middle of a job
        if self._given_client is not None:
            return openai, http, self._given_client
        http_client = self._given_http_client or http.client_for(self._base_url, self._connections)
        key = self._fresh_key if callable(self._api_key) else self._api_key
        sdk = openai.AsyncOpenAI(api_key=key, base_url=self._base_url, http_client=http_client, max_retries=0)
        return openai, http, sdk

    async def _fresh_key(self) -> str:
        assert callable(self._api_key)
        try:
            return usable_key(await self._api_key(), self._base_url)
        except Exception as error:
            told = str(error) if isinstance(error, ConfigError) else type(error).__name__
            raise AuthenticationError(f"api_key() gave no key that can be used: {told}") from error

    async def aclose(self) -> None:
        """Close the connections of this loop; clients that were handed in stay open."""
        pid = os.getpid()
        self._forget_closed_loops(pid)
        client = self._clients.pop((pid, asyncio.get_running_loop()), None)
        if client is not None and client.closing is not None:
            await finished(client.closing.aclose())  # half closed, its connections would be lost


def _identity(base_url: str, api_key: ApiKey) -> Hashable:
    """Return what the provider counts rate limits by, as far as we can tell: address and key, which is hashed."""
    key = hashlib.sha256(api_key.encode()).digest() if isinstance(api_key, str) else api_key
    return base_url.rstrip("/"), key


def _check_client(client: Any, **others: object) -> None:
    kind = type(client).__name__
    if not (hasattr(client, "base_url") and hasattr(client, "post")):
        raise TypeError(f"client= is {kind}; it must be a ready AsyncOpenAI or AsyncAzureOpenAI")
    if not inspect.iscoroutinefunction(client.post):
        raise TypeError(f"client= is {kind}, which would block the event loop; pass an AsyncOpenAI")
    given = [f"{name}=" for name, value in others.items() if value is not None]
    if given:
        raise ConfigError(f"client= brings its own address, key and connections; leave out {' and '.join(given)}")


class _Client:
    """The SDK's client of one event loop, and what has to be known of it. Empty until it adopts one."""

    def __init__(self) -> None:
        self.building = asyncio.Lock()
        self.room = asyncio.Semaphore()
        self.sdk: Any = None
        self.closing: AsyncGenerator[None, None] | None = None

    def adopt(self, openai: Any, http: Any, sdk: Any, timeout_s: float, connections: int) -> None:
        legacy = sys.modules.get("httpx")  # loaded if the user's own client is one of the old httpx
        self.openai = openai
        self.http = http
        httpx2 = http.httpx2
        self.response_type = httpx2.Response
        self.timeout = httpx2.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_S))
        self.transport_errors: tuple[type[Exception], ...] = (
            httpx2.RequestError,
            httpx2.StreamError,
            OSError,
            *((legacy.RequestError, legacy.StreamError) if legacy else ()),
        )
        # a request that waits for a connection has not begun; a client of the user's may have few
        pool = getattr(getattr(getattr(sdk, "_client", None), "_transport", None), "_pool", None)
        self.room = asyncio.Semaphore(getattr(pool, "_max_connections", connections))
        self.is_azure = isinstance(sdk, openai.AsyncAzureOpenAI) and "/deployments" not in str(sdk.base_url)
        self.sdk = sdk

    def path(self, model: str) -> str:
        # The SDK puts the deployment into the path only for bodies that it encodes itself.
        return f"/deployments/{quote(model, safe='')}/embeddings" if self.is_azure else "/embeddings"


async def _closes_with_its_loop(client: _Client) -> AsyncGenerator[None, None]:
    # `asyncio.run` closes the async generators that are still open: so who forgets `aclose` leaks no socket.
    try:
        yield
    finally:
        await client.sdk.close()


def _refusal(response: Any, body: bytes, texts: Sequence[str]) -> ProviderError:
    """Return the error that an answer stands for, without a word of the texts or the key."""
    keys = _keys_in(response.request.headers)
    error = error_of(response.status_code, response.headers, body, keys)
    error.rates = rates_of(response.headers)
    error.args = (veil(str(error), texts, keys),)
    error.code = error.code and veil(error.code, texts, keys)
    return error


def _keys_in(headers: Mapping[str, str]) -> tuple[str, ...]:
    """Return what the request proved itself with: whichever of its keys was asked for, or rotated in."""
    bearer = headers.get("authorization", "").partition(" ")[2]
    return tuple(key for key in (bearer, headers.get("api-key", "")) if key)


def _blames_encoding(message: str) -> bool:
    message = message.lower()
    return "encoding_format" in message or "base64" in message


def _transport_error(error: BaseException) -> ProviderError:
    """Return ours, which tells the kinds of errors and their numbers: their words may hold key or address."""
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
