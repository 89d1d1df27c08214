"""`SQLiteCache`: stored bytes, eviction, several users of one file, and files that cannot be a cache."""

from __future__ import annotations

import asyncio
import gc
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncembed.caches.sqlite import APPLICATION_ID, MIN_BYTES, PAGE_BYTES, ROW_BYTES, CacheFile, SQLiteCache, parts
from asyncembed.errors import AsyncEmbedError, ConfigError
from tests.caches.keys import key_of, vector
from tests.steps import Steps


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.db"


def numbered(first: int, last: int, size: int = 256) -> dict[bytes, np.ndarray]:
    return {key_of(number): vector(number, size) for number in range(first, last)}


def size_of(path: Path) -> int:
    return path.stat().st_size


def content(path: Path) -> bytes:
    return path.read_bytes()


def fill(path: Path, data: bytes, start: int = 0) -> None:
    with path.open("r+b" if start else "wb") as file:
        file.seek(start)
        file.write(data)


# ---- stored bytes


async def test_stored_vectors_are_found_by_the_next_cache(path: Path) -> None:
    first = SQLiteCache(path)
    await first.put({key_of(name): vector(name) for name in "abc"})
    await first.aclose()

    second = SQLiteCache(path)
    found = await second.get([key_of(name) for name in "xcbaa"])
    await second.aclose()

    assert set(found) == {key_of(name) for name in "abc"}
    for name in "abc":
        np.testing.assert_array_equal(found[key_of(name)], vector(name))
        assert found[key_of(name)].dtype == np.float32


async def test_the_file_holds_little_endian_float32_and_only_its_owner_may_read_it(path: Path) -> None:
    cache = SQLiteCache(path)
    await cache.put({key_of("a"): np.array([1.5, -2.0, 0.25], np.float32)})
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    await cache.aclose()

    database = sqlite3.connect(path)
    assert database.execute("SELECT key, hex(vector) FROM vectors").fetchall() == [
        (key_of("a"), "0000C03F000000C00000803E")
    ]
    assert database.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)  # so that reading never waits
    database.close()


async def test_a_second_put_replaces_the_vector_of_a_key(path: Path) -> None:
    cache = SQLiteCache(path)
    await cache.put({key_of("a"): vector("a", 16)})
    await cache.put({key_of("a"): vector("b")})
    np.testing.assert_array_equal((await cache.get([key_of("a")]))[key_of("a")], vector("b"))
    await cache.aclose()


async def test_a_closed_cache_may_be_used_again(path: Path) -> None:
    cache = SQLiteCache(path)
    await cache.aclose()
    await cache.put({key_of("a"): vector("a")})
    await cache.aclose()
    assert set(await cache.get([key_of("a")])) == {key_of("a")}
    await cache.aclose()


async def test_more_keys_than_fit_into_one_statement_are_found(path: Path) -> None:
    cache = SQLiteCache(path)
    await cache.put(numbered(0, 1_700, 4))
    assert len(await cache.get([key_of(number) for number in range(2_000)])) == 1_700
    await cache.aclose()


async def test_no_call_takes_a_step_for_every_vector(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    cache = SQLiteCache(path, max_bytes=4 * MIN_BYTES)
    taken = {}
    for what in ("put", "put while others leave"):
        steps.count = 0
        await cache.put(numbered(0, 4_000))
        taken[what] = steps.count
    steps.count = 0
    found = await cache.get([key_of(number) for number in range(4_000)])
    taken["get"] = steps.count
    await cache.aclose()
    assert len(found) > 1_000
    assert all(0 < count < 400 for count in taken.values()), taken  # of 4,000, in many small transactions


# ---- size and eviction


async def test_a_full_file_keeps_the_vectors_written_last_and_never_grows_beyond_its_limit(path: Path) -> None:
    cache = SQLiteCache(path, max_bytes=2 * MIN_BYTES)
    for start in range(0, 6_000, 200):  # 6 MB of numbers
        await cache.put(numbered(start, start + 200))
        assert set(numbered(start, start + 200)) == set(await cache.get(list(numbered(start, start + 200)))), start
        assert pages_in_use(path) <= 2 * MIN_BYTES
    left = await cache.get([key_of(number) for number in range(6_000)])
    await cache.aclose()

    assert size_of(path) <= 2 * MIN_BYTES
    assert set(left) == {key_of(number) for number in range(6_000 - len(left), 6_000)}
    assert 600 < len(left) < 2_000


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    puts=st.lists(
        st.tuples(st.integers(1, 400), st.sampled_from([1, 64, 1_536, 2_300, 5_000])), min_size=1, max_size=12
    )
)
async def test_vectors_of_any_size_keep_the_file_within_max_bytes(puts: list[tuple[int, int]], tmp_path: Path) -> None:
    path = tmp_path / f"{os.urandom(8).hex()}.db"
    cache = SQLiteCache(path, max_bytes=MIN_BYTES)
    kept: dict[bytes, np.ndarray] = {}
    for round_, (count, size) in enumerate(puts):
        vectors = {key_of((round_, number)): vector((round_, number), size) for number in range(count)}
        kept |= vectors
        await cache.put(vectors)
        assert pages_in_use(path) <= MIN_BYTES
        for key, found in (await cache.get(list(kept))).items():
            np.testing.assert_array_equal(found, kept[key])
        newest = list(vectors)[-1]
        assert newest in await cache.get([newest])
    await cache.aclose()
    assert size_of(path) <= MIN_BYTES


async def test_a_hit_does_not_keep_a_vector_but_a_second_write_does(path: Path) -> None:
    cache = SQLiteCache(path, max_bytes=4 * MIN_BYTES)
    await cache.put(numbered(0, 3_000))
    assert len(await cache.get([key_of(number) for number in range(30)])) == 30
    await cache.put(numbered(30, 60))
    await cache.aclose()

    again = SQLiteCache(path, max_bytes=4 * MIN_BYTES)
    await again.put(numbered(3_000, 3_900))
    left = await again.get([key_of(number) for number in range(3_000)])
    await again.aclose()
    assert {key_of(number) for number in range(30)}.isdisjoint(left)
    assert {key_of(number) for number in range(30, 60)} <= set(left)
    assert len(left) < 3_000


async def test_a_hit_writes_nothing_to_the_file(path: Path) -> None:
    cache = SQLiteCache(path, max_bytes=4 * MIN_BYTES)
    await cache.put(numbered(0, 3_000))
    other = sqlite3.connect(path)
    before = other.execute("PRAGMA data_version").fetchone()  # changes with every commit of another connection
    for _ in range(4):
        for start in range(0, 3_000, 500):
            assert len(await cache.get([key_of(number) for number in range(start, start + 500)])) == 500
    assert other.execute("PRAGMA data_version").fetchone() == before
    other.close()
    await cache.aclose()


async def test_a_lower_limit_applies_from_the_next_write_on(path: Path) -> None:
    large = SQLiteCache(path, max_bytes=None)
    await large.put(numbered(0, 5_000))
    await large.aclose()
    small = SQLiteCache(path, max_bytes=MIN_BYTES)
    await small.put(numbered(5_000, 5_001))
    assert pages_in_use(path) <= MIN_BYTES
    assert key_of(5_000) in await small.get([key_of(5_000)])
    await small.aclose()


def pages_in_use(path: Path) -> int:
    database = sqlite3.connect(path)
    total, free, size = (
        database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    database.close()
    return (total - free) * size


def test_parts_hold_every_vector_once_except_those_larger_than_a_part() -> None:
    sizes = [10, 20, 3_000, 40, 1, 230, 230]
    vectors = {key_of(index): np.zeros(size, np.float32) for index, size in enumerate(sizes)}
    most = 2 * ROW_BYTES + 4 * 240
    cut = list(parts(vectors, most))
    assert [len(part) for part in cut] == [4, 1, 1]
    assert [key for part in cut for key in part] == [key for key in vectors if key != key_of(2)]
    assert all(sum(ROW_BYTES + one.nbytes for one in part.values()) <= most for part in cut)


# ---- unusable files, and options


@pytest.mark.parametrize("max_bytes", [0, MIN_BYTES - 1, 1e9, True])
def test_an_invalid_or_too_small_max_bytes_is_refused(max_bytes: object) -> None:
    with pytest.raises(ConfigError, match="max_bytes"):
        SQLiteCache("cache.db", max_bytes=max_bytes)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["", ":memory:", b"cache.db"])
def test_a_path_that_cannot_be_a_file_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="path of a file"):
        SQLiteCache(path)


async def refused(path: Path, words: str) -> None:
    cache = SQLiteCache(path)
    for use in (cache.get([key_of("a")]), cache.put({key_of("a"): vector("a")})):
        with pytest.raises(ConfigError) as caught:
            await use
        assert words in str(caught.value)
        assert str(path) in str(caught.value)
    await cache.aclose()


async def test_a_file_that_is_no_database_is_refused_and_not_changed(path: Path) -> None:
    fill(path, b"a diary, not a database" * 100)
    await refused(path, "is not an SQLite database")
    assert content(path) == b"a diary, not a database" * 100


@pytest.mark.parametrize("made_by", ["CREATE TABLE vectors (name TEXT)", "PRAGMA application_id = 7"])
async def test_another_database_is_refused_and_not_changed(path: Path, made_by: str) -> None:
    database = sqlite3.connect(path)
    database.execute(made_by)
    database.close()
    before = content(path)
    await refused(path, "is a database, but no cache")
    assert content(path) == before


async def test_a_cache_of_a_later_version_is_refused(path: Path) -> None:
    cache = SQLiteCache(path)
    await cache.put({key_of("a"): vector("a")})
    await cache.aclose()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 2")
    database.close()
    await refused(path, "has version 2; this library writes 1")


async def test_a_file_of_an_earlier_release_is_read_and_evicted_by_its_used_numbers(path: Path) -> None:
    database = sqlite3.connect(path)
    database.executescript("""
        PRAGMA page_size = 32768;
        CREATE TABLE vectors (
            id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, used INTEGER NOT NULL, vector BLOB NOT NULL
        );
        CREATE INDEX vectors_by_use ON vectors (used);
        PRAGMA application_id = 1634037091;
        PRAGMA user_version = 1;
    """)
    # that release raised `used` at a hit, too, so it does not follow the order of the ids
    rows = [(key_of(number), 500 - number, vector(number, 256).tobytes()) for number in range(500)]
    database.executemany("INSERT INTO vectors (key, used, vector) VALUES (?, ?, ?)", rows)
    database.commit()
    database.close()
    cache = SQLiteCache(path, max_bytes=MIN_BYTES)
    for key, found in (await cache.get([key for key, *_ in rows])).items():
        np.testing.assert_array_equal(found, numbered(0, 500)[key])
    await cache.put(numbered(500, 900))
    left = await cache.get([key for key, *_ in rows])
    await cache.aclose()
    assert 0 < len(left) < 500
    assert set(left) == {key_of(number) for number in range(len(left))}


async def test_a_folder_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    await refused(tmp_path, "Is a directory")
    await refused(tmp_path / "none" / "cache.db", "No such file or directory")


async def test_a_file_damaged_while_in_use_is_an_error_but_not_a_config_error(path: Path) -> None:
    cache = SQLiteCache(path)
    await cache.put(numbered(0, 1_000))
    await cache.aclose()
    await cache.get([key_of(0)])
    fill(path, os.urandom(size_of(path) - PAGE_BYTES), start=PAGE_BYTES)
    with pytest.raises(AsyncEmbedError) as caught:
        for number in range(1_000):
            await cache.get([key_of(number)])
    assert not isinstance(caught.value, ConfigError)
    await cache.aclose()


async def test_a_row_without_a_valid_vector_is_a_miss(path: Path) -> None:
    cache = SQLiteCache(path)
    await cache.put({key_of(name): vector(name) for name in "abcd"})
    database = sqlite3.connect(path)
    for name, blob in (("a", b""), ("b", b"12345"), ("c", "text")):
        database.execute("UPDATE vectors SET vector = ? WHERE key = ?", (blob, key_of(name)))
    database.commit()
    database.close()
    assert set(await cache.get([key_of(name) for name in "abcd"])) == {key_of("d")}
    await cache.aclose()


# ---- several users


async def test_a_lock_of_another_process_is_an_error_after_the_timeout_and_leaves_no_transaction_open(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncembed.caches.sqlite.BUSY_TIMEOUT_S", 0.05)
    cache = SQLiteCache(path)
    await cache.put({key_of("a"): vector("a")})
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(AsyncEmbedError, match="locked"):
        await cache.put({key_of("b"): vector("b")})
    assert set(await cache.get([key_of("a"), key_of("b")])) == {key_of("a")}  # reading never waits
    other.execute("COMMIT")
    await cache.put({key_of("b"): vector("b")})
    other.close()
    await cache.aclose()


PROCESS = """
import asyncio, sys
from asyncembed.caches.sqlite import SQLiteCache
from tests.caches.keys import key_of, vector

async def main():
    cache = SQLiteCache(sys.argv[1])
    for number in range(40):
        await cache.put({key_of((sys.argv[2], number, k)): vector((number, k)) for k in range(10)})
        await cache.put({key_of(number): vector(number)})
    await cache.aclose()

asyncio.run(main())
"""


def test_processes_that_start_at_the_same_time_share_one_file(path: Path) -> None:
    root = Path(__file__).parent.parent.parent
    children = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(path), name], cwd=root, stderr=subprocess.PIPE, text=True)
        for name in "abcd"
    ]
    errors = [child.communicate()[1] for child in children]
    assert errors == [""] * 4
    database = sqlite3.connect(path)
    assert database.execute("SELECT count(*) FROM vectors").fetchone() == (4 * 400 + 40,)
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


def watch_reads(monkeypatch: pytest.MonkeyPatch, go_on: threading.Event | None = None) -> list[list[bytes]]:
    """The keys of each read from the file, which waits for the event."""
    read_keys: list[list[bytes]] = []
    read = CacheFile.read

    def watched(self: CacheFile, connection: sqlite3.Connection, keys: list[bytes]) -> object:
        read_keys.append(keys)
        assert go_on is None or go_on.wait(30)
        return read(self, connection, keys)

    monkeypatch.setattr(CacheFile, "read", watched)
    return read_keys


async def test_lookups_that_start_at_the_same_time_share_one_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_keys = watch_reads(monkeypatch)
    cache = SQLiteCache(path)
    await cache.put(numbered(0, 100))

    async def look_up(number: int) -> None:
        found = await cache.get([key_of(number), key_of(number + 1), key_of(-number - 1)])
        assert set(found) == set(numbered(number, number + 2))

    async with asyncio.TaskGroup() as group:
        for number in range(99):
            group.create_task(look_up(number))
    await cache.aclose()
    assert [len(set(keys)) for keys in read_keys] == [100 + 99]


async def test_a_lookup_cancelled_at_any_time_does_not_affect_others(path: Path) -> None:
    cache = SQLiteCache(path)
    await cache.put(numbered(0, 50))
    for turns in range(12):
        tasks = [asyncio.create_task(cache.get([key_of(number)])) for number in range(50)]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()
        await asyncio.wait(tasks)
        for number, task in enumerate(tasks):
            if not task.cancelled():
                assert set(task.result()) == {key_of(number)}
        assert sum(task.cancelled() for task in tasks) <= 17
    assert asyncio.all_tasks() == {asyncio.current_task()}
    await cache.aclose()


async def test_a_lookup_cancelled_before_its_turn_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    read_keys = watch_reads(monkeypatch, go_on)
    cache = SQLiteCache(path)
    first = asyncio.create_task(cache.get([key_of("first")]))
    while not read_keys:  # noqa: ASYNC110  # no event is set when a read starts
        await asyncio.sleep(0)
    cancelled = asyncio.create_task(cache.get([key_of("cancelled")]))
    await asyncio.sleep(0)
    last = asyncio.create_task(cache.get([key_of("last")]))
    cancelled.cancel()
    await asyncio.wait([cancelled])
    go_on.set()
    await asyncio.wait([first, last])
    await cache.aclose()
    assert cancelled.cancelled()
    assert read_keys == [[key_of("first")], [key_of("last")]]


async def test_if_a_shared_read_fails_unexpectedly_the_other_lookups_read_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = SQLiteCache(path)
    await cache.put(numbered(0, 5))
    read, errors = CacheFile.read, [MemoryError()]

    def at_first_without_memory(self: CacheFile, connection: sqlite3.Connection, keys: list[bytes]) -> object:
        if errors:
            raise errors.pop()
        return read(self, connection, keys)

    monkeypatch.setattr(CacheFile, "read", at_first_without_memory)
    tasks = [asyncio.create_task(cache.get([key_of(number)])) for number in range(5)]
    await asyncio.wait(tasks)
    assert isinstance(tasks[0].exception(), MemoryError)
    assert [set(task.result()) for task in tasks[1:]] == [{key_of(number)} for number in range(1, 5)]
    await cache.aclose()


async def test_the_error_of_cancelled_lookups_is_not_logged_as_never_retrieved(path: Path) -> None:
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    fill(path, b"no database" * 1_000)
    cache = SQLiteCache(path)
    tasks = [asyncio.create_task(cache.get([key_of(number)])) for number in range(5)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    del tasks, task
    gc.collect()
    assert reported == []
    await cache.aclose()


async def test_a_write_that_fails_midway_stores_nothing_and_leaves_no_transaction_open(path: Path) -> None:
    cache = SQLiteCache(path)
    await cache.put(numbered(0, 5))
    other = sqlite3.connect(path, timeout=0, isolation_level=None)
    other.execute(
        f"CREATE TRIGGER refuse BEFORE INSERT ON vectors WHEN new.key = x'{key_of(7).hex()}'"
        " BEGIN SELECT raise(ABORT, 'no'); END"
    )
    with pytest.raises(AsyncEmbedError, match="cannot be used: no"):
        await cache.put(numbered(5, 10))
    other.execute("BEGIN IMMEDIATE")
    other.execute("ROLLBACK")
    other.close()
    assert set(await cache.get([key_of(number) for number in range(10)])) == set(numbered(0, 5))
    await cache.put(numbered(8, 10))
    await cache.aclose()


async def test_the_error_of_a_shared_read_is_raised_by_every_lookup(path: Path) -> None:
    fill(path, b"no database" * 1_000)
    cache = SQLiteCache(path)
    tasks = [asyncio.create_task(cache.get([key_of(number)])) for number in range(5)]
    await asyncio.wait(tasks)
    assert [type(task.exception()) for task in tasks] == [ConfigError] * 5
    assert len({id(task.exception()) for task in tasks}) == 5
    await cache.aclose()


async def test_a_cancelled_put_leaves_whole_vectors_and_no_transaction_open(path: Path) -> None:
    cache = SQLiteCache(path)
    vectors = numbered(0, 8_000)  # several transactions
    for turns in range(0, 40, 3):
        task = asyncio.create_task(cache.put(vectors))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        other = sqlite3.connect(path, timeout=0, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")  # raises if a transaction was left open
        other.execute("ROLLBACK")
        other.close()
        for key, found in (await cache.get(list(vectors)[:100])).items():
            np.testing.assert_array_equal(found, vectors[key])
    assert asyncio.all_tasks() == {asyncio.current_task()}
    await cache.aclose()


def test_one_cache_serves_several_event_loops_in_turn_and_at_once(path: Path) -> None:
    cache = SQLiteCache(path)
    wrong: list[BaseException] = []

    async def use(name: int) -> None:
        for number in range(20):
            await cache.put({key_of((name, number)): vector((name, number))})
            found = await cache.get([key_of((name, number)), key_of((name - 1, number))])
            np.testing.assert_array_equal(found[key_of((name, number))], vector((name, number)))

    def work(name: int) -> None:
        try:
            asyncio.run(use(name))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    work(4)
    asyncio.run(cache.aclose())
    assert wrong == []


FORK = """
import asyncio, os, sys

def log_is_gone():  # so no connection is open; it is registered first, so it runs last
    assert not os.path.exists(sys.argv[1] + "-wal")

os.register_at_fork(before=log_is_gone)

from asyncembed.caches.sqlite import SQLiteCache
from tests.caches.keys import key_of, vector

cache = SQLiteCache(sys.argv[1])

async def use(name):
    await cache.put({key_of((name, number)): vector(number) for number in range(100)})
    found = await cache.get([key_of(("parent", number)) for number in range(100)])
    assert len(found) == 100
    if name != "parent":
        await cache.aclose()

asyncio.run(use("parent"))
assert os.path.exists(sys.argv[1] + "-wal")
child = os.fork()
asyncio.run(use("child" if child == 0 else "parent again"))
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_cache_may_be_used_on_both_sides_of_a_fork(path: Path) -> None:
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(path)], cwd=root, capture_output=True, text=True, check=False, timeout=30
    )
    assert (done.returncode, done.stderr) == (0, "")
    database = sqlite3.connect(path)
    assert database.execute("SELECT count(*) FROM vectors").fetchone() == (300,)
    database.close()


def test_a_cache_that_was_not_closed_does_not_delay_the_exit(path: Path) -> None:
    code = (
        "import asyncio, sys; from asyncembed.caches.sqlite import SQLiteCache\n"
        "cache = SQLiteCache(sys.argv[1]); asyncio.run(cache.get([b'key']))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=20)
    assert done.returncode == 0
