"""What the command shows: progress on standard error, results on standard output.

Ids and texts come from anywhere, so nothing is printed that a terminal would obey.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, Protocol

from ..errors import AsyncEmbedError, InvalidRecordError
from ..report import IngestReport, Plan, Progress
from ..types import Failure, Hit

# A log of a night's run stays readable: 720 lines an hour.
LINE_EVERY_S: Final = 5.0

FAILURES_SHOWN: Final = 10
_LINES_OF_A_HIT: Final = 2


class Display(Protocol):
    """Shows how far a run is."""

    def update(self, progress: Progress) -> None: ...

    def say(self, line: str) -> None: ...


class Nothing:
    """For machines: they wait for the end."""

    def update(self, progress: Progress) -> None:
        """Show nothing."""

    def say(self, line: str) -> None:
        """Say nothing."""


class Lines:
    """For logs: a line now and then."""

    def __init__(self) -> None:
        self._last_s = 0.0

    def update(self, progress: Progress) -> None:
        """Print a line, if the last one is LINE_EVERY_S ago."""
        if progress.elapsed_s - self._last_s >= LINE_EVERY_S:
            self._last_s = progress.elapsed_s
            self.say(str(progress))

    def say(self, line: str) -> None:
        print_error(line)


class Bar:
    """For a terminal: a bar, the rate, and the time that is left."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)

    def update(self, progress: Progress) -> None:
        """Redraw the bar."""
        rate = progress.done / progress.elapsed_s if progress.elapsed_s else 0.0
        total = "" if progress.total is None else f" of {progress.total:,}"
        failed = f", {progress.failed:,} failed" if progress.failed else ""
        counts = f"{progress.done:,}{total}, {rate:,.0f}/s{failed}"
        self._progress.update(self._task, completed=progress.done, total=progress.total, description=counts)

    def say(self, line: str) -> None:
        self._progress.console.print(printable(line), markup=False, highlight=False)


@contextmanager
def display(*, silent: bool) -> Iterator[Display]:
    """Show what suits standard error: a bar, lines, or nothing. Warnings of the library are shown there, too."""
    if silent:
        with _warnings_to(lambda line: None):
            yield Nothing()
    elif sys.stderr is None or not sys.stderr.isatty():
        with _warnings_to(print_error):
            yield Lines()
    else:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = BarColumn(), TextColumn("{task.description}", markup=False), TimeRemainingColumn()
        with RichProgress(*columns, console=Console(stderr=True), transient=True) as progress:
            bar = Bar(progress)
            with _warnings_to(bar.say):
                yield bar


@contextmanager
def _warnings_to(say: Callable[[str], None]) -> Iterator[None]:
    """Hand the library's warnings to the display, which knows where the cursor is."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(f"asyncembed: {record.getMessage()}")

    logger, handler = logging.getLogger("asyncembed"), Handler(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def with_total(progress: Progress, expected: int | None) -> Progress:
    """Return the progress with the number of records that is expected, at least those that are done."""
    if progress.total is not None or expected is None:
        return progress
    return dataclasses.replace(progress, total=max(expected, progress.done))


def failure_lines(failures: Sequence[Failure]) -> Iterator[str]:
    """Yield a line for each of the first failures, and one for how many more there are."""
    for failure in failures[:FAILURES_SHOWN]:
        yield f"failed: {_place(failure)}{failure.error}"
    if len(failures) > FAILURES_SHOWN:
        yield f"failed: {len(failures) - FAILURES_SHOWN:,} more"


def _place(failure: Failure) -> str:
    id = _id(failure)
    if id is not None:
        return f"{id}: "
    # a source names file and line itself
    return "" if isinstance(failure.error, InvalidRecordError) else f"record {failure.index}: "


def _id(failure: Failure) -> Any:
    return failure.id if failure.id is not None else getattr(failure.error, "record_id", None)


def hit_lines(hits: Iterable[Hit]) -> Iterator[str]:
    """Yield the lines that show search results: score, id, and how the text begins."""
    width = max(shutil.get_terminal_size().columns, 40) - 9
    for hit in hits:
        yield f"{hit.score:7.4f}  {hit.id}"
        text = [line.strip() for line in (hit.text or "").splitlines() if line.strip()]
        for line in text[:_LINES_OF_A_HIT]:
            yield " " * 9 + (line if len(line) <= width else f"{line[: width - 1]}…")


def hit_document(hit: Hit) -> dict[str, Any]:
    """Return what JSON says of a hit."""
    return {"id": hit.id, "score": hit.score, "text": hit.text, "metadata": hit.metadata}


def report_document(report: IngestReport, stopped_by: str | None, error: AsyncEmbedError | None) -> dict[str, Any]:
    """Return what JSON says of an ingest. `stopped_by` is a signal's name."""
    return {
        "seen": report.seen,
        "success_count": report.success_count,
        "skipped_count": report.skipped_count,
        "failed_count": report.failed_count,
        "pruned_count": report.pruned_count,
        "failures": [_failure_document(failure) for failure in report.failures],
        "total_tokens": report.total_tokens,
        "requests": report.requests,
        "retries": report.retries,
        "elapsed_s": round(report.elapsed_s, 3),
        "cost_usd": report.cost_usd,
        "stopped_by": stopped_by,
        "error": None if error is None else error_document(error),
    }


def error_document(error: Exception) -> dict[str, Any]:
    """Return what JSON says of an error."""
    return {"error": type(error).__name__, "message": str(error)}


def plan_document(plan: Plan) -> dict[str, Any]:
    """Return what JSON says of a plan."""
    document = dataclasses.asdict(dataclasses.replace(plan, failures=()))
    return document | {"failures": [_failure_document(failure) for failure in plan.failures]}


def _failure_document(failure: Failure) -> dict[str, Any]:
    id = _id(failure)
    return {
        "index": failure.index,
        "id": id if id is None or isinstance(id, int) else str(id),
        **error_document(failure.error),
    }


def print_error(line: str) -> None:
    """Print one line to standard error, and at once; that nobody reads it any more ends no run."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(printable(line), file=sys.stderr, flush=True)  # noqa: T201 - what a command is for


def print_out(line: str) -> None:
    """Print one line to standard output.

    Raises:
        AsyncEmbedError: It cannot be written.
    """
    with _output():
        print(printable(line))  # noqa: T201 - what a command is for


def print_json(document: dict[str, Any]) -> None:
    """Print the document in one line to standard output, as JSON in whichever encoding that has. Raises: as above."""
    # what `print_out` would write out is not JSON's way to write it, nor is what a stream does that lacks a character
    is_utf8 = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    with _output():
        print(json.dumps(document, ensure_ascii=not is_utf8))  # noqa: T201 - what a command is for


def flush_out() -> None:
    """Write what is printed, now, so that what goes wrong can be told. Raises: as above."""
    with _output():
        if sys.stdout is not None:
            sys.stdout.flush()


@contextmanager
def _output() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise  # the reader has seen enough; click ends quietly
    except OSError as error:
        # or Python would try once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise AsyncEmbedError(f"the output cannot be written: {error.strerror}") from None


def printable(line: str) -> str:
    """Return the line with blanks for all that is blank, and all else that is not printable written out."""
    return line if line.isprintable() else "".join(map(_printable, line))


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else character.encode("unicode_escape").decode()
