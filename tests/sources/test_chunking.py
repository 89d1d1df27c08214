"""Chunks of Markdown and plain text: where they begin, their ids, and that an edit changes no other id."""

from __future__ import annotations

import random
import re
import tracemalloc
from collections.abc import Iterable

import pytest

from asyncembed.errors import ConfigError, InvalidRecordError
from asyncembed.sources.chunking import TOP, Line, Splitter, markdown_chunks, plain_chunks, slug
from asyncembed.types import Record


def lines(text: str) -> list[Line]:
    return [Line(number, line + "\n") for number, line in enumerate(text.split("\n"), start=1)]


def markdown(text: str, chunk_tokens: int = 512) -> list[Record]:
    return records(markdown_chunks(lines(text), "a.md", Splitter(chunk_tokens)))


def plain(text: str, chunk_tokens: int = 512) -> list[Record]:
    return records(plain_chunks(lines(text), "a.txt", Splitter(chunk_tokens)))


def records(items: Iterable[Record | InvalidRecordError]) -> list[Record]:
    found = list(items)
    assert all(isinstance(item, Record) for item in found)
    return [item for item in found if isinstance(item, Record)]


def ids(found: Iterable[Record]) -> list[str]:
    return [str(record.id) for record in found]


def test_each_heading_starts_a_chunk_with_its_slug_as_id() -> None:
    found = markdown("# Title\n\nOne.\n\n## Limits\n\nTwo.\n")
    assert ids(found) == ["a.md#title-1", "a.md#limits-1"]
    assert [record.text for record in found] == ["# Title\n\nOne.", "## Limits\n\nTwo."]
    assert [record.metadata for record in found] == [
        {"source": "a.md", "heading": "Title", "line": 1},
        {"source": "a.md", "heading": "Limits", "line": 5},
    ]


def test_text_before_the_first_heading_has_the_slug_top() -> None:
    found = markdown("Hello.\n\n# Top\n\nOne.")
    assert ids(found) == [f"a.md#{TOP}-1", "a.md#top-1-1"]
    assert found[0].metadata == {"source": "a.md", "line": 1}


def test_adding_text_before_a_heading_called_top_does_not_rename_it() -> None:
    assert ids(markdown("# Top\n\nOne.")) == ["a.md#top-1-1"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("```sh\n# comment\n```", id="in a fence"),
        pytest.param("~~~\n# comment\n```\n# comment\n~~~", id="in a fence of tildes that holds another"),
        pytest.param("````\n```\n# comment\n```\n````", id="in a longer fence"),
        pytest.param("```\n# comment", id="in a fence that is never closed"),
        pytest.param("```\n# comment\n    ```\n# comment\n```", id="an indented fence closes nothing"),
        pytest.param("    # code", id="indented by four"),
        pytest.param("#hashtag", id="without a space"),
        pytest.param("####### seven", id="seven marks"),
        pytest.param("text\ntext\n---", id="a rule under a paragraph of two lines"),
        pytest.param("- item\n---", id="a rule under a list"),
        pytest.param("a | b\n--- | ---\n1 | 2", id="a table"),
        pytest.param("text\n\n---\n\ntext", id="a rule"),
    ],
)
def test_a_line_that_is_not_a_heading_starts_no_section(text: str) -> None:
    assert ids(markdown(f"# Real\n\n{text}\n")) == ["a.md#real-1"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("## Limits ##", "limits", id="closing marks"),
        pytest.param("   # Limits", "limits", id="three spaces"),
        pytest.param("#\tLimits", "limits", id="a tab"),
        pytest.param("Limits\n===", "limits", id="underlined"),
        pytest.param("Limits\n---", "limits", id="underlined, second level"),
        pytest.param("#", "section", id="no title"),
        pytest.param("# !!!", "section", id="nothing left of it"),
        pytest.param("# C# and F#", "c-and-f", id="marks inside"),
        pytest.param("# Größe 大小", "größe-大小", id="letters of all scripts"),
    ],
)
def test_headings_follow_commonmark(text: str, expected: str) -> None:
    assert ids(markdown(f"{text}\n\nOne.\n")) == [f"a.md#{expected}-1"]


def test_a_heading_after_a_closed_fence_is_found() -> None:
    assert ids(markdown("```\n# no\n```\n# Yes\n")) == ["a.md#top-1", "a.md#yes-1"]


def test_windows_line_ends_are_kept_in_texts_but_not_in_ids() -> None:
    found = markdown("# Title\r\n\r\nOne.\r\nTwo.\r\n\r\nNext\r\n====\r\n")
    assert ids(found) == ["a.md#title-1", "a.md#next-1"]
    assert found[0].text == "# Title\r\n\r\nOne.\r\nTwo."


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Ctrl-C, and what it does", "ctrl-c-and-what-it-does"),
        ("The `embed_one` call", "the-embed_one-call"),
        ("See [the guide](https://example.org/a(b))", "see-the-guide"),
        ("a  b", "a--b"),
    ],
)
def test_slugs_are_those_of_github(title: str, expected: str) -> None:
    assert slug(title) == expected


def test_headings_with_the_same_title_get_different_ids() -> None:
    found = markdown("# A\n\n1\n\n# A\n\n2\n\n# A 1\n\n3\n\n# A\n\n4\n")
    assert ids(found) == ["a.md#a-1", "a.md#a-1-1", "a.md#a-1-1-1", "a.md#a-2-1"]
    assert len(set(ids(found))) == len(found)


def test_front_matter_has_no_headings_and_belongs_to_the_text_before_the_first() -> None:
    found = markdown("---\ntitle: T\n# a comment\n\nnote: x\n---\n# Real\n\nOne.")
    assert ids(found) == ["a.md#top-1", "a.md#real-1"]
    assert "title: T" in found[0].text


def test_a_rule_at_the_beginning_is_not_front_matter() -> None:
    assert ids(markdown("---\n\n# Real\n\nOne.")) == ["a.md#top-1", "a.md#real-1"]


def test_editing_one_section_changes_no_id_of_another() -> None:
    long = "\n\n".join(f"Paragraph {n} of words that say little." for n in range(60))
    before = markdown(f"# A\n\n{long}\n\n# B\n\n{long}\n\n# A\n\nend\n", chunk_tokens=64)
    after = markdown(f"# A\n\nshort\n\n# B\n\n{long}\n\n# A\n\nend\n", chunk_tokens=64)
    assert len(before) > len(after) > 3
    others = [(record.id, record.text) for record in before if not re.fullmatch(r"a\.md#a-\d+", str(record.id))]
    assert others == [(record.id, record.text) for record in after if record.id != "a.md#a-1"]


def test_chunks_stay_within_their_tokens_and_lose_no_word() -> None:
    import toktok

    text = "\n\n".join(" ".join(f"word{n}" for n in range(i, i + 40)) for i in range(0, 4_000, 40))
    found = plain(text, chunk_tokens=100)
    assert ids(found) == [f"a.txt#{n}" for n in range(1, len(found) + 1)]
    assert max(toktok.batch_count([record.text for record in found], "cl100k_base")) <= 100
    assert " ".join(record.text for record in found).split() == text.split()


def test_no_chunk_ends_because_a_window_does() -> None:
    # 8 windows of text, each paragraph of 13 lines one chunk: a cut at the end of a window would split some
    paragraphs = [f"Paragraph {n}.\n" + "Some sentence of it.\n" * 12 for n in range(256)]
    found = plain("\n\n".join(paragraphs), chunk_tokens=90)
    assert [record.text for record in found] == [paragraph.strip() for paragraph in paragraphs]


def test_every_chunk_has_its_line_in_the_metadata() -> None:
    text = "\n".join(f"line {n}\n" for n in range(1, 3_000))
    every = text.split("\n")
    for record in plain(text, chunk_tokens=50):
        assert record.metadata is not None
        assert every[record.metadata["line"] - 1] == record.text.split("\n")[0]


@pytest.mark.parametrize("seed", range(20))
def test_random_markdown_keeps_its_words_and_gets_unique_ids(seed: int) -> None:
    rng = random.Random(seed)
    blocks = [
        "# A",
        "## B b",
        "text " * 30,
        "```\n# x\n```",
        "- item\n- item",
        "C\n===",
        "| a |\n|---|\n| 1 |",
        "   ",
        "",
    ]
    text = "\n\n".join(rng.choice(blocks) for _ in range(rng.randint(0, 60)))
    found = markdown(text, chunk_tokens=rng.choice([16, 64, 512]))
    assert len(set(ids(found))) == len(found)
    assert re.sub(r"\s", "", "".join(record.text for record in found)) == re.sub(r"\s", "", text)


def test_a_large_markdown_file_is_cut_in_little_memory() -> None:
    paragraph = "Some words of a paragraph. " * 40 + "\n"
    lines = (Line(number, paragraph if number % 2 else f"# Title {number}\n") for number in range(1, 10_001))
    splitter, count = Splitter(512), 0
    tracemalloc.start()
    try:
        for _ in markdown_chunks(lines, "a.md", splitter):
            count += 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 5_001
    assert peak < 2e6  # of 5.5 MB


@pytest.mark.parametrize("text", ["", "\n\n", "   \n\t\n"])
def test_an_empty_file_has_no_chunks(text: str) -> None:
    assert markdown(text) == plain(text) == []


@pytest.mark.parametrize(
    "text", [pytest.param("x" + " " * 400_000, id="blanks"), pytest.param("a" * 200_000, id="one word")]
)
def test_a_very_long_line_is_cut_and_not_lost(text: str) -> None:
    found = plain(text)
    assert "".join(record.text for record in found) == text.strip()


def test_a_broken_line_costs_only_the_rest_of_its_section() -> None:
    broken = [
        *lines("# A\n\nGood.\n"),
        Line(5, "caf?\n", "has 0xe9 at byte 4, which is not UTF-8"),
        Line(6, "More.\n"),
        Line(7, "# B\n"),
        Line(8, "Fine.\n"),
    ]
    first, error, last = markdown_chunks(broken, "a.md", Splitter(512))
    assert isinstance(first, Record)
    assert (first.id, first.text) == ("a.md#a-1", "# A\n\nGood.")
    assert isinstance(error, InvalidRecordError)
    assert str(error) == "a.md line 5: has 0xe9 at byte 4, which is not UTF-8; not read on from there"
    assert error.record_id == "a.md#a-2"
    assert isinstance(last, Record)
    assert last.id == "a.md#b-1"


def test_chunks_of_zero_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="chunk_tokens=0"):
        Splitter(0)


def test_a_missing_splitter_is_reported_with_the_command_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "semantic_text_splitter", None)
    with pytest.raises(ConfigError, match=r'pip install "asyncembed\[cli\]"'):
        Splitter(512)


@pytest.mark.parametrize("line", ["# a" + " " * 400_000 + "x", "# " + "[" * 400_000, "# " + "[a](" * 100_000])
def test_the_time_for_a_heading_is_linear_in_its_length(line: str) -> None:
    # quadratic time would be a minute, or hours
    records = list(markdown_chunks([Line(1, line + "\n"), Line(2, "text\n")], "a.md", Splitter(512)))
    assert all(isinstance(record, Record) for record in records)


def test_long_headings_make_different_ids_that_stores_can_hold() -> None:
    titles = ["word " * 600 + end for end in ("one", "two")]
    first, second = (slug(title) for title in titles)
    assert first != second
    assert len(first.encode()) < 300 > len(second.encode())


@pytest.mark.parametrize(
    ("line", "title"),
    [
        ("# a #", "a"),
        ("# a#", "a#"),
        ("## ##", ""),
        ("#", ""),
        ("# #", ""),
        ("#\ta  ##  ", "a"),
        ("   ### a # b ##", "a # b"),
        ("#a", None),
        ("    # a", None),
        ("####### a", None),
    ],
)
def test_closing_marks_of_a_heading_are_not_in_its_title(line: str, title: str | None) -> None:
    (found,) = markdown(f"{line}\n")
    assert (found.metadata or {}).get("heading") == title
