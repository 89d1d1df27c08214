"""Checks API keys and addresses before anything is sent. Pure."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Awaitable, Callable
from typing import TypeAlias
from urllib.parse import urlsplit

from ..errors import ConfigError

ApiKey: TypeAlias = str | Callable[[], Awaitable[str]]


def check_key(key: ApiKey | None, base_url: str) -> ApiKey:
    """Return the key to use, or the function that will return it; raise ConfigError as `usable_key` does."""
    if callable(key):
        return key
    return usable_key(os.environ.get("OPENAI_API_KEY", "") if key is None else key, base_url)


def usable_key(key: object, base_url: str) -> str:
    """Return the key as it is sent; raise ConfigError, without showing it, unless an HTTP header can hold it."""
    if not isinstance(key, str):
        raise ConfigError(
            f"the API key is {type(key).__name__}; it must be a str, or an async function that returns one"
        )
    key = key.strip()  # a key from a file ends with a newline
    if not key:
        if _is_loopback(urlsplit(base_url).hostname):
            return "none"  # the SDK needs a key; Ollama and other local servers do not
        raise ConfigError('no API key: set OPENAI_API_KEY, pass api_key=, or use the embedded model, Embedder("local")')
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError("the API key holds spaces, control or non-ASCII characters; it is not shown here")
    return key


def check_base_url(url: str, *, allow_insecure_http: bool) -> str:
    """Return the URL if key and texts may be sent there.

    Raises:
        ConfigError: It is no http(s) URL, holds a password, or is unencrypted and on another machine.
    """
    url = url.strip()
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:  # the port is no number, or an IPv6 address is incomplete
        host = None
    if not host or parts.scheme not in ("http", "https") or not url.isprintable() or " " in url:
        raise ConfigError("base_url must start with https:// (or http:// on this machine) and name a host")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"base_url for {host} holds a user name or password; pass api_key= instead")
    if parts.scheme == "http" and not _is_loopback(host) and not allow_insecure_http:
        raise ConfigError(
            f"base_url would send key and texts in clear to {host}; use https://, "
            "or allow_insecure_http=True if that network is yours"
        )
    return url


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
