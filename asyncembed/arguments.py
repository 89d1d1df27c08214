"""What callers hand in, checked before anything is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from . import models
from .errors import ConfigError, InputError
from .weighing import Text, check_text, unique

# Checking and comparing so many texts takes 2 ms; then it is the loop's turn.
TEXTS_A_TURN = 1_000


def check_model(model: object, dimensions: int | None, too_long: object) -> None:
    """Raise a `ConfigError` if there is no such model, or it cannot do what is asked of it."""
    if not isinstance(model, str) or not model:
        raise ConfigError("model must be the name of a model")
    if dimensions is not None:
        check_range("dimensions", dimensions, 1)
        if not models.lookup(model).shortens:
            raise ConfigError(f"dimensions={dimensions}; {model} does not shorten its vectors")
    if too_long not in ("error", "truncate", "mean"):
        raise ConfigError(f'too_long={too_long!r}; it must be "error", "truncate" or "mean"')


def check_range(name: str, value: int, least: int, most: int | None = None) -> None:
    """Raise a `ConfigError` if an option is no whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={value!r}; it must be a whole number")
    if value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"{least:,} to {most:,}"
        raise ConfigError(f"{name}={value:,}; it must be {allowed}")


def check_amount(name: str, amount: object) -> None:
    """Raise a `ConfigError` if an option is neither None nor a number of more than 0."""
    if amount is None:
        return
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not amount > 0:
        raise ConfigError(f"{name}={amount!r}; it must be a number of more than 0")


def listed(texts: Iterable[str]) -> list[str]:
    """Return the texts as a list.

    Raises:
        TypeError: It is one str, or has no order.
        ConfigError: There is none.
    """
    if isinstance(texts, (str, bytes, bytearray)):
        raise TypeError(f"texts is one {type(texts).__name__}; embed takes a list of str, embed_one a single one")
    if isinstance(texts, (set, frozenset, dict)):
        raise TypeError(f"texts is a {type(texts).__name__}, which has no order for the rows; pass a list")
    contents = list(texts)
    if not contents:
        raise ConfigError("texts is empty; embed takes at least one text")
    return contents


async def checked(contents: list[str]) -> list[Text]:
    """Return the different texts, each with its positions; gives way to others in between.

    Raises:
        InputError: The first one that cannot be embedded, with its position.
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
