"""Files, folders, globs and standard input: which files are found, in which order, and how a bad one fails."""

from __future__ import annotations

import asyncio
import io
import os
import sys
import threading
import tracemalloc
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from asyncembed.errors import ConfigError, InputError
from asyncembed.sources.files import Sources, _opened
from asyncembed.sources.formats import RecordOrError
from asyncembed.types import Record


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: str, content: str | bytes = "Some text.") -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


async def items(*sources: str) -> list[RecordOrError]:
    return [item async for item in Sources(sources)]


async def ids(*sources: str) -> list[str]:
    return [str(item.id) if isinstance(item, Record) else type(item).__name__ for item in await items(*sources)]


async def only_error(*sources: str) -> InputError:
    (item,) = await items(*sources)
    assert isinstance(item, InputError)
    return item


async def refused(*sources: str, target: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        await Sources(sources).check(target)
    return str(caught.value)


def set_standard_input(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


# ---- which files a source means ----


async def test_the_suffix_of_a_file_decides_how_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.md", "# One\n\nx")
    write("b.TXT", "x")
    write("c.jsonl", '{"id": "j", "text": "x"}')
    write("d.ndjson", '{"id": "n", "text": "x"}')
    write("e.csv", "id,text\nc,x")
    write("LICENSE", "# no heading")
    set_standard_input(monkeypatch, b'{"id": "s", "text": "x"}\n')
    found = await ids("a.md", "b.TXT", "c.jsonl", "d.ndjson", "e.csv", "LICENSE", "-")
    assert found == ["a.md#one-1", "b.TXT#1", "j", "n", "c", "LICENSE#1", "s"]


async def test_a_folder_is_searched_in_order_without_hidden_and_other_files() -> None:
    for name in ("b.md", "a.md", "sub/c.txt", "sub/deep/d.rst", ".hidden.md", ".git/e.md", "image.png", "x.json"):
        write(f"docs/{name}", "x")
    expected = ["docs/a.md#top-1", "docs/b.md#top-1", "docs/sub/c.txt#1", "docs/sub/deep/d.rst#1"]
    assert await ids("docs") == await ids("docs/") == await ids("./docs") == expected


async def test_ids_start_with_the_path_as_it_was_given(tmp_path: Path) -> None:
    write("docs/a.txt")
    assert await ids(".") == ["docs/a.txt#1"]
    assert await ids("docs/../docs/a.txt") == ["docs/../docs/a.txt#1"]
    assert await ids(str(tmp_path / "docs")) == [f"{tmp_path.as_posix()}/docs/a.txt#1"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("docs/*.md", ["docs/a.md", "docs/b.md"]),
        ("docs/**/*.md", ["docs/a.md", "docs/b.md", "docs/sub/c.md"]),
        ("docs/**", ["docs/a.md", "docs/b.md", "docs/sub/c.md", "docs/x.py"]),
        ("*/[ab].md", ["docs/a.md", "docs/b.md"]),
        ("docs/?.py", ["docs/x.py"]),
        ("docs/.*.md", ["docs/.h.md"]),
    ],
)
async def test_a_quoted_glob_is_expanded_as_by_a_shell(pattern: str, expected: list[str]) -> None:
    for name in ("a.md", "b.md", "sub/c.md", "x.py", ".h.md", ".git/g.md"):
        write(f"docs/{name}", "x")
    assert [id.partition("#")[0] for id in await ids(pattern)] == expected


async def test_a_file_whose_name_looks_like_a_glob_is_a_file() -> None:
    write("a[1].txt")
    write("a1.txt")
    assert await ids("a[1].txt") == ["a[1].txt#1"]


async def test_in_a_folder_links_to_files_are_read_but_links_to_folders_are_not_followed() -> None:
    write("docs/a.txt")
    os.symlink("..", "docs/loop")
    os.symlink("a.txt", "docs/b.txt")
    assert await ids("docs") == await ids("docs/**/*.txt") == ["docs/a.txt#1", "docs/b.txt#1"]


async def test_a_link_to_a_folder_that_is_named_as_source_is_followed() -> None:
    write("real/a.txt")
    os.symlink("real", "docs")
    assert await ids("docs") == ["docs/a.txt#1"]


async def test_a_source_that_is_named_twice_is_read_once() -> None:
    write("a.txt")
    assert await ids("a.txt", "a.txt") == ["a.txt#1"]


async def test_an_empty_file_has_no_records_and_an_empty_folder_is_reported() -> None:
    write("a.jsonl", "")
    write("b.md", "\n")
    write("pictures/x.png")
    sources = Sources(["a.jsonl", "b.md", "pictures"])
    assert [item async for item in sources] == []
    assert sources.empty_folders == ["pictures"]


# ---- wrong sources are refused before anything is read ----


@pytest.mark.parametrize("source", ["nowhere.md", "docs/*.md", "nowhere/", "a\0b", "x" * 5_000])
async def test_an_unknown_source_is_refused_with_its_name(source: str) -> None:
    write("docs/a.txt")
    assert await refused("docs", source) == f"no such file or folder, and nothing matches: {source}"


async def test_the_message_for_an_address_as_source_does_not_show_its_password() -> None:
    assert "hunter2" not in await refused("postgresql://me:hunter2@host/db")


async def test_a_link_to_itself_is_refused() -> None:
    os.symlink("loop", "loop")
    assert (await refused("loop")).startswith("loop: ")


async def test_a_target_among_the_sources_is_refused_under_each_of_its_names(tmp_path: Path) -> None:
    write("docs/out.txt")
    os.symlink("docs/out.txt", "alias")
    for target in ("docs/out.txt", "./docs/out.txt", str(tmp_path / "docs" / "out.txt"), "alias"):
        assert await refused("docs", target=target) == "docs/out.txt is a source and the target"
    await Sources(["docs"]).check("new.db")


async def test_a_missing_splitter_is_reported_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "semantic_text_splitter", None)
    write("a.jsonl", "")
    await Sources(["a.jsonl"]).check()
    write("b.md")
    assert 'pip install "asyncembed[cli]"' in await refused("a.jsonl", "b.md")


# ---- broken files fail alone ----


async def test_a_broken_line_is_reported_with_its_file_and_number() -> None:
    write("docs/a.jsonl", '{"id": 1, "text": "a"}\n\n{oops\n')
    write("docs/b.jsonl", '{"id": 2, "text": "b"}\n')
    first, error, last = await items("docs")
    assert (first, last) == (Record(1, "a"), Record(2, "b"))
    assert str(error).startswith("docs/a.jsonl line 3: is not JSON")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b'id,text\n1,"a', "a.csv line 2: a quote is opened and not closed; not read on from there"),
        ("a.md", "\ufeffhello".encode("utf-16-le"), "a.md is UTF-16; convert it to UTF-8"),
        ("a.json", b"[]", "a.json is one JSON document; write one object a line, and name it .jsonl"),
        ("a.txt", b"caf\xe9", "a.txt line 1: has 0xe9 at byte 4, which is not UTF-8; not read on from there"),
        ("a.pdf", b"%PDF\0", "a.pdf line 1: has a NUL at byte 5, so it is not text; not read on from there"),
    ],
)
async def test_a_file_that_cannot_be_read_to_its_end_fails_once_with_its_name(
    name: str, content: bytes, message: str
) -> None:
    write(name, content)
    write("z.txt")
    error, last = await items(name, "z.txt")
    assert str(error) == message
    assert last == Record("z.txt#1", "Some text.", {"source": "z.txt", "line": 1})


async def test_a_file_in_a_folder_that_cannot_be_opened_fails_alone() -> None:
    write("docs/b.txt")
    os.symlink("nowhere", "docs/a.txt")
    assert await ids("docs") == ["InvalidRecordError", "docs/b.txt#1"]
    assert str((await items("docs"))[0]) == "docs/a.txt: No such file or directory"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
async def test_a_file_whose_name_is_not_utf_8_fails_alone() -> None:
    write(os.fsdecode(b"docs/caf\xe9.txt"))
    error = await only_error("docs")
    assert str(error) == "docs/caf?.txt: the name of the file is not UTF-8"


async def test_a_folder_that_cannot_be_searched_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    write("docs/a.txt")
    write("docs/sub/b.txt")
    scandir = os.scandir

    def denied(path: str) -> object:
        if path.endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)  # root is never denied, and may run this test
    first, error = await items("docs")
    assert isinstance(first, Record)
    assert str(error) == "docs/sub: Permission denied"


async def test_a_read_error_fails_that_file_but_keeps_its_earlier_records(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            block = super().read(30)
            if not block:
                raise OSError(5, "Input/output error")
            return block

    failing = io.TextIOWrapper(Failing(b'{"id": 1, "text": "a"}\n{"id": 2, "te'))
    monkeypatch.setattr(sys, "stdin", failing)
    first, error = await items("-")
    assert first == Record(1, "a")
    assert str(error) == "standard input: Input/output error"


# ---- reading ----


async def test_the_number_of_records_is_estimated_and_exact_at_the_end() -> None:
    line = b'{"id": 10000, "text": "%s"}\n' % (b"x" * 1_000)
    write("a.jsonl", line * 1_000)
    sources = Sources(["a.jsonl"])
    await sources.check()
    assert sources.total_bytes == 1_000 * len(line)
    assert sources.expected() is None
    async for _ in sources:
        expected = sources.expected()
        assert expected is not None
        assert 950 <= expected <= 1_000
    assert sources.expected() == 1_000


async def test_the_number_of_records_in_a_pipe_is_unknown_until_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.txt")
    set_standard_input(monkeypatch, b'{"id": 1, "text": "a"}')
    sources = Sources(["a.txt", "-"])
    expected = [sources.expected() async for _ in sources]
    assert expected == [None, None]
    assert sources.expected() == 2


async def test_sources_can_be_read_again() -> None:
    write("a.txt")
    sources = Sources(["a.txt"])
    assert [item async for item in sources] == [item async for item in sources]
    assert sources.expected() == 1


async def test_a_large_file_is_read_in_little_memory() -> None:
    write("a.jsonl", b"".join(b'{"id": %d, "text": "%s"}\n' % (number, b"x" * 1_000) for number in range(40_000)))
    sources, count = Sources(["a.jsonl"]), 0
    tracemalloc.start()
    try:
        async for _ in sources:
            count += 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 40_000
    assert peak < 8e6  # of 41 MB


async def test_a_cancelled_reader_closes_its_file_when_the_waiting_thread_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, answer, closed = asyncio.Event(), threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    class Pipe(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            loop.call_soon_threadsafe(asked.set)
            answer.wait()
            return b'{"id": 1, "text": "a"}\n'

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Pipe()))
    monkeypatch.setattr(
        "asyncembed.sources.files.Sources._file_records", _noting_its_end(Sources._file_records, closed)
    )
    reading = asyncio.create_task(items("-"))
    await asked.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert not closed.is_set()
    answer.set()
    await asyncio.to_thread(closed.wait)


def _noting_its_end(function, end):  # type: ignore[no-untyped-def]
    def wrapped(*args):  # type: ignore[no-untyped-def]
        try:
            yield from function(*args)
        finally:
            end.set()

    return wrapped


async def test_a_reader_that_stops_early_closes_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []

    def noted(path: str) -> Any:
        opened.append(_opened(path))
        return opened[0]

    monkeypatch.setattr("asyncembed.sources.files._opened", noted)
    write("a.jsonl", '{"id": 1, "text": "a"}\n{"id": 2, "text": "b"}\n')
    async with aclosing(aiter(Sources(["a.jsonl"]))) as reader:
        async for _ in reader:
            assert not opened[0].closed
            break
    assert opened[0].closed


async def test_an_error_in_the_reading_thread_reaches_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.txt")

    def broken(*_: object) -> object:
        raise RuntimeError("a bug")

    monkeypatch.setattr("asyncembed.sources.files.plain_chunks", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        await items("a.txt")


async def test_a_pipe_in_a_folder_is_not_read() -> None:
    write("docs/b.txt")
    os.mkfifo("docs/a.txt")
    assert await ids("docs") == ["docs/b.txt#1"]
