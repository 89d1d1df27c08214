"""What any store can hold: the same record is refused by every store, and before anything is paid for it. Pure.

PostgreSQL holds no NUL in text or JSON, and no key of more than 2,704 bytes in a B-tree. Nobody holds half a
surrogate pair, which is no UTF-8.
"""

from __future__ import annotations

import re

# PostgreSQL's nbtree.h, BTMaxItemSize: a third of an 8 KiB page, 2,704 bytes; the key is id and model together.
MAX_ID_BYTES = 2_000
MAX_MODEL_BYTES = 500

_ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def why_unstorable(key: str, text: str, metadata: str | None) -> str | None:
    """Return why no store takes a record, None if all do.

    Args:
        key: `str(id)`.
        text: What was, or will be, embedded.
        metadata: JSON text, or None.
    """
    if not key or not has_bytes(key) or len(key.encode()) > MAX_ID_BYTES:
        return f"has no usable id: 1 to {MAX_ID_BYTES:,} bytes of UTF-8 without NUL"
    if not has_bytes(text):
        return "has a text with NUL or half a surrogate pair in it, which stores cannot hold; remove it"
    if metadata is not None and (not has_bytes(metadata) or ("\\u0000" in metadata and _ESCAPED_NUL.search(metadata))):
        return "has metadata with NUL or half a surrogate pair in it, which stores cannot hold; remove it"
    return None


def has_bytes(text: str) -> bool:
    """Return whether the text is UTF-8 without NUL, which is what a store calls a text."""
    if "\x00" in text:
        return False
    if text.isascii():  # known, not looked for
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
