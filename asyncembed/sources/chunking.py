"""Cuts Markdown and plain text into chunks: at headings first, then at paragraphs, with a limit of tokens.

A Markdown heading starts a section, and the chunks of each section are numbered separately: editing one section changes
no id of another. The slug is GitHub's anchor for the heading, so `docs/design.md#limits-2` is the second chunk of the
section at `docs/design.md#limits`. Text before the first heading has the slug `top`.

Blocking and lazy: a window of some chunks is held, however long the file is. This is why headings are found line by
line here: markdown-it-py finds the same ones, but holds 16 bytes for each byte of the file (measured 2026-11).
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

# The slug of the text before the first heading. No heading gets it, so adding such a text to a file that has a
# heading "Top" changes no id.
TOP: Final = "top"

_FRONT_MATTER_LINES: Final = 200  # more are taken for a rule and text: Jekyll's and Hugo's have 5 to 50

# The splitter's time grows with the square of its input (64,000 Chinese characters without a stop: 2.4 s, 256,000:
# 37 s, measured 2026-11), so it gets windows of some chunks. In characters: the minimum, and for each token.
_WINDOW: Final = 8_192
_WINDOW_PER_TOKEN: Final = 16

# CommonMark 0.31, 4.2, 4.3 and 4.5: up to three spaces before a heading, an underline or a fence.
_ATX = re.compile(r" {0,3}#{1,6}(?![^ \t])")
_UNDERLINE = re.compile(r" {0,3}(?:=+|-+)[ \t]*$")
_PARAGRAPH = re.compile(r" {0,3}(?![#>|<+*-]|\d+[.)]|=+\s*$|```|~~~)\S")
_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})")
# No bracket within its text, one pair within its address: otherwise a long line would take time with its square.
_LINK = re.compile(r"!?\[([^\[\]]*)\]\((?:[^()]|\([^()]*\))*\)")

_MAX_SLUG: Final = 200  # characters, so that ids stay below `sinks.contract.MAX_ID_BYTES`


class Line(NamedTuple):
    """One line of a text file: its number (from 1), its text with its line end, and its problem or None."""

    number: int
    text: str
    problem: str | None = None


class Heading(NamedTuple):
    """The start of a section. `slug` is unique in its file; `title` is None before the first heading."""

    slug: str
    title: str | None


class Splitter:
    """Cuts texts at the best places into chunks of at most `chunk_tokens`, counted with cl100k_base.

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
        # The vocabulary is inside the wheel. The name only selects it.
        self.markdown: Any = splitters.MarkdownSplitter.from_tiktoken_model("text-embedding-3-small", chunk_tokens)
        self.plain: Any = splitters.TextSplitter.from_tiktoken_model("text-embedding-3-small", chunk_tokens)
        self.window = max(_WINDOW, _WINDOW_PER_TOKEN * chunk_tokens)


def markdown_chunks(lines: Iterable[Line], path: str, splitter: Splitter) -> Iterator[Record | InvalidRecordError]:
    """Yield a record for each chunk of a Markdown file; one error for the rest of a section with a broken line."""
    for heading, section in groupby(_under_headings(lines), key=lambda pair: pair[0]):
        metadata = {"source": path} if heading.title is None else {"source": path, "heading": heading.title}
        numbered = (line for _, line in section)
        yield from _records(numbered, f"{path}#{heading.slug}-", metadata, splitter.markdown, splitter.window)


def plain_chunks(lines: Iterable[Line], path: str, splitter: Splitter) -> Iterator[Record | InvalidRecordError]:
    """Yield a record for each chunk of a text file; one error for the rest of it after a broken line."""
    return _records(lines, f"{path}#", {"source": path}, splitter.plain, splitter.window)


def slug(title: str) -> str:
    """Return GitHub's anchor for a heading; "section" if it has no letter, digit or hyphen."""
    plain = _LINK.sub(r"\1", title).strip().lower()
    anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-") or "section"
    if len(anchor) <= _MAX_SLUG:
        return anchor
    return f"{anchor[:_MAX_SLUG]}-{hashlib.sha256(anchor.encode()).hexdigest()[:8]}"


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
    """Yield each chunk with the number of its first line; at a broken line yield that line and stop.

    All chunks of a window are final except the last one. It is split again together with the text after it, so that
    no chunk ends merely because a window did.
    """
    held = _HeldText(splitter)
    for line in lines:
        if line.problem is not None:
            yield from held.split(keep_last=False)
            yield line.number, line
            return
        for start in range(0, len(line.text), window):
            held.add(line.number, line.text[start : start + window])
            if held.size >= window:
                # a single chunk of four windows is mostly blanks: it would only grow
                yield from held.split(keep_last=held.size < 4 * window)
    yield from held.split(keep_last=False)


@dataclass(slots=True)
class _HeldText:
    """Text that is not yielded yet, and the number of its first line."""

    splitter: Any
    line: int = 0
    parts: list[str] = field(default_factory=list)
    size: int = 0

    def add(self, line: int, text: str) -> None:
        if not self.parts:
            self.line = line
        self.parts.append(text)
        self.size += len(text)

    def split(self, *, keep_last: bool) -> Iterator[tuple[int, str]]:
        """Yield its chunks, each with the number of its first line; hold the last one back if `keep_last`."""
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
    """Yield each line with the heading of its section. A heading's own line is the first of its section."""
    used = {TOP: 0}
    heading, fence, before = Heading(TOP, None), "", ""
    front, rest = _front_matter(iter(lines))
    yield from ((heading, line) for line in front)
    for line, following in pairwise(chain(rest, [Line(0, "")])):
        text = line.text.rstrip("\r\n")
        if fence:
            fence = "" if _closes(text, fence) else fence
        elif found := _FENCE.match(text):
            fence = found[1]
        elif (title := _title(before, text, following.text)) is not None:
            heading = Heading(_unique_slug(title, used), title)
            text = ""  # like a blank line, a heading ends a paragraph
        before = text
        yield heading, line


def _title(before: str, text: str, following: str) -> str | None:
    """Return the title if the line `text` is a heading, considering the lines before and after it."""
    if atx := _ATX.match(text):
        title = text[atx.end() :].strip(" \t")
        inner = title.rstrip("#")
        # closing marks stand alone or after a blank
        return inner.strip() if not inner or inner[-1] in " \t" else title.strip()
    # Only a paragraph of one line can be an underlined heading: below a longer one it is mostly a rule or a table.
    if not before.strip() and _PARAGRAPH.match(text) and _UNDERLINE.match(following.rstrip("\r\n")):
        return text.strip()
    return None


def _closes(text: str, fence: str) -> bool:
    inner = text.strip()
    return len(text) - len(text.lstrip(" ")) < 4 and len(inner) >= len(fence) and set(inner) == {fence[0]}


def _front_matter(lines: Iterator[Line]) -> tuple[list[Line], Iterator[Line]]:
    """Split YAML front matter off: a `#` in it starts a comment. It belongs to the text before the first heading."""
    taken: list[Line] = []
    for line in lines:
        taken.append(line)
        mark = line.text.rstrip()
        if len(taken) > 1 and mark in ("---", "..."):
            return taken, lines
        if (len(taken) == 1 and mark != "---") or len(taken) > _FRONT_MATTER_LINES:
            break
    return [], chain(taken, lines)


def _unique_slug(title: str, used: dict[str, int]) -> str:
    """Return the title's slug, numbered as on GitHub: a second "Limits" becomes `limits-1`. It is added to `used`."""
    base = unique = slug(title)
    while unique in used:
        used[base] += 1
        unique = f"{base}-{used[base]}"
    used[unique] = 0
    return unique
