"""Removes keys from a server's messages, and withholds a message that quotes a text. Pure."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

WITHHELD = "message withheld: it quotes an input"

# A message quotes a text if they share this many letters and digits in a row. Few words in servers' messages are as
# long; the longest is `credit_balance_exhausted`.
_QUOTED = 16
_QUOTED_WIDE = 6  # the same for Chinese, Japanese and Korean, where six characters are a sentence
_WIDE = "\u2e80"
_QUOTED_BEFORE_A_CUT = 6  # the same just before "…" or "...", where a message is cut off
_CUT = re.compile(r"\.{3}|…")
_SHORTEST_TEXT = 4  # shorter texts occur in too many messages by chance
_SHOWN_OF_A_KEY = 6  # servers echo a key as its first and last characters with stars between them

_NO_LETTERS = re.compile(r"[\W_]+")
_BLANK_ESCAPES = re.compile(r"\\+[nrt]")
_UTF16_ESCAPES = re.compile(r"(?:\\+u[0-9a-f]{4})+", re.IGNORECASE)
_UTF8_ESCAPES = re.compile(r"(?:(?:\\+x|%)[0-9a-f]{2})+", re.IGNORECASE)


def redact(message: str, texts: Sequence[str], keys: Sequence[str]) -> str:
    """Return the message without parts of the keys, or `WITHHELD` if it quotes one of the texts.

    Only letters and digits are compared, because servers change blanks and quotation marks.
    """
    if quotes(message, texts):
        return WITHHELD
    for key in keys:
        if len(key) >= 2 * _SHOWN_OF_A_KEY:
            message = re.sub(rf"\S*{re.escape(key[:_SHOWN_OF_A_KEY])}\S*", "***", message)
    return message


def quotes(message: str, texts: Sequence[str]) -> bool:
    """Return whether the message has a whole text, or a long enough part of one, in any spelling."""
    spellings = []
    for spelling in {message, _unescaped(message)}:
        parts = [_letters(part) for part in _CUT.split(spelling)]
        ends = [part[-_QUOTED_BEFORE_A_CUT:] for part in parts[:-1] if len(part) >= _QUOTED_BEFORE_A_CUT]
        spellings.append(("".join(parts), ends))
    return any(_is_quoted(text, *spelling) for text in map(_letters, texts) for spelling in spellings)


def _is_quoted(text: str, letters: str, ends: Sequence[str]) -> bool:
    if len(text) < _SHORTEST_TEXT:
        return False
    is_wide = sum(letter >= _WIDE for letter in text[:64]) > len(text[:64]) / 2
    size = _QUOTED_WIDE if is_wide else _QUOTED
    if len(text) <= size:
        return text in letters
    half = size // 2  # any `size` letters in a row hold a whole one of these pieces
    pieces = [start for start in range(0, len(letters), half) if letters[start : start + half] in text]
    windows = (letters[start : start + size] for piece in pieces for start in range(max(0, piece - half), piece + 1))
    return any(len(window) == size and window in text for window in windows) or any(end in text for end in ends)


def _letters(text: str) -> str:
    return _NO_LETTERS.sub("", text).lower()


def _unescaped(message: str) -> str:
    """Decode the ways in which servers spell characters: those of HTML, JSON, Python and URLs."""
    message = _BLANK_ESCAPES.sub(" ", html.unescape(message))
    message = _UTF16_ESCAPES.sub(lambda match: _decoded(match[0], "utf-16-be"), message)
    return _UTF8_ESCAPES.sub(lambda match: _decoded(match[0], "utf-8"), message)


def _decoded(escapes: str, encoding: str) -> str:
    return bytes.fromhex(re.sub(r"\\+[ux]|%", "", escapes, flags=re.IGNORECASE)).decode(encoding, "replace")
