"""Keys, addresses, and what messages may show."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

from asyncembed.errors import ConfigError
from asyncembed.providers.openai import OpenAIProvider
from asyncembed.providers.redaction import veil
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
def test_a_key_that_cannot_stand_in_a_header_is_refused_unseen(key: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        OpenAIProvider(MODEL, api_key=key)
    assert "nary" not in str(caught.value)


@pytest.mark.parametrize("key", [None, "", " \n"])
def test_without_a_key_nothing_is_made_but_for_this_machine(key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        OpenAIProvider(MODEL, api_key=key)
    for address in ("http://localhost:11434/v1", "http://127.0.0.1:1/v1", "http://[::1]:1/v1"):
        OpenAIProvider(MODEL, api_key=key, base_url=address)


async def test_a_newline_around_a_key_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_an_address_that_is_none_or_is_unsafe_is_refused(url: str, why: str) -> None:
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


def test_one_key_and_address_are_one_identity_whoever_writes_them() -> None:
    one, other = (
        OpenAIProvider(MODEL, api_key="sk-test", base_url=f"https://example.com/v1{end}") for end in ("", "/")
    )
    assert one.info.identity == other.info.identity
    assert (
        one.info.identity != OpenAIProvider(MODEL, api_key="sk-else", base_url="https://example.com/v1").info.identity
    )
    assert "sk-test" not in repr(one.info.identity)


# ---- the veil ----

TEXT = "Dear Doctor,\n\tthe patient's name is Joséphine Müller-Lüdenscheidt, born 1921-05-30. " * 3


@pytest.mark.parametrize(
    "quoted",
    [
        TEXT,
        repr(TEXT),
        " ".join(TEXT.split()),
        TEXT[40:120],
        TEXT[5:30] + " … " + TEXT[60:100],
        TEXT.replace(" ", "  "),
    ],
    ids=["as it is", "repr", "on one line", "a part", "two parts", "spaced"],
)
def test_what_a_message_quotes_of_a_text_is_hidden(quoted: str) -> None:
    message = veil(f"HTTP 400: cannot embed {quoted} (input 3, limit 8192)", ["another", TEXT], ())
    assert "Müller" not in message
    assert "1921" not in message
    assert message.startswith("HTTP 400: cannot embed ")
    assert message.endswith("(input 3, limit 8192)")
    assert "***" in message


def test_a_quotation_is_found_wherever_it_begins_and_however_often_its_letters_come() -> None:
    text = "ab" * 50 + "the secret of the house" + "ba" * 50
    for before in range(20):
        message = veil("x" * before + " the secret of the house.", [text], ())
        assert "secret" not in message


def test_a_short_text_is_hidden_whole() -> None:
    assert veil("invalid input: 'hunter2'", ["hunter2"], ()) == "invalid input: '***'"


def test_the_beginning_of_a_quotation_at_the_end_of_a_cut_message_is_hidden() -> None:
    assert veil("cannot embed: 'Dear Doc…", [TEXT], ()).startswith("cannot embed: '***")


def test_a_message_that_quotes_nothing_is_kept() -> None:
    message = "HTTP 400: This model's maximum context length is 8192 tokens, however you requested 8781 tokens"
    assert veil(message, ["The maximum length of a whale is 33 metres, however", "no"], ()) == message


def test_the_ends_of_a_key_that_a_message_shows_are_hidden() -> None:
    key = "canaryabcdefghijklmnopqrstuvwxyz"
    message = veil("Incorrect API key provided: canaryab****wxyz. See the site.", [], [key])
    assert message == "Incorrect API key provided: *** See the site."


@pytest.mark.parametrize(
    "quoted",
    [
        pytest.param(json.dumps("Schröder über Zürich und Köln"), id="JSON"),
        pytest.param(str("Schröder über Zürich und Köln".encode()), id="bytes of Python"),
        pytest.param(quote("Schröder über Zürich und Köln"), id="a URL"),
        pytest.param("Schr&ouml;der &#252;ber Z&#xfc;rich und K&ouml;ln", id="HTML"),
        pytest.param("SCHRÖDER ÜBER ZÜRICH UND KÖLN", id="upper case"),
        pytest.param("Schröder über... (29 characters)", id="shortened"),
    ],
)
def test_a_quotation_is_found_however_it_is_spelled(quoted: str) -> None:
    message = veil(f"HTTP 400: cannot embed {quoted}", ["Schröder über Zürich und Köln"], ())
    assert message.startswith("HTTP 400: cannot embed ")
    for word in ("schr", "ber", "rich", "ln"):
        assert word not in message.removeprefix("HTTP 400: cannot embed ").lower()


def test_of_a_script_without_letters_a_few_signs_are_a_quotation() -> None:
    text = "患者张伟的诊断结果是晚期肝癌需要立即治疗"
    assert veil(f"invalid input '{text[4:12]}'", [text], ()) == "invalid input '***'"
