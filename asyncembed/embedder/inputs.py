"""The texts of an `embed` call: checked and deduplicated before anything is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from ..batching.texts import Text, unique
from ..errors import ConfigError, InputError
from ..types import check_text

# This many texts are checked and deduplicated in 2 ms; then other tasks may run.
TEXTS_A_TURN = 1_000


def as_list(texts: Iterable[str]) -> list[str]:
    """Return the texts as a list.

    Raises:
        TypeError: `texts` is a single str, or has no order.
        ConfigError: `texts` is empty.
    """
    if isinstance(texts, (str, bytes, bytearray)):
        raise TypeError(f"texts is one {type(texts).__name__}; embed takes a list of str, embed_one a single one")
    if isinstance(texts, (set, frozenset, dict)):
        raise TypeError(f"texts is a {type(texts).__name__}, which has no order for the rows; pass a list")
    contents = list(texts)
    if not contents:
        raise ConfigError("texts is empty; embed takes at least one text")
    return contents


async def unique_texts(contents: list[str]) -> list[Text]:
    """Check the texts and return the different ones, each with its positions. Other tasks may run in between.

    Raises:
        InputError: A text cannot be embedded; the message has its position.
    """
    found: dict[str, Text] = {}
    for start in range(0, len(contents), TEXTS_A_TURN):
        turn = contents[start : start + TEXTS_A_TURN]
        for index, content in enumerate(turn, start):
            try:
                check_text(content)
            except InputError as error:
                raise type(error)(f"text {index} {error}") from None
        unique(enumerate(turn, start), found)
        if start + TEXTS_A_TURN < len(contents):
            await asyncio.sleep(0)
    return list(found.values())
