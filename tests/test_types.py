"""`types`: the checks of texts, and the address of a provider."""

from __future__ import annotations

import pytest

from asyncembed.errors import InputError, InvalidTextError, WrongTypeError
from asyncembed.types import ProviderInfo, check_text


@pytest.mark.parametrize("text", [None, 5, 0.5, float("nan"), b"bytes", ["a"], {}, object()], ids=type)
def test_a_value_that_is_not_a_str_is_refused_with_its_type(text: object) -> None:
    with pytest.raises(WrongTypeError, match=f"is {type(text).__name__}; a text is a str") as caught:
        check_text(text)
    assert isinstance(caught.value, (TypeError, InputError))


def test_an_empty_text_and_a_lone_surrogate_are_refused_without_showing_the_text() -> None:
    with pytest.raises(InvalidTextError, match="is empty"):
        check_text("")
    with pytest.raises(InvalidTextError, match="lone surrogate at character 6") as caught:
        check_text("canary\ud800")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("base_url", "host", "address"),
    [
        (None, None, None),
        ("https://api.example/v1", "api.example", ("api.example", 443)),
        ("http://localhost/v1", "localhost", ("localhost", 80)),
        ("https://user:password@api.example:8443/v1", "api.example:8443", ("api.example", 8443)),
    ],
)
def test_the_host_of_a_provider_has_no_user_and_no_password(
    base_url: str | None, host: str | None, address: tuple[str, int] | None
) -> None:
    info = ProviderInfo(base_url)
    assert (info.host, info.address) == (host, address)
