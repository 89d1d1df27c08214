"""The behaviour that all sinks share."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from asyncembed.errors import ConfigError, RowRefusedError, SinkConfigError
from asyncembed.sinks.contract import MAX_ID_BYTES, why_unstorable

from .sink_rows import MODEL, hashes, nearest, row, rows, vec

pytestmark = pytest.mark.any_loop

OpenStore = Callable[..., Any]


async def test_a_written_row_is_found_with_its_text_and_metadata(open_store: OpenStore) -> None:
    async with open_store() as sink:
        await sink.prepare(MODEL, 3)
        refused = await sink.write(
            MODEL, [row("a", vec(1, 0, 0), "Zürich\n😀\\", '{"page": 3}'), row("b", vec(0, 1, 0))]
        )
        hits = await sink.search(vec(2, 0, 0), k=1)
    assert refused == {}
    assert [(hit.id, hit.score, hit.text, hit.metadata) for hit in hits] == [("a", 1.0, "Zürich\n😀\\", {"page": 3})]


async def test_rows_outlive_the_sink_that_wrote_them(open_store: OpenStore) -> None:
    async with open_store() as sink:
        await sink.write(MODEL, rows(3))
    async with open_store() as sink:
        assert await sink.count() == 3


async def test_a_sink_works_without_async_with_and_after_it_was_closed(open_store: OpenStore) -> None:
    sink = open_store()
    await sink.write(MODEL, rows(2))
    await sink.aclose()
    await sink.aclose()
    assert await sink.count() == 2
    await sink.aclose()


def test_one_sink_serves_two_event_loops_one_after_the_other(open_store: OpenStore) -> None:
    sink = open_store()
    stored = rows(4)

    async def store(part: list[Any]) -> int:
        await sink.write(MODEL, part)
        count: int = await sink.count()
        return count

    assert asyncio.run(store(stored[:2])) == 2
    assert asyncio.run(store(stored[2:])) == 4
    asyncio.run(sink.aclose())


async def test_writing_nothing_does_nothing(open_store: OpenStore) -> None:
    async with open_store() as sink:
        assert await sink.write(MODEL, []) == {}
        with pytest.raises(SinkConfigError, match="ingest into it first"):
            await sink.count()


# ---- identity ----


async def test_an_id_is_stored_as_text_whether_it_was_an_int_a_str_or_a_uuid(open_store: OpenStore) -> None:
    uuid = UUID("12345678-1234-5678-1234-567812345678")
    async with open_store() as sink:
        await sink.write(MODEL, [row(5), row(uuid), row(2**70)])
        await sink.write(MODEL, [row("5"), row(str(uuid)), row(np.int64(7))])
        assert [id async for id in sink.ids(MODEL)] == sorted(["5", str(uuid), str(2**70), "7"])


async def test_existing_returns_the_ids_as_they_were_given(open_store: OpenStore) -> None:
    uuid = UUID("12345678-1234-5678-1234-567812345678")
    stored = [row(5), row(uuid), row("c")]
    async with open_store() as sink:
        await sink.write(MODEL, stored)
        found = await sink.existing(MODEL, hashes([*stored, row("d")]))
    assert found == {5, uuid, "c"}


async def test_a_row_with_a_changed_text_does_not_exist(open_store: OpenStore) -> None:
    async with open_store() as sink:
        await sink.write(MODEL, [row("a"), row("b")])
        assert await sink.existing(MODEL, hashes([row("a", text="changed"), row("b")])) == {"b"}


async def test_a_row_stored_for_one_model_does_not_exist_for_another(open_store: OpenStore) -> None:
    async with open_store() as sink:
        await sink.write(MODEL, [row("a")])
        assert await sink.existing("model-b", hashes([row("a")])) == set()


async def test_existing_takes_far_more_ids_than_a_statement_takes_parameters(open_store: OpenStore) -> None:
    stored = rows(3)
    wanted = hashes(stored) | {f"other-{number}": "0" for number in range(40_000)}
    async with open_store() as sink:
        await sink.write(MODEL, stored)
        assert await sink.existing(MODEL, wanted) == {one.id for one in stored}


async def test_ids_that_no_store_can_hold_do_not_exist(open_store: OpenStore) -> None:
    async with open_store() as sink:
        await sink.write(MODEL, [row("a")])
        assert await sink.existing(MODEL, {"a\x00b": "0", "\ud800": "0"}) == set()


async def test_writing_a_row_again_replaces_it(open_store: OpenStore) -> None:
    async with open_store() as sink:
        await sink.write(MODEL, [row("a", vec(1, 0, 0), "old")])
        await sink.write(MODEL, [row("a", vec(0, 1, 0), "new", '{"v": 2}')])
        hits = await sink.search(vec(0, 1, 0))
        assert [(hit.id, hit.score, hit.text, hit.metadata) for hit in hits] == [("a", 1.0, "new", {"v": 2})]


async def test_the_last_of_several_rows_with_one_key_wins(open_store: OpenStore) -> None:
    async with open_store() as sink:
        await sink.write(MODEL, [row(1, text="first"), row("b"), row("1", text="last")])
        hits = await sink.search(vec(1, 2, 3))
    assert [(hit.id, hit.text) for hit in hits] == [("1", "last"), ("b", "text of b")]


# ---- records that no store takes ----


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
def test_the_reason_why_a_record_is_unstorable_does_not_show_it(
    key: str, text: str, metadata: str | None, what: str
) -> None:
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
def test_unusual_records_that_every_store_takes_are_accepted(key: str, text: str, metadata: str | None) -> None:
    assert why_unstorable(key, text, metadata) is None


# ---- rows and sizes that do not fit ----


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(row("bad", vec(1, np.nan, 3)), id="NaN"),
        pytest.param(row("bad", vec(1, np.inf, 3)), id="infinity"),
        pytest.param(row("bad", vec(1, 2)), id="another size"),
        pytest.param(row("bad", text="a\x00b"), id="NUL in the text"),
        pytest.param(row("bad", text="a\ud800b"), id="half a surrogate pair in the text"),
        pytest.param(row("b\x00d"), id="NUL in the id"),
        pytest.param(row("b\ud800d"), id="half a surrogate pair in the id"),
        pytest.param(row("x" * 2_001), id="an id too long for an index"),
        pytest.param(row(""), id="an empty id"),
        pytest.param(row("bad", metadata='{"a": "x\x00"}'), id="NUL in the metadata"),
        pytest.param(row("bad", metadata='{"a": "\\\\\\u0000"}'), id="escaped NUL in the metadata"),
        pytest.param(row("bad", metadata='{"a": "\\ud800"}'), id="half an escaped surrogate pair in the metadata"),
        pytest.param(row("bad", metadata='{"a": NaN}'), id="NaN in the metadata"),
        pytest.param(row("bad", metadata="{'a': 1}"), id="metadata that is no JSON"),
    ],
)
async def test_a_row_that_cannot_be_stored_is_refused_alone(open_store: OpenStore, bad: Any) -> None:
    async with open_store() as sink:
        refused = await sink.write(MODEL, [row("a"), bad, row("z")])
        assert list(refused) == [bad.id]
        assert isinstance(refused[bad.id], RowRefusedError)
        assert bad.text not in str(refused[bad.id])
        assert [id async for id in sink.ids(MODEL)] == ["a", "z"]


async def test_ids_and_models_of_the_greatest_length_are_stored(open_store: OpenStore) -> None:
    noise = np.random.default_rng(0).bytes(1_250).hex()  # which an index cannot compress
    async with open_store() as sink:
        await sink.prepare(noise[:500], 3)
        assert await sink.write(noise[:500], [row(noise[500:])]) == {}
        assert [id async for id in sink.ids(noise[:500])] == [noise[500:]]


async def test_metadata_that_only_look_like_an_escaped_nul_are_stored(open_store: OpenStore) -> None:
    async with open_store() as sink:
        assert await sink.write(MODEL, [row("a", metadata='{"path": "\\\\u0000", "e": "\\u00e9"}')]) == {}
        (hit,) = await sink.search(vec(1, 2, 3))
    assert hit.metadata == {"path": "\\u0000", "e": "é"}


async def test_the_largest_and_smallest_numbers_of_float32_are_stored_and_found(open_store: OpenStore) -> None:
    huge = vec(3e38, 3e38, -3e38)
    async with open_store() as sink:
        assert await sink.write(MODEL, [row("huge", huge), row("tiny", vec(1e-38, 1e-38, 1e-38))]) == {}
        hits = await sink.search(vec(1, 1, 1))
    assert [hit.id for hit in hits] == ["tiny", "huge"]
    assert [hit.score for hit in hits] == pytest.approx([1.0, 1 / 3])


async def test_another_size_for_a_stored_model_is_refused_before_anything_is_paid(open_store: OpenStore) -> None:
    async with open_store() as sink:
        await sink.prepare(MODEL, 1_536)
        await sink.write(MODEL, rows(1, dimensions=1_536))
        with pytest.raises(SinkConfigError, match=r"1536 dimensions for model 'model-a', and these have 256"):
            await sink.prepare(MODEL, 256)
        with pytest.raises(SinkConfigError, match=r"1536.*256"):
            await sink.write(MODEL, rows(2, dimensions=256))
        assert await sink.count() == 1


async def test_the_first_vector_decides_the_size_if_prepare_was_given_none(open_store: OpenStore) -> None:
    async with open_store() as sink:
        await sink.prepare(MODEL, None)
        await sink.write(MODEL, rows(1, dimensions=5))
        assert await sink.models() == {MODEL: 5}


async def test_a_model_without_rows_may_get_another_size(open_store: OpenStore) -> None:
    async with open_store() as sink:
        await sink.write(MODEL, rows(2, dimensions=5))
        assert await sink.delete([one.id for one in rows(2)], MODEL) == 2
        await sink.prepare(MODEL, 7)
        await sink.write(MODEL, rows(1, dimensions=7))
        assert await sink.models() == {MODEL: 7}


@pytest.mark.parametrize("model", ["", "m\x00", "\ud800", "m" * 501], ids=["empty", "NUL", "surrogate", "too long"])
async def test_a_model_whose_name_cannot_be_a_key_is_refused(open_store: OpenStore, model: str) -> None:
    async with open_store() as sink:
        with pytest.raises(SinkConfigError, match="cannot be part of a key"):
            await sink.prepare(model, 3)


@pytest.mark.parametrize("table", ["a b", 'x"; DROP TABLE y; --', "1st", "", "t" * 64, "ü", "asyncembed_models"])
def test_a_table_name_that_is_not_a_plain_identifier_is_refused(open_store: OpenStore, table: str) -> None:
    with pytest.raises(SinkConfigError, match="table name"):
        open_store(table=table)


async def test_tables_of_one_store_are_independent(open_store: OpenStore) -> None:
    async with open_store(table="one") as one, open_store(table="Order") as other:
        await one.write(MODEL, rows(2, dimensions=4))
        await other.write(MODEL, rows(3, dimensions=6))
        assert (await one.models(), await one.count()) == ({MODEL: 4}, 2)
        assert (await other.models(), await other.count()) == ({MODEL: 6}, 3)


# ---- search ----


async def test_a_search_returns_the_nearest_by_cosine_best_first(open_store: OpenStore) -> None:
    stored = rows(300, dimensions=16)
    query = np.random.default_rng(1).standard_normal(16).astype(np.float32)
    async with open_store() as sink:
        await sink.write(MODEL, stored)
        hits = await sink.search(query, k=20)
    assert [hit.id for hit in hits] == nearest(stored, query, 20)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


async def test_equal_vectors_are_ranked_by_id(open_store: OpenStore) -> None:
    ids = [f"{number * 7919 % 1000}" for number in range(100)] + ["Z", "a", "é", "😀", "\ue000"]
    vector = np.random.default_rng(2).standard_normal(33).astype(np.float32)
    async with open_store() as sink:
        await sink.write(MODEL, [row(id, vector) for id in ids])
        hits = await sink.search(vector[::-1].copy(), k=len(ids))
        first = await sink.search(vector[::-1].copy(), k=3)
    assert [hit.id for hit in hits] == sorted(ids)
    assert first == hits[:3]


async def test_a_search_for_more_rows_than_stored_returns_all_of_them(open_store: OpenStore) -> None:
    async with open_store() as sink:
        await sink.write(MODEL, rows(3))
        assert len(await sink.search(rows(1)[0].vector, k=1_000)) == 3


async def test_a_vector_of_zeros_is_stored_but_never_found(open_store: OpenStore) -> None:
    async with open_store() as sink:
        await sink.write(MODEL, [row("zero", vec(0, 0, 0)), row("opposite", vec(-1, 0, 0))])
        hits = await sink.search(vec(1, 0, 0))
        assert await sink.count() == 2
    assert [(hit.id, hit.score) for hit in hits] == [("opposite", -1.0)]


async def test_a_prepared_store_without_rows_has_no_hits(open_store: OpenStore) -> None:
    async with open_store() as sink:
        await sink.prepare(MODEL, 3)
        assert await sink.search(vec(1, 0, 0)) == []


async def test_two_models_live_side_by_side_and_are_never_mixed(open_store: OpenStore) -> None:
    async with open_store() as sink:
        await sink.write("old", [row("a", vec(1, 0)), row("b", vec(0, 1))])
        await sink.write("new", [row("a", vec(0, 0, 1))])
        with pytest.raises(SinkConfigError, match=r"'new' \(3 dimensions\), 'old' \(2 dimensions\)"):
            await sink.search(vec(1, 0))
        assert [hit.id for hit in await sink.search(vec(1, 0), model="old")] == ["a", "b"]
        assert [hit.id for hit in await sink.search(vec(1, 0, 0), model="new")] == ["a"]
        assert (await sink.models(), await sink.count(), await sink.count("old")) == ({"old": 2, "new": 3}, 3, 2)


async def test_a_query_for_an_unknown_model_is_refused_with_the_known_ones(open_store: OpenStore) -> None:
    async with open_store() as sink:
        await sink.write(MODEL, [row("a")])
        with pytest.raises(SinkConfigError, match=r"no vectors of model 'other'; it holds: 'model-a'"):
            await sink.search(vec(1, 2, 3), model="other")


async def test_a_query_of_another_size_is_refused(open_store: OpenStore) -> None:
    async with open_store() as sink:
        await sink.write(MODEL, [row("a")])
        with pytest.raises(SinkConfigError, match=r"query has 2 dimensions; .* 'model-a' \(3 dimensions\)"):
            await sink.search(vec(1, 2))


@pytest.mark.parametrize(
    ("query", "k"),
    [
        pytest.param(vec(np.nan, 1, 1), 5, id="NaN"),
        pytest.param(vec(0, 0, 0), 5, id="all zeros"),
        pytest.param(np.ones((2, 3), np.float32), 5, id="a matrix"),
        pytest.param("word", 5, id="a text"),
        pytest.param(vec(1, 2, 3), 0, id="no hits wanted"),
    ],
)
async def test_an_invalid_query_is_refused(open_store: OpenStore, query: Any, k: int) -> None:
    async with open_store() as sink:
        with pytest.raises(ConfigError):
            await sink.search(query, k)


async def test_a_query_may_be_a_list_of_numbers(open_store: OpenStore) -> None:
    async with open_store() as sink:
        await sink.write(MODEL, [row("a")])
        assert [hit.id for hit in await sink.search([1, 2.5, 3])] == ["a"]


async def test_a_search_where_nothing_was_ever_stored_is_an_error(open_store: OpenStore) -> None:
    async with open_store() as sink:
        with pytest.raises(SinkConfigError, match="ingest into it first"):
            await sink.search(vec(1, 0, 0))


# ---- deleting ----


async def test_delete_deletes_only_the_named_rows_of_that_model(open_store: OpenStore) -> None:
    async with open_store() as sink:
        await sink.write("old", [row(1), row(2), row(3)])
        await sink.write("new", [row(1)])
        assert await sink.delete([1, "2", 2, "none", "\x00"], "old") == 2
        assert [id async for id in sink.ids("old")] == ["3"]
        assert [id async for id in sink.ids("new")] == ["1"]


async def test_ids_are_listed_in_order_and_in_pages(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = open_store()
    monkeypatch.setattr("asyncembed.sinks.contract.IDS_PER_PAGE", 3)
    async with sink:
        await sink.write(MODEL, rows(10))
        assert [id async for id in sink.ids(MODEL)] == [one.id for one in rows(10)]


# ---- many at once ----


async def test_many_tasks_write_and_read_with_one_sink(open_store: OpenStore) -> None:
    stored = rows(200)
    async with open_store() as sink:
        await sink.prepare(MODEL, 8)
        async with asyncio.TaskGroup() as group:
            for start in range(0, 200, 10):
                group.create_task(sink.write(MODEL, stored[start : start + 10]))
                group.create_task(sink.search(stored[0].vector))
        assert await sink.existing(MODEL, hashes(stored)) == {one.id for one in stored}


async def test_many_sinks_start_at_once_on_an_empty_store_and_write_the_same_ids(open_store: OpenStore) -> None:
    stored = rows(50)

    async def one_writer(seed: int) -> None:
        async with open_store() as sink:
            await sink.prepare(MODEL, 8)
            for _ in range(3):
                mixed = [stored[place] for place in np.random.default_rng(seed).permutation(50)]
                assert await sink.write(MODEL, mixed) == {}

    async with asyncio.TaskGroup() as group:
        for seed in range(6):
            group.create_task(one_writer(seed))
    async with open_store() as sink:
        assert [id async for id in sink.ids(MODEL)] == [one.id for one in stored]


# ---- cancellation ----


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8, 13, 21, 34, 55])
async def test_a_write_cancelled_at_any_step_has_stored_all_or_nothing(open_store: OpenStore, steps: int) -> None:
    stored = rows(100)
    async with open_store() as sink, open_store(**({"busy_timeout": 0.0} if "SQLite" in repr(sink) else {})) as other:
        await sink.prepare(MODEL, 8)
        writing = asyncio.create_task(sink.write(MODEL, stored))
        for _ in range(steps):
            await asyncio.sleep(0)
        writing.cancel()
        await asyncio.wait([writing])
        assert await other.count() in (0, 100)
        await other.write(MODEL, stored)  # at once, since no lock was left
        await sink.write(MODEL, stored[:1])
        assert await other.count() == 100


async def test_a_search_in_an_empty_store_finds_nothing_with_and_without_a_model(open_store: OpenStore) -> None:
    async with open_store() as sink:
        await sink.prepare(MODEL, None)
        assert await sink.search(vec(1, 0, 0), model=MODEL) == []
        assert await sink.search(vec(1, 0, 0)) == []


async def test_an_id_that_no_store_can_hold_matches_no_row(open_store: OpenStore) -> None:
    # SQLite's JSON ends a text at a NUL
    async with open_store() as sink:
        await sink.write(MODEL, [row("abc")])
        assert await sink.existing(MODEL, {"abc\0other": row("abc").content_hash}) == set()
        assert await sink.delete(["abc\0other", "\ud800"], MODEL) == 0
        assert await sink.count() == 1
