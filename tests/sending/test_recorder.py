"""`recorder` through `Embedder`: when an observer is called, and with what."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from asyncembed import Observer
from asyncembed.errors import AsyncEmbedError, ConfigError, ServerError
from asyncembed.metrics import RequestFinished, RequestStarted
from tests.fakes import make_embedder, texts

SECRET = "the patient's name"


class RecordingObserver:
    """An observer that keeps everything it is called with."""

    def __init__(self) -> None:
        self.started: list[RequestStarted] = []
        self.finished: list[RequestFinished] = []
        self.events: list[tuple[Any, ...]] = []

    def request(self, started: RequestStarted, /) -> Callable[[RequestFinished], object]:
        self.started.append(started)
        return self.finished.append

    def caller(self) -> object:
        task = asyncio.current_task()
        return task and task.get_name()

    def queued(self, model: str, seconds: float, /) -> None:
        self.events.append(("queued", model, seconds))

    def paused(self, model: str, seconds: float, everybody: bool, /) -> None:
        self.events.append(("paused", model, seconds, everybody))

    def cached(self, model: str, hits: int, misses: int, /) -> None:
        self.events.append(("cached", model, hits, misses))


@pytest.mark.virtual_time
async def test_the_observer_is_called_when_a_request_starts_and_when_it_ends() -> None:
    def script(number: int, _: Sequence[str]) -> AsyncEmbedError | None:
        return ServerError("HTTP 503", status=503) if number == 0 else None

    observer = RecordingObserver()
    embedder, _ = make_embedder(script, observer=observer, max_batch_size=100)
    await embedder.embed(texts(50))

    first, second = observer.started
    assert (first.model, first.address, first.inputs, first.fill) == ("fake", None, 50, 0.5)
    assert (first.is_retry, second.is_retry) == (False, True)
    assert first.callers is None
    failure, success = observer.finished
    assert [failure.elapsed_s, success.elapsed_s] == pytest.approx([1.0, 1.0])
    assert (failure.error, failure.status, failure.tokens) == ("ServerError", 503, None)
    assert (success.error, success.status, success.tokens) == (None, None, sum(map(len, texts(50))))
    assert success.dimensions == 4
    [(kind, model, seconds, everybody)] = observer.events
    assert (kind, model, everybody) == ("paused", "fake", False)
    assert seconds == embedder.stats().backoff_s


@pytest.mark.virtual_time
async def test_a_shared_request_lists_its_callers_in_order_of_arrival() -> None:
    observer = RecordingObserver()
    embedder, _ = make_embedder(observer=observer)
    async with asyncio.TaskGroup() as group:
        for name in ("x", "y", "z"):
            group.create_task(embedder.embed_one(name), name=name)

    [started] = observer.started
    assert list(started.callers or ()) == ["x", "y", "z"]
    assert [event[0] for event in observer.events] == ["queued"] * 3


@pytest.mark.virtual_time
async def test_the_observer_is_called_when_a_request_is_cancelled() -> None:
    observer = RecordingObserver()
    embedder, _ = make_embedder(observer=observer)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await embedder.embed_one("a")
    assert [finished.error for finished in observer.finished] == ["CancelledError"]


@pytest.mark.virtual_time
async def test_the_observer_never_receives_a_text() -> None:
    observer = RecordingObserver()
    embedder, _ = make_embedder(
        lambda number, _: ServerError(f"no: {SECRET}") if number < 2 else None, observer=observer
    )
    await embedder.embed([SECRET] * 2)
    await embedder.embed_one(SECRET)

    assert len(observer.finished) == 4
    received = f"{observer.started}{observer.finished}{observer.events}{embedder.stats()!r}{embedder.stats()}"
    assert SECRET not in received


class BrokenObserver(RecordingObserver):
    """Raises in one of its methods, or in the function that `request` returns."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.calls = 0
        if name == "finish":
            self.request = lambda started: self.fail  # type: ignore[method-assign,assignment]
        else:
            setattr(self, name, self.fail)

    def fail(self, *_: object) -> None:
        self.calls += 1
        raise LookupError("broken")


@pytest.mark.virtual_time
@pytest.mark.parametrize("name", ["request", "finish", "caller", "queued", "paused"])
async def test_an_observer_that_raises_fails_no_call_and_is_logged_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    observer = BrokenObserver(name)
    embedder, _ = make_embedder(lambda number, _: ServerError("HTTP 500") if number == 0 else None, observer=observer)

    with caplog.at_level(logging.ERROR, "asyncembed"):
        assert not (await embedder.embed(texts(40))).failures
        for text in ("a", "b"):
            await embedder.embed_one(text)

    assert observer.calls >= 1
    [record] = caplog.records
    assert "the observer raised" in record.message
    assert embedder.stats().requests == 4


def test_an_observer_that_lacks_a_method_is_refused() -> None:
    class Half:
        def request(self, started: RequestStarted, /) -> Callable[[RequestFinished], object]:
            raise NotImplementedError

    with pytest.raises(ConfigError, match="Half"):
        make_embedder(observer=Half())
    with pytest.raises(ConfigError):
        make_embedder(observer=RecordingObserver)  # the class, not an instance
    assert isinstance(RecordingObserver(), Observer)


@pytest.mark.virtual_time
async def test_cache_lookups_are_counted_and_reported_to_the_observer() -> None:
    observer = RecordingObserver()
    embedder, provider = make_embedder(observer=observer, cache=True)
    first = await embedder.embed(texts(50))
    second = await embedder.embed([*texts(50), "new"])

    stats = embedder.stats()
    assert stats.cache_hits == first.cache_hits + second.cache_hits == 50
    assert stats.cache_misses == first.cache_misses + second.cache_misses == 51
    assert stats.texts == sum(map(len, provider.requests)) == 51  # hits are not embedded
    lookups = [event[2:] for event in observer.events if event[0] == "cached"]
    assert [sum(counts) for counts in zip(*lookups, strict=True)] == [50, 51]
