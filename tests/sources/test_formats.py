"""Lines, JSON Lines and CSV: good records are read, a broken one fails alone and is named by its line."""

from __future__ import annotations

import csv
import io
import json
import random
import threading
import tracemalloc
from collections.abc import Iterable
from itertools import chain, repeat

import pytest

from asyncembed.errors import ConfigError, InputError, InvalidRecordError, InvalidTextError, WrongTypeError
from asyncembed.sources.formats import (
    MAX_LINE_BYTES,
    Fields,
    RecordOrError,
    csv_records,
    json_records,
    line_blocks,
    text_lines,
)
from asyncembed.types import Record


def parsed(kind: str, data: bytes, fields: Fields = Fields(), block: int = 7) -> list[RecordOrError]:  # noqa: B008 - frozen
    """Parse the bytes, read in tiny blocks as from a pipe."""
    file = io.BytesIO(data)
    blocks = line_blocks(lambda: file.read(block))
    items = {"json": json_records, "csv": csv_records}[kind](blocks, "x", fields)
    return [item for item in items if item is not None]


def summary(items: Iterable[RecordOrError]) -> list[str]:
    """Ids of records, and the first words of errors: `line 3`."""
    return [
        str(item.id) if isinstance(item, Record) else " ".join(str(item).split(":")[0].split()[1:]) for item in items
    ]


def only(items: list[RecordOrError]) -> InputError:
    (item,) = items
    assert isinstance(item, InputError)
    return item


# ---- lines ----


@pytest.mark.parametrize("seed", range(50))
def test_lines_end_at_newlines_whatever_the_size_of_a_read(seed: int) -> None:
    rng = random.Random(seed)
    data = bytes(rng.choice(b"ab\r\n\x0b\x0c") for _ in range(rng.randint(1, 200)))
    file = io.BytesIO(data)
    blocks = list(line_blocks(lambda: file.read(rng.randint(1, 20))))
    expected = data.split(b"\n")
    if not expected[-1]:
        expected.pop()  # the last newline ends a line and starts none
    assert [line for block in blocks for line in block] == list(enumerate(expected, start=1))


@pytest.mark.parametrize("block", [1, 1_000])
def test_a_byte_order_mark_is_removed_from_the_first_line_only(block: int) -> None:
    file = io.BytesIO(b"\xef\xbb\xbfa\n\xef\xbb\xbfb")
    lines = [line for lines in line_blocks(lambda: file.read(block)) for line in lines]
    assert lines == [(1, b"a"), (2, b"\xef\xbb\xbfb")]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_recognised_by_its_byte_order_mark(encoding: str) -> None:
    file = io.BytesIO("\ufeffhello\nyou".encode(encoding))
    with pytest.raises(InvalidRecordError, match="is UTF-16; convert it to UTF-8"):
        list(line_blocks(lambda: file.read(5)))


def test_a_line_that_is_too_long_is_skipped_in_little_memory() -> None:
    pieces = chain(repeat(b"x" * 65_536, 2 * MAX_LINE_BYTES // 65_536), [b"y\nz"])
    lines = []
    tracemalloc.start()
    try:
        for some in line_blocks(lambda: next(pieces, b"")):
            lines += some
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert lines == [(1, None), (2, b"z")]
    assert peak < 1.5 * MAX_LINE_BYTES


@pytest.mark.parametrize(("size", "kept"), [(MAX_LINE_BYTES, True), (MAX_LINE_BYTES + 1, False)])
def test_the_limit_of_a_line_is_exact(size: int, kept: bool) -> None:
    file = io.BytesIO(b"x" * size + b"\nnext")
    (first, second) = [line for lines in line_blocks(lambda: file.read(262_144)) for line in lines]
    assert (first[1] is not None) == kept
    assert second == (2, b"next")


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"caf\xe9", "has 0xe9 at byte 4, which is not UTF-8"),
        (b"a\0b", "has a NUL at byte 2, so it is not text"),
        ("é\u2028".encode(), None),
    ],
)
def test_a_line_that_is_not_text_has_a_problem_that_names_the_byte(raw: bytes, problem: str | None) -> None:
    (line,) = text_lines(iter([[(1, raw)]]))
    assert line.problem == problem


# ---- JSON Lines ----


def test_fields_of_a_json_object_beside_id_and_text_are_metadata() -> None:
    (record,) = parsed("json", b'{"id": 7, "text": "hi", "tag": "a", "n": [1, 2]}')
    assert record == Record(7, "hi", {"tag": "a", "n": [1, 2]})


def test_a_field_called_metadata_is_merged_into_the_metadata() -> None:
    (record,) = parsed("json", b'{"id": "a", "text": "hi", "metadata": {"tag": 1}, "n": 2}')
    assert record == Record("a", "hi", {"tag": 1, "n": 2})


def test_the_fields_for_id_and_text_can_be_chosen() -> None:
    (record,) = parsed("json", b'{"id": 1, "key": "k", "text": "no", "body": "yes"}', Fields("key", "body"))
    assert record == Record("k", "yes", {"id": 1, "text": "no"})


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"id": 1, "title": "T", "content": "C"}', "T\nC"),
        ('{"id": 1, "content": "C"}', "C"),
        ('{"id": 1, "title": "", "content": "C"}', "C"),
        ('{"id": 1, "title": "T", "content": "C", "text": "X"}', "X"),
    ],
)
def test_title_and_content_are_joined_if_there_is_no_text(line: str, text: str) -> None:
    (record,) = parsed("json", line.encode())
    assert isinstance(record, Record)
    assert record.text == text


def test_blank_lines_are_skipped_but_counted() -> None:
    data = b'{"id": 1, "text": "a"}\n\n  \r\n{"id": 2, "text": "b"}\r\nx\n'
    assert summary(parsed("json", data)) == ["1", "2", "line 5"]


def test_a_line_separator_inside_a_string_does_not_end_the_line() -> None:
    (record,) = parsed("json", '{"id": 1, "text": "a\u2028b\x85c"}'.encode())
    assert record == Record(1, "a\u2028b\x85c")


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"{", id="cut off"),
        pytest.param(b'{"id": 2, "text": "b"', id="cut off behind a value"),
        pytest.param(b'{"id": 2, "text": "b"} {}', id="two values"),
        pytest.param(b'{"id": 2, "text": "b", "x": NaN}', id="NaN"),
        pytest.param(b'{"id": 2, "text": "b", "x": -Infinity}', id="Infinity"),
        pytest.param(b'{"id": 2, "text": "b", "x": ' + b"9" * 5_000 + b"}", id="5,000 digits"),
        pytest.param(b'{"id": 2, "text": "b", "x": ' + b"[" * 100_000, id="too deep"),
        pytest.param(b'{"id": 2, "id": 3, "text": "b"}', id="a key twice"),
        pytest.param(b'{"id": 2, "text": "\\ud800"}', id="half a surrogate pair"),
        pytest.param(b'{"id": 2, "text": "caf\xe9"}', id="latin-1"),
        pytest.param(b'["id", "text"]', id="an array"),
        pytest.param(b'"text"', id="a string"),
        pytest.param(b"null", id="null"),
        pytest.param(b'{"text": "b"}', id="no id"),
        pytest.param(b'{"id": null, "text": "b"}', id="id null"),
        pytest.param(b'{"id": "", "text": "b"}', id="id empty"),
        pytest.param(b'{"id": true, "text": "b"}', id="id true"),
        pytest.param(b'{"id": 1.0, "text": "b"}', id="id a float"),
        pytest.param(b'{"id": [1], "text": "b"}', id="id a list"),
        pytest.param(b'{"id": 2}', id="no text"),
        pytest.param(b'{"id": 2, "text": null}', id="text null"),
        pytest.param(b'{"id": 2, "text": 5}', id="text a number"),
        pytest.param(b'{"id": 2, "text": ""}', id="text empty"),
        pytest.param(b'{"id": 2, "title": 5, "content": "c"}', id="title a number"),
        pytest.param(b'{"id": 2, "title": "", "content": ""}', id="title and content empty"),
        pytest.param(b"x" * (MAX_LINE_BYTES + 1), id="too long"),
    ],
)
def test_a_broken_json_line_fails_alone(line: bytes) -> None:
    good = b'{"id": %d, "text": "a"}'
    found = parsed("json", b"\n".join([good % 1, line, good % 3]), block=262_144)
    assert summary(found) == ["1", "line 2", "3"]


def test_a_cut_off_last_line_fails_alone() -> None:
    assert summary(parsed("json", b'{"id": 1, "text": "a"}\n{"id": 2, "te')) == ["1", "line 2"]


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ('{"x": oops}', InvalidRecordError, "x line 1: is not JSON: expected value at column 7"),
        (
            '{"secret": 1, "secret": 2}',
            InvalidRecordError,
            "x line 1: is not JSON: Detected duplicate key at column 24",
        ),
        ("[1]", InvalidRecordError, "x line 1: holds a JSON list; a record is an object"),
        ("{}", InvalidRecordError, 'x line 1: field "id" is missing or null; an id is a str or an int'),
        ('{"id": 5}', InvalidRecordError, 'x line 1: field "text" is missing or null'),
        ('{"id": 5, "text": 7}', WrongTypeError, 'x line 1: field "text" is int; a text is a str'),
        ('{"id": 5, "text": ""}', InvalidTextError, 'x line 1: field "text" is empty'),
    ],
)
def test_errors_name_line_field_and_column_but_quote_nothing(line: str, kind: type[InputError], message: str) -> None:
    error = only(parsed("json", line.encode()))
    assert type(error) is kind
    assert str(error) == message


def test_an_error_has_the_id_of_its_record_if_it_is_known() -> None:
    assert only(parsed("json", b'{"id": "a-17"}')).record_id == "a-17"
    assert only(parsed("json", b'{"text": "t"}')).record_id is None


def test_complete_lines_of_a_pipe_are_parsed_before_it_is_read_again() -> None:
    sent = iter([b'{"id": 1, "text": "a"}\n{"id"', b': 2, "text": "b"}\n', b""])
    items = json_records(line_blocks(lambda: next(sent)), "x", Fields())
    assert next(items) == Record(1, "a")
    assert next(items) is None  # before the pipe is read again


# ---- CSV ----


def test_columns_beside_id_and_text_are_metadata() -> None:
    (record,) = parsed("csv", b"id,tag,text\n7,a,hi\n")
    assert record == Record("7", "hi", {"tag": "a"})


@pytest.mark.parametrize("seed", range(20))
def test_all_output_of_the_csv_module_can_be_read(seed: int) -> None:
    rng = random.Random(seed)
    texts = ["".join(rng.choice('ab ,"\n\r\u2028é') for _ in range(rng.randint(1, 30))) for _ in range(50)]
    out = io.StringIO(newline="")
    # with "\n" as the line end, the writer treats a lone "\r" as a letter, and quotes it only on request
    style = rng.choice([{"lineterminator": "\n", "quoting": csv.QUOTE_ALL}, {"lineterminator": "\r\n"}])
    rows = csv.writer(out, **style)
    rows.writerow(["id", "text"])
    rows.writerows(enumerate(texts))
    expected = [Record(str(number), text) for number, text in enumerate(texts)]
    assert parsed("csv", out.getvalue().encode(), block=rng.randint(1, 50)) == expected


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_change_nothing_in_csv() -> None:
    data = b"\xef\xbb\xbfid,text\r\n\r\n1,a\r\n\r\n2,b"
    assert parsed("csv", data) == [Record("1", "a"), Record("2", "b")]


def test_a_field_over_the_csv_modules_limit_is_read_without_changing_the_limit() -> None:
    limit = csv.field_size_limit()
    text = "x" * (limit + 10)
    assert parsed("csv", f"id,text\n1,{text}\n".encode(), block=65_536) == [Record("1", text)]
    assert csv.field_size_limit() == limit


def test_threads_that_read_wide_fields_at_once_do_not_change_the_limit() -> None:
    limit = csv.field_size_limit()
    data = b"id,text\n" + b"".join(b"%d,%s\n" % (n, b"x" * (limit + 1)) for n in range(5))
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda: results.append(len(parsed("csv", data, block=65_536)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [5] * 4
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"2", "x line 3: the row has 1 fields, the header 2"),
        (b"2,b,c", "x line 3: the row has 3 fields, the header 2"),
        (b'2,"b"c', "x line 3: ',' expected after '\"'"),
        (b"2,caf\xe9", "x line 3: has 0xe9 at byte 6, which is not UTF-8"),
        (b'2,"b\nb\xe9"', "x line 3 to 4: has 0xe9 at byte 2, which is not UTF-8"),
        (b"2,a\0b", "x line 3: has a NUL at byte 4, so it is not text"),
        (b"2,b\rc", "x line 3: new-line character seen in unquoted field"),
        (b",b", 'x line 3: field "id" is empty; an id is a str or an int'),
        (b"2,", 'x line 3: field "text" is empty'),
    ],
)
def test_a_broken_row_fails_alone_with_the_numbers_of_its_lines(row: bytes, message: str) -> None:
    first, error, last = parsed("csv", b"id,text\n1,a\n" + row + b"\n3,c\n")
    assert first == Record("1", "a")
    assert str(error) == message
    assert last == Record("3", "c")


def test_a_quote_that_is_closed_in_a_later_row_costs_the_rows_between() -> None:
    data = b'id,text\n1,a\n2,"b\n3,c\n4,"d"\n5,e\n'
    first, error, last = parsed("csv", data)
    assert first == Record("1", "a")
    assert str(error) == "x line 3 to 5: ',' expected after '\"'"
    assert last == Record("5", "e")


def raised(data: bytes) -> tuple[list[RecordOrError], str]:
    file = io.BytesIO(data)
    found: list[RecordOrError] = []
    with pytest.raises(InvalidRecordError) as caught:
        for item in csv_records(line_blocks(lambda: file.read(262_144)), "x", Fields()):
            found.append(item)  # noqa: PERF402 - records before the error are kept
    return found, str(caught.value)


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(b"3,c\n4,d\n", id="to the end"),
        pytest.param(b"3,cccccccccc\n" * (MAX_LINE_BYTES // 12), id="for longer than a row may be"),
    ],
)
def test_a_quote_that_is_never_closed_ends_the_file_but_keeps_earlier_rows(rest: bytes) -> None:
    found, message = raised(b'id,text\n1,a\n2,"b\n' + rest)
    assert found == [Record("1", "a")]
    assert message == "line 3: a quote is opened and not closed; not read on from there"


def test_a_line_of_csv_that_is_too_long_ends_the_file() -> None:
    found, message = raised(b"id,text\n1,a\n2," + b"x" * MAX_LINE_BYTES + b"\n3,c\n")
    assert found == [Record("1", "a")]
    assert message == "line 3: is longer than 16,777,216 bytes; not read on from there"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"key,text", 'line 1: the header has no "id" among its 2 columns (they are separated by commas)'),
        (b"id;text", 'line 1: the header has no "id" among its 1 columns (they are separated by commas)'),
        (b"id,text,text", "line 1: the header names one of its 3 columns twice"),
        (b"id,t\xe9xt", "line 1: has 0xe9 at byte 5, which is not UTF-8"),
    ],
)
def test_an_unusable_header_fails_once_and_not_for_every_row(header: bytes, message: str) -> None:
    assert raised(header + b"\n1,a\n2,b\n") == ([], message)


def test_a_missing_text_column_is_named() -> None:
    with pytest.raises(InvalidRecordError, match=r'^line 1: the header has no "text" among its 2 columns$'):
        parsed("csv", b"id,body\n1,a\n")


def test_one_field_for_both_id_and_text_is_refused() -> None:
    with pytest.raises(ConfigError, match='both "text"'):
        Fields("text", "text")


@pytest.mark.parametrize("data", [b"", b"\n\n", b"id,text\n"])
def test_an_empty_csv_file_has_no_records(data: bytes) -> None:
    assert parsed("csv", data) == []


@pytest.mark.parametrize("kind", ["json", "csv"])
@pytest.mark.parametrize("seed", range(30))
def test_random_bytes_raise_only_our_errors(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    good = {"json": json.dumps({"id": 1, "text": "a"}).encode() + b"\n", "csv": b'id,text\n1,"a\nb"\n'}[kind]
    data = bytearray(good * 5)
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] = rng.choice(b'\x00\xff",\n\r{}[]1a\xef')
    try:
        found = parsed(kind, bytes(data))
    except InvalidRecordError:
        return
    assert all(isinstance(item, Record | InputError) for item in found)
