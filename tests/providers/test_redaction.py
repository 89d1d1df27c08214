"""Messages of a server that quote texts or keys."""

from __future__ import annotations

import json
from urllib.parse import quote

import pytest

from asyncembed.providers.redaction import WITHHELD, redact

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
def test_a_message_that_quotes_a_text_is_withheld(quoted: str) -> None:
    assert redact(f"HTTP 400: cannot embed {quoted} (input 3, limit 8192)", ["another", TEXT], ()) == WITHHELD


def test_a_quotation_is_found_at_any_place_in_the_text_and_in_the_message() -> None:
    text = "ab" * 50 + "the secret of the house" + "ba" * 50
    for before in range(20):
        assert redact("x" * before + " the secret of the house.", [text], ()) == WITHHELD


def test_a_message_with_a_whole_short_text_is_withheld() -> None:
    assert redact("invalid input: 'hunter2'", ["hunter2"], ()) == WITHHELD


def test_the_beginning_of_a_quotation_that_is_cut_off_is_found() -> None:
    assert redact("cannot embed: 'Dear Doc…", [TEXT], ()) == WITHHELD


def test_a_message_that_quotes_nothing_is_kept() -> None:
    message = "HTTP 400: This model's maximum context length is 8192 tokens, however you requested 8781 tokens"
    assert redact(message, ["The maximum length of a whale is 33 metres, however", "no"], ()) == message


def test_a_short_text_does_not_withhold_messages_that_it_is_not_in() -> None:
    assert redact("HTTP 500: internal error, see the documentation…", ["hunter2", "yes", ""], ()).startswith("HTTP 500")


def test_the_ends_of_a_key_that_a_message_shows_are_hidden() -> None:
    key = "canaryabcdefghijklmnopqrstuvwxyz"
    message = redact("Incorrect API key provided: canaryab****wxyz. See the site.", [], [key])
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
def test_a_quotation_is_found_in_any_spelling(quoted: str) -> None:
    assert redact(f"HTTP 400: cannot embed {quoted}", ["Schröder über Zürich und Köln"], ()) == WITHHELD


@pytest.mark.parametrize("text", [r"\nu and \tau are \rho", "100%ab and 50%cd of 20%ef"])
def test_a_text_that_looks_like_escapes_is_found_as_it_is(text: str) -> None:
    assert redact(f"cannot embed {text}", [text], ()) == WITHHELD


TEXT_IN_SIGNS = "患者张伟的诊断结果是晚期肝癌需要立即治疗"


@pytest.mark.parametrize("quoted", [TEXT_IN_SIGNS[4:12], json.dumps(TEXT_IN_SIGNS[4:12]), quote(TEXT_IN_SIGNS[4:12])])
def test_in_a_script_without_letters_a_few_signs_are_a_quotation(quoted: str) -> None:
    assert redact(f"invalid input '{quoted}'", [TEXT_IN_SIGNS], ()) == WITHHELD
