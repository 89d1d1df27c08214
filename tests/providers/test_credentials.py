"""Keys and addresses: which ones are refused before anything is sent, and how they are sent."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from asyncembed.errors import ConfigError
from asyncembed.providers.openai import OpenAIProvider
from asyncembed.testing import EmbeddingServer

from .helpers import MODEL, plain, provider_at
from .raw_server import DIMENSIONS


@pytest.mark.parametrize("make", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_provider_cannot_be_pickled_or_copied(make: Any) -> None:
    with pytest.raises(TypeError, match="make one in each process"):
        make(provider_at("http://127.0.0.1:1/v1"))


@pytest.mark.parametrize(
    "key", ["sk canary", "sk\ncanary", "sk-\0canary", "sk-cänary", "sk-canary\u200b", b"canary", 5]
)
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        OpenAIProvider(MODEL, api_key=key)
    assert "nary" not in str(caught.value)


@pytest.mark.parametrize("key", [None, "", " \n"])
def test_without_a_key_only_an_address_on_this_machine_is_accepted(
    key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        OpenAIProvider(MODEL, api_key=key)
    for address in ("http://localhost:11434/v1", "http://127.0.0.1:1/v1", "http://[::1]:1/v1"):
        OpenAIProvider(MODEL, api_key=key, base_url=address)


async def test_blanks_and_newlines_around_a_key_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " sk-from-a-file\r\n")
    async with EmbeddingServer() as server:
        await provider_at(server.base_url, api_key=None).embed(["a"])
    assert server.requests[0].headers["authorization"] == "Bearer sk-from-a-file"


async def test_no_key_is_needed_on_this_machine() -> None:
    async with EmbeddingServer(dimensions=DIMENSIONS) as server:
        reply = await provider_at(server.base_url, api_key=None).embed(["a"])
    np.testing.assert_array_equal(reply.vectors, plain("a"))


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://example.com/v1", "in clear"),
        ("http://10.0.0.1/v1", "in clear"),
        ("http://127.0.0.1.example.com/v1", "in clear"),
        ("https://user:canary@example.com/v1", "password"),
        ("https://canary@example.com/v1", "password"),
        ("ftp://example.com", "https://"),
        ("example.com/v1", "https://"),
        ("https://", "https://"),
        ("https://example.com:canary/v1", "https://"),
        ("https://[::1/v1", "https://"),
        ("https://exa mple.com/canary", "https://"),
        ("https://example\0.com/canary", "https://"),
    ],
)
def test_an_address_that_is_malformed_or_unsafe_is_refused(url: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        OpenAIProvider(MODEL, api_key="sk-test", base_url=url)
    assert "canary" not in str(caught.value)


def test_http_beyond_this_machine_can_be_allowed() -> None:
    provider = OpenAIProvider(MODEL, api_key="sk-test", base_url="http://10.0.0.1/v1", allow_insecure_http=True)
    assert provider.info.host == "10.0.0.1"


def test_the_address_comes_from_the_caller_then_the_environment_then_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OpenAIProvider(MODEL, api_key="sk-test").info.host == "api.openai.com"
    monkeypatch.setenv("OPENAI_BASE_URL", "https://gateway.example:8443/v1")
    assert OpenAIProvider(MODEL, api_key="sk-test").info.host == "gateway.example:8443"
    assert OpenAIProvider(MODEL, api_key="sk-test", base_url="https://other.example/v1").info.host == "other.example"


def test_the_same_key_and_address_have_the_same_identity() -> None:
    one, other = (
        OpenAIProvider(MODEL, api_key="sk-test", base_url=f"https://example.com/v1{end}") for end in ("", "/")
    )
    assert one.info.identity == other.info.identity
    assert (
        one.info.identity != OpenAIProvider(MODEL, api_key="sk-else", base_url="https://example.com/v1").info.identity
    )
    assert "sk-test" not in repr(one.info.identity)
