"""The command's output: progress and errors on standard error, results on standard output.

Ids and texts come from anywhere, so nothing is printed that could control the terminal.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final

from ..errors import AsyncEmbedError, InvalidRecordError
from ..report import IngestReport, Plan, Progress
from ..types import Failure, Hit

# At most 720 lines an hour, so that the log of a whole night can still be read.
LINE_EVERY_S: Final = 5.0

FAILURES_SHOWN: Final = 10
_LINES_OF_A_HIT: Final = 2

# Options of the library that the command has as well. Words that also occur in sentences count only before a "=".
_OPTION = re.compile(
    r"(?<![\w./-])(allow_insecure_http|base_url|chunk_tokens|id_field|text_field|too_long|"
    r"(?:concurrency|dimensions|prune)(?==))(?:=True\b|(=)|(?![\w/-]|\.\w))"
)


class Display:
    """Shows the progress of a run. This one shows nothing: a program that reads JSON waits for the end."""

    def update(self, progress: Progress) -> None:
        """Show the progress."""

    def say(self, line: str) -> None:
        """Print one line."""


class Lines(Display):
    """Prints a line every few seconds, for logs."""

    def __init__(self) -> None:
        self._last_s = 0.0

    def update(self, progress: Progress) -> None:
        if progress.elapsed_s - self._last_s >= LINE_EVERY_S:
            self._last_s = progress.elapsed_s
            self.say(str(progress))

    def say(self, line: str) -> None:
        print_error(line)


class Bar(Display):
    """Draws a bar with the rate and the remaining time, for terminals."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)

    def update(self, progress: Progress) -> None:
        rate = progress.done / progress.elapsed_s if progress.elapsed_s else 0.0
        total = "" if progress.total is None else f" of {progress.total:,}"
        failed = f", {progress.failed:,} failed" if progress.failed else ""
        counts = f"{progress.done:,}{total}, {rate:,.0f}/s{failed}"
        self._progress.update(self._task, completed=progress.done, total=progress.total, description=counts)

    def say(self, line: str) -> None:
        self._progress.console.print(printable(line), markup=False, highlight=False)


@contextmanager
def show(*, silent: bool) -> Iterator[Display]:
    """Yield the display that suits standard error. The library's warnings are shown there as well."""
    with ExitStack() as stack:
        shown = Display() if silent else Lines()
        if not silent and sys.stderr is not None and sys.stderr.isatty():
            from rich import console, progress

            text = progress.TextColumn("{task.description}", markup=False)
            columns = progress.BarColumn(), text, progress.TimeRemainingColumn()
            bar = progress.Progress(*columns, console=console.Console(stderr=True), transient=True)
            shown = Bar(stack.enter_context(bar))
        stack.enter_context(_warnings_to(shown.say))
        yield shown


@contextmanager
def _warnings_to(say: Callable[[str], None]) -> Iterator[None]:
    """Show the library's warnings through the display, which knows where the cursor is."""

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
    """Return the progress with `expected` as its total if it has none; the total is at least the number done."""
    if progress.total is not None or expected is None:
        return progress
    return dataclasses.replace(progress, total=max(expected, progress.done))


def failure_lines(failures: Sequence[Failure]) -> Iterator[str]:
    """Yield a line for each of the first failures, and one for the number of the others."""
    for failure in failures[:FAILURES_SHOWN]:
        id = _id(failure)
        # a source names file and line itself
        unnamed = "" if isinstance(failure.error, InvalidRecordError) else f"record {failure.index}: "
        yield f"failed: {unnamed if id is None else f'{id}: '}{message_of(failure.error)}"
    if len(failures) > FAILURES_SHOWN:
        yield f"failed: {len(failures) - FAILURES_SHOWN:,} more"


def _id(failure: Failure) -> Any:
    return failure.id if failure.id is not None else getattr(failure.error, "record_id", None)


def message_of(error: Exception) -> str:
    """Return the error's message with the command's options in place of the library's: `--too-long` for `too_long=`."""
    message = str(error).replace('Embedder("local")', "--model local")
    message = message.replace(", pass api_key=", "").replace("pass api_key=", "set OPENAI_API_KEY")
    return _OPTION.sub(lambda found: f"--{found[1].replace('_', '-')}{' ' if found[2] else ''}", message)


def hit_lines(hits: Iterable[Hit]) -> Iterator[str]:
    """Yield the lines of search results: score, id, and the first lines of the text."""
    width = max(shutil.get_terminal_size().columns, 40) - 9
    for hit in hits:
        yield f"{hit.score:7.4f}  {hit.id}"
        text = [line.strip() for line in (hit.text or "").splitlines() if line.strip()]
        for line in text[:_LINES_OF_A_HIT]:
            yield " " * 9 + (line if len(line) <= width else f"{line[: width - 1]}…")


def report_document(report: IngestReport, stopped_by: str | None, error: AsyncEmbedError | None) -> dict[str, Any]:
    """Return the report of an ingest as JSON. `stopped_by` is a signal's name."""
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
    """Return an error as JSON."""
    return {"error": type(error).__name__, "message": message_of(error)}


def plan_document(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON."""
    document = dataclasses.asdict(dataclasses.replace(plan, failures=()))
    return document | {"failures": [_failure_document(failure) for failure in plan.failures]}


def _failure_document(failure: Failure) -> dict[str, Any]:
    id = _id(failure)
    shown = id if id is None or isinstance(id, int) else str(id)
    return {"index": failure.index, "id": shown, **error_document(failure.error)}


def print_error(line: str) -> None:
    """Print one line to standard error, without buffering. A closed or full standard error ends no run."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(printable(line), file=sys.stderr, flush=True)  # noqa: T201 - a command prints


def print_out(line: str) -> None:
    """Print one line to standard output.

    Raises:
        AsyncEmbedError: Standard output cannot be written.
    """
    with _output():
        print(printable(line))  # noqa: T201 - a command prints


def print_json(document: dict[str, Any]) -> None:
    """Print the document as one line of JSON to standard output, whatever its encoding. Raises like `print_out`."""
    # JSON has its own escapes: neither those of `printable` nor those of a stream without the character are valid in it
    is_utf8 = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    with _output():
        print(json.dumps(document, ensure_ascii=not is_utf8))  # noqa: T201 - a command prints


def flush_out() -> None:
    """Flush standard output now, while an error can still be reported. Raises like `print_out`."""
    with _output():
        if sys.stdout is not None:
            sys.stdout.flush()


@contextmanager
def _output() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise  # the reader has closed the pipe; click ends quietly
    except OSError as error:
        # otherwise Python would try again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise AsyncEmbedError(f"the output cannot be written: {error.strerror}") from None


def printable(line: str) -> str:
    """Return the line with a blank for each whitespace character, and other unprintable characters escaped."""
    return "".join(
        each if each.isprintable() else " " if each.isspace() else each.encode("unicode_escape").decode()
        for each in line
    )
