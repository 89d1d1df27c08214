"""Removes quoted texts and keys from a server's messages. Pure."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

HIDDEN = "***"

# So many letters and digits in a row, shared by a message and a text, are a quotation and no chance: the longest
# word of the messages in faults.md is `credit_balance_exhausted`. Any such run holds one of the aligned pieces of half
# its length that are looked for.
_QUOTED = 16
# Of Chinese, Japanese and Korean, where that is a sentence.
_QUOTED_WIDE = 6
_WIDE = "\u2e80"
# Where a message is cut off, or shortens what it quotes, the beginning of a quotation.
_QUOTED_AT_THE_END = 6
_CUT = re.compile(r"\.{3}|…")
# Servers echo a key as its first and last characters with stars in between.
_SHOWN_OF_A_KEY = 6

_NO_LETTERS = re.compile(r"[\W_]+")
# One character, or a run of escapes, which is hidden whole: servers spell what is not ASCII, or not theirs, as JSON,
# Python, URLs or HTML do.
_SPELLING = re.compile(
    r"\\+[nrt]|(?:\\+u[0-9a-f]{4})+|(?:\\+x[0-9a-f]{2})+|(?:%[0-9a-f]{2})+|(?:&(?:#x?[0-9a-f]{1,8}|[a-z]{2,31});)+|.",
    re.IGNORECASE | re.DOTALL,
)


def veil(message: str, texts: Sequence[str], keys: Sequence[str]) -> str:
    """Return a server's message without what it quotes of the texts that were sent, and without parts of the keys.

    Compared are letters and digits alone, since messages quote with their own blanks and escapes. A quotation is
    `_QUOTED` of them in a row, or a whole text of at least four. Costs one pass over the texts.
    """
    for key in keys:
        if len(key) >= 2 * _SHOWN_OF_A_KEY:
            message = re.sub(rf"\S*{re.escape(key[:_SHOWN_OF_A_KEY])}\S*", HIDDEN, message)
    spelled = _spelled(message)
    places = [place for character, place in spelled for _ in character]
    letters = "".join(character for character, _ in spelled)
    cuts = [sum(start < match.start() for start, _ in places) for match in _CUT.finditer(message)]
    hidden: set[int] = set()
    for text in texts:
        for start, end in _quotations(letters, _NO_LETTERS.sub("", text).lower(), cuts):
            if start < end:
                hidden.update(range(places[start][0], places[end - 1][1]))
    return _without(message, hidden)


def _spelled(message: str) -> list[tuple[str, tuple[int, int]]]:
    """Return the message's letters and digits in lower case, those in escapes too, each with where it stands."""
    return [
        (character.lower(), match.span())
        for match in _SPELLING.finditer(message)
        for character in (match[0] if len(match[0]) == 1 else _unescaped(match[0]))
        if character.isalnum()
    ]


def _unescaped(run: str) -> str:
    if run.startswith("&"):
        return html.unescape(run)
    digits = re.findall(r"u([0-9a-f]{4})|[x%]([0-9a-f]{2})", run, re.IGNORECASE)
    if digits and digits[0][0]:
        return bytes.fromhex("".join(wide for wide, _ in digits)).decode("utf-16-be", "replace")
    return bytes.fromhex("".join(byte for _, byte in digits)).decode("utf-8", "replace")


def _quotations(letters: str, text: str, cuts: Sequence[int]) -> list[tuple[int, int]]:
    """Return where `letters` quotes `text`: pairs of start and end. At the cuts a quotation may break off."""
    quoted = _QUOTED_WIDE if sum(letter >= _WIDE for letter in text[:64]) > len(text[:64]) / 2 else _QUOTED
    if 4 <= len(text) <= quoted:
        return [(match.start(), match.end()) for match in re.finditer(re.escape(text), letters)]
    half = quoted // 2
    near = {
        start
        for piece in range(0, len(letters) - half + 1, half)
        if letters[piece : piece + half] in text
        for start in range(max(0, piece - half), piece + 1)
    }
    quotations = [(start, start + quoted) for start in near if letters[start : start + quoted] in text]
    quotations = [(start, end) for start, end in quotations if end <= len(letters)]
    for cut in cuts:
        lengths = range(min(cut, quoted), min(quoted, _QUOTED_AT_THE_END) - 1, -1)
        length = next((length for length in lengths if letters[cut - length : cut] in text), 0)
        quotations.append((cut - length, cut))
    return quotations


def _without(message: str, hidden: set[int]) -> str:
    shown = []
    for place, character in enumerate(message):
        if place not in hidden:
            shown.append(character)
        elif place - 1 not in hidden:
            shown.append(HIDDEN)
    return "".join(shown)
