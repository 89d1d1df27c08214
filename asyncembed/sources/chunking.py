"""Markdown and plain text to chunks: at headings first, then at paragraphs, up to so many tokens each.

A heading of Markdown starts a section, and a section's chunks are numbered by themselves: whatever is edited in
one section, the ids in all others stay. The slug is the one GitHub links to, so `docs/design.md#limits-2` is the
second chunk of what `docs/design.md#limits` shows; text before the first heading has the slug `top`.

Blocking and lazy: what is held of a file is a window of some chunks, whatever the file's length.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby, pairwise
from typing import Any, Final, NamedTuple

from ..errors import ConfigError, InvalidRecordError
from ..types import Record

# Text before the first heading of a Markdown file. Kept free for it, so that adding such a text to a file that
# has a heading "Top" changes no id.
TOP: Final = "top"

# Front matter that is longer (in lines) is taken for a rule and some text: Jekyll's and Hugo's have 5 to 50.
_FRONT_MATTER_LINES: Final = 200

# The splitter's time grows with the square of what it is given at once (64,000 Chinese characters without a stop:
# 2.4 s, 256,000: 37 s, measured 2026-11), so it gets windows of some chunks. Characters; the least, and a token.
_WINDOW: Final = 8_192
_WINDOW_PER_TOKEN: Final = 16

# CommonMark 0.31, 4.2, 4.3 and 4.5: up to three spaces before a heading, an underline or a fence.
_ATX = re.compile(r" {0,3}#{1,6}(?![^ \t])")
_UNDERLINE = re.compile(r" {0,3}(?:=+|-+)[ \t]*$")
_PARAGRAPH = re.compile(r" {0,3}(?![#>|<+*-]|\d+[.)]|=+\s*$|```|~~~)\S")
_FENCE = re.compile(r" {0,3}(?P<fence>`{3,}(?=[^`]*$)|~{3,})")
# No bracket within its text, and one pair within its address, or a line of them would take the square of its length.
_LINK = re.compile(r"!?\[([^\[\]]*)\]\((?:[^()]|\([^()]*\))*\)")

# A longer slug is cut, so that an id stays one (`storable.MAX_ID_BYTES`). Characters.
_LONGEST_SLUG: Final = 200


class Line(NamedTuple):
    """One line of a text file: its number from 1, its text with its line end, what is wrong with it."""

    number: int
    text: str
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Heading:
    """Where a section begins. `slug` is unique in its file; `title` is None before the first heading."""

    slug: str
    title: str | None


class Splitter:
    """Cuts texts at the best places so that no piece has more tokens than wanted.

    Args:
        chunk_tokens: The most tokens a chunk has, counted with cl100k_base.

    Raises:
        ConfigError: `chunk_tokens` is under 1, or the extra `cli` is not installed.
    """

    def __init__(self, chunk_tokens: int) -> None:
        if chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens={chunk_tokens}; a chunk has at least 1 token")
        try:
            import semantic_text_splitter as splitters
        except ImportError as error:
            raise ConfigError('text files need a splitter: pip install "asyncembed[cli]"') from error
        # The vocabulary is inside the wheel. The name only chooses it.
        self.markdown: Any = splitters.MarkdownSplitter.from_tiktoken_model("text-embedding-3-small", chunk_tokens)
        self.plain: Any = splitters.TextSplitter.from_tiktoken_model("text-embedding-3-small", chunk_tokens)
        self.window = max(_WINDOW, _WINDOW_PER_TOKEN * chunk_tokens)


def markdown_chunks(lines: Iterable[Line], path: str, splitter: Splitter) -> Iterator[Record | InvalidRecordError]:
    """Yield a record for each chunk of a Markdown file; an error for the rest of a section that is broken."""
    for heading, section in groupby(_under_headings(lines), key=lambda pair: pair[0]):
        metadata = {"source": path} if heading.title is None else {"source": path, "heading": heading.title}
        numbered = (line for _, line in section)
        yield from _records(numbered, f"{path}#{heading.slug}-", metadata, splitter.markdown, splitter.window)


def plain_chunks(lines: Iterable[Line], path: str, splitter: Splitter) -> Iterator[Record | InvalidRecordError]:
    """Yield a record for each chunk of a text file; an error for the rest of it where it is broken."""
    return _records(lines, f"{path}#", {"source": path}, splitter.plain, splitter.window)


def slug(title: str) -> str:
    """Return the anchor GitHub gives a heading, "section" if nothing is left of it."""
    plain = _LINK.sub(r"\1", title).strip().lower()
    anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-") or "section"
    if len(anchor) <= _LONGEST_SLUG:
        return anchor
    return f"{anchor[:_LONGEST_SLUG]}-{hashlib.sha256(anchor.encode()).hexdigest()[:8]}"


def _records(
    lines: Iterable[Line], prefix: str, metadata: dict[str, Any], splitter: Any, window: int
) -> Iterator[Record | InvalidRecordError]:
    for number, (line, text) in enumerate(_chunks(lines, splitter, window), start=1):
        id = f"{prefix}{number}"
        if isinstance(text, str):
            yield Record(id, text, {**metadata, "line": line})
        else:
            error = InvalidRecordError(f"{metadata['source']} line {line}: {text.problem}; not read on from there")
            error.record_id = id
            yield error


def _chunks(lines: Iterable[Line], splitter: Any, window: int) -> Iterator[tuple[int, str | Line]]:
    """Yield the chunks, each with the number of its first line; a broken line instead of it and all that follows.

    Of each window all chunks but the last are final; that one is seen again with what follows it, so that chunks
    end where the text asks for it, not where windows do.
    """
    held = _Held(splitter)
    for line in lines:
        if line.problem is not None:
            yield from held.cut(keep_last=False)
            yield line.number, line
            return
        for start in range(0, len(line.text), window):
            held.add(line.number, line.text[start : start + window])
            if held.size >= window:
                # what is still one chunk after four windows is mostly blanks, and will not become another
                yield from held.cut(keep_last=held.size < 4 * window)
    yield from held.cut(keep_last=False)


@dataclass(slots=True)
class _Held:
    """The text that is not yet yielded, and the number of its first line."""

    splitter: Any
    line: int = 0
    parts: list[str] = field(default_factory=list)
    size: int = 0

    def add(self, line: int, text: str) -> None:
        if not self.parts:
            self.line = line
        self.parts.append(text)
        self.size += len(text)

    def cut(self, *, keep_last: bool) -> Iterator[tuple[int, str]]:
        """Yield its chunks, each with its first line's number; the last one may stay held."""
        text, line, seen = "".join(self.parts), self.line, 0
        self.parts, self.size = [], 0
        chunks = self.splitter.chunk_indices(text)
        for index, (offset, chunk) in enumerate(chunks, start=1):
            line, seen = line + text.count("\n", seen, offset), offset
            if keep_last and index == len(chunks):
                self.add(line, text[offset:])
            else:
                yield line, chunk


def _under_headings(lines: Iterable[Line]) -> Iterator[tuple[Heading, Line]]:
    """Yield each line with the heading of its section; the heading's own line is the first of them."""
    slugs = _Slugs()
    heading, fence = Heading(TOP, None), None
    front, rest = _front_matter(iter(lines))
    yield from ((heading, line) for line in front)
    before = ""
    for line, following in pairwise(chain(rest, [Line(0, "")])):
        text = line.text.rstrip("\r\n")
        if fence is not None:
            fence = None if _closes(text, fence) else fence
        elif found := _FENCE.match(text):
            fence = found["fence"]
        elif (title := _title(before, text, following.text)) is not None:
            heading = Heading(slugs.unique(title), title)
            text = ""  # a heading ends a paragraph as a blank line does
        before = text
        yield heading, line


def _title(before: str, text: str, following: str) -> str | None:
    if atx := _ATX.match(text):
        title = text[atx.end() :].strip(" \t")
        inner = title.rstrip("#")
        # a closing run of # stands alone or behind a blank
        return inner.strip() if not inner or inner[-1] in " \t" else title.strip()
    # Only a paragraph of one line is taken for an underlined heading: of more, it is mostly a rule or a table.
    if not before.strip() and _PARAGRAPH.match(text) and _UNDERLINE.match(following.rstrip("\r\n")):
        return text.strip()
    return None


def _closes(text: str, fence: str) -> bool:
    inner = text.strip()
    return len(text) - len(text.lstrip(" ")) < 4 and len(inner) >= len(fence) and set(inner) == {fence[0]}


def _front_matter(lines: Iterator[Line]) -> tuple[list[Line], Iterator[Line]]:
    """Take YAML front matter off: a `#` in it is a comment. It belongs to the text before the first heading."""
    taken: list[Line] = []
    for line in lines:
        taken.append(line)
        mark = line.text.rstrip()
        if len(taken) == 1:
            if mark != "---":
                break
        elif mark in ("---", "..."):
            return taken, lines
        elif len(taken) > _FRONT_MATTER_LINES:
            break
    return [], chain(taken, lines)


class _Slugs:
    """Slugs used in one file: a second "Limits" becomes `limits-1`, as on GitHub."""

    def __init__(self) -> None:
        self._used = {TOP: 0}

    def unique(self, title: str) -> str:
        base = unique = slug(title)
        while unique in self._used:
            self._used[base] += 1
            unique = f"{base}-{self._used[base]}"
        self._used[unique] = 0
        return unique
