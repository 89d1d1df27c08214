"""`validation` through `ingest`: bad records fail alone, before anything is paid for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from asyncembed import Record, ingest
from asyncembed.errors import AsyncEmbedError, BadRequestError, InvalidRecordError, InvalidTextError
from tests.pipeline.ingests import LimitedSink, assert_stored, make
from tests.stores import OpenStore


async def test_bad_records_fail_alone_with_their_ids_and_reasons(open_store: OpenStore) -> None:
    embedder, _ = make(lambda _, texts: BadRequestError("HTTP 400", status=400) if "poison" in texts else None)
    unreadable = InvalidRecordError("line 7 of x.jsonl is broken")
    mixed: list[Any] = [
        Record("good 1", "fine"),
        Record("empty", ""),
        Record("none", None),  # type: ignore[arg-type]
        Record("number", 5),  # type: ignore[arg-type]
        Record("surrogate", "a\ud800"),
        Record("nul", "a\0b"),
        Record("n\0l", "text"),
        Record("metadata", "text", {"a": object()}),
        Record("nan", "text", {"a": float("nan")}),
        Record(1.5, "a float for an id"),  # type: ignore[arg-type]
        {"text": "no id"},
        {"id": "no text"},
        None,
        unreadable,
        Record("poison", "poison"),
        Record("good 2", "also fine"),
    ]
    async with open_store() as sink:
        report = await ingest(mixed, embedder, sink)

        assert report.success_count == 2
        assert report.failed_ids == [
            "empty", "none", "number", "surrogate", "nul", "n\0l", "metadata", "nan",
            None, None, None, None, None, "poison",
        ]  # fmt: skip
        assert [failure.index for failure in report.failures] == list(range(1, 15))
        assert report.failures[12].error is unreadable
        assert all(isinstance(failure.error, AsyncEmbedError) for failure in report.failures)
        assert isinstance(report.failures[0].error, InvalidTextError)
        assert report.success_count + report.failed_count + report.skipped_count == report.seen == len(mixed)
        await assert_stored(sink, {"good 1": "fine", "good 2": "also fine"})


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(Record("x" * 2_001, "bad"), id="an id too long for an index"),
        pytest.param(Record("b\ud800d", "bad"), id="half a surrogate pair in the id"),
        pytest.param(Record("b\0d", "bad"), id="NUL in the id"),
        pytest.param(Record(10**4_400, "bad"), id="a number that has no str"),
        pytest.param(Record("bad", "b\0d"), id="NUL in the text"),
        pytest.param(Record("bad", "bad", {"a": ["\0"]}), id="NUL in the metadata"),
        pytest.param(Record("bad", "bad", {"\ud800": 1}), id="half a surrogate pair in the metadata"),
    ],
)
async def test_a_record_that_no_store_can_hold_is_not_paid_for(open_store: OpenStore, bad: Record) -> None:
    embedder, provider = make()
    async with open_store() as sink:
        report = await ingest([Record("good", "fine"), bad], embedder, sink)

        assert (report.success_count, report.failed_count) == (1, 1)
        assert isinstance(report.failures[0].error, InvalidRecordError)
        assert bad.text not in str(report.failures[0].error)
        assert provider.requests == [["fine"]]


async def test_metadata_that_only_spell_nul_are_stored(open_store: OpenStore) -> None:
    embedder, _ = make()
    async with open_store() as sink:
        await ingest([Record("a", "text", {"regex": r"[^\u0000]"})], embedder, sink)
        (hit,) = await sink.search(await embedder.embed_one("text"), k=1)
        assert hit.metadata == {"regex": r"[^\u0000]"}


class UnreadableMapping(Mapping[str, Any]):
    """A mapping whose values cannot be read."""

    def __getitem__(self, key: str) -> Any:
        raise ConnectionError("the row is gone: secret text")

    def __iter__(self) -> Iterator[str]:
        return iter(("id", "text"))

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param({"id": 1, "title": np.array([1, 2]), "content": "x"}, id="an array for a title"),
        pytest.param({"id": 1, "title": 0, "content": "x"}, id="a number for a title"),
        pytest.param(UnreadableMapping(), id="a mapping that raises"),
        pytest.param(dict, id="a class"),
    ],
)
async def test_a_record_that_cannot_be_read_fails_alone(open_store: OpenStore, odd: Any) -> None:
    embedder, _ = make()
    async with open_store() as sink:
        report = await ingest([("a", "one"), odd, ("b", "two")], embedder, sink)
        assert (report.success_count, report.failed_count) == (2, 1)
        assert report.failures[0].index == 1
        assert "secret" not in str(report.failures[0].error)
    embedder, _ = make()
    assert [item.error is None async for item in embedder.stream([("a", "one"), odd, ("b", "two")])] == [
        True,
        False,
        True,
    ]


class WatchedMetadata(Mapping[str, int]):
    """Metadata that record which thread reads them."""

    def __init__(self, readers: list[int]) -> None:
        self._readers = readers

    def __getitem__(self, key: str) -> int:
        return {"a": 1}[key]

    def __iter__(self) -> Iterator[str]:
        self._readers.append(threading.get_ident())
        return iter("a")

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(("turn_s", "in_threads"), [(60.0, 0), (0.0, 92)], ids=["quick records", "slow records"])
async def test_only_records_that_are_slow_to_check_are_checked_in_a_thread(
    monkeypatch: pytest.MonkeyPatch, turn_s: float, in_threads: int
) -> None:
    monkeypatch.setattr("asyncembed.pipeline.ingestion.TURN_S", turn_s)
    readers: list[int] = []
    embedder, _ = make()
    sink = LimitedSink(batches=10)
    report = await ingest(
        [Record(number, f"text {number}", WatchedMetadata(readers)) for number in range(100)], embedder, sink
    )
    assert report.success_count == 100
    assert len({row.metadata for row in sink.rows}) == 1
    assert [row.id for row in sink.rows] == list(range(100))
    elsewhere = sum(reader != threading.get_ident() for reader in readers)
    assert elsewhere == in_threads  # the first eight are checked before their time is known
