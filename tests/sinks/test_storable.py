"""`storable`: what no store takes, whatever the store."""

from __future__ import annotations

import json

import pytest

from asyncembed.sinks.contract import MAX_ID_BYTES, why_unstorable


@pytest.mark.parametrize(
    ("key", "text", "metadata", "what"),
    [
        pytest.param("", "t", None, "id", id="an empty id"),
        pytest.param("a\0", "t", None, "id", id="NUL in the id"),
        pytest.param("a\ud800", "t", None, "id", id="half a surrogate pair in the id"),
        pytest.param("x" * (MAX_ID_BYTES + 1), "t", None, "id", id="an id too long for an index"),
        pytest.param("é" * (MAX_ID_BYTES // 2) + "x", "t", None, "id", id="an id too long in bytes, not in characters"),
        pytest.param("a", "b\0c", None, "text", id="NUL in the text"),
        pytest.param("a", "é\0c", None, "text", id="NUL in a text that is not ASCII"),
        pytest.param("a", "b\ud800", None, "text", id="half a surrogate pair in the text"),
        pytest.param("a", "t", json.dumps({"b": "\0"}), "metadata", id="NUL in the metadata"),
        pytest.param("a", "t", json.dumps({"\\\\\0": 1}), "metadata", id="NUL behind backslashes in the metadata"),
        pytest.param("a", "t", '{"b": "\ud800"}', "metadata", id="half a surrogate pair in the metadata"),
    ],
)
def test_what_no_store_takes_is_told_without_showing_it(key: str, text: str, metadata: str | None, what: str) -> None:
    reason = why_unstorable(key, text, metadata)
    assert reason is not None
    assert what in reason.split(":")[0]
    assert "\0" not in reason
    assert "\ud800" not in reason


@pytest.mark.parametrize(
    ("key", "text", "metadata"),
    [
        pytest.param("x" * MAX_ID_BYTES, "t", None, id="the longest id"),
        pytest.param("é" * (MAX_ID_BYTES // 2), "t", None, id="the longest id in bytes"),
        pytest.param("a", "\x01 \N{GRINNING FACE} <|endoftext|>", None, id="odd characters"),
        pytest.param("a", "t", json.dumps({"b": "\\u0000"}), id="a text that only spells NUL"),
        pytest.param("a", "t", json.dumps({"b": "\N{GRINNING FACE}"}), id="a whole escaped surrogate pair"),
    ],
)
def test_what_every_store_takes_passes(key: str, text: str, metadata: str | None) -> None:
    assert why_unstorable(key, text, metadata) is None
