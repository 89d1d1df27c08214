"""The commands `asyncembed ingest`, `search` and `plan`: from options to exit codes.

Exit codes: 0, everything is stored; 1, something failed; 2, the command was used wrongly; 128 plus the signal's number,
a signal ended the run. The key comes from the environment and never from the command line, which other users of the
machine can read.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import reduce, wraps
from signal import Signals
from typing import Any, Final, NoReturn, TypeAlias

import click

from .. import Embedder, __version__, errors, ingest, models, open_sink
from ..report import IngestReport
from ..sources import SUFFIXES
from . import display
from .signals import Interrupts
from .sources import FilesAndQueries

OK, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130

DEFAULT_MODEL: Final = "text-embedding-3-small"

# More than any model accepts, and no more than the splitter can count.
MAX_CHUNK_TOKENS: Final = 1_000_000

# The same command would meet these again.
_LASTING: Final = (errors.AuthenticationError, errors.PermissionDeniedError, errors.NotFoundError, errors.RequestError)

_AGAIN: Final = "run the same command again to go on: stored records are skipped"
_FINISHING: Final = (
    "asyncembed: finishing the requests under way and storing their vectors; a second signal stops at once"
)

_Command: TypeAlias = Callable[..., Any]


def _options(*options: Callable[[Any], Any]) -> Callable[[_Command], _Command]:
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)


_at_least_1 = click.IntRange(min=1)
_provider_options = _options(
    click.option("--base-url", metavar="URL", help="A server that speaks like OpenAI's. [env: OPENAI_BASE_URL]"),
    click.option("--allow-insecure-http", is_flag=True, help="For a server on a network of yours."),
    click.option("--dimensions", type=_at_least_1, help="Request vectors of this size."),
    click.option("--concurrency", type=_at_least_1, default=8, show_default=True, help="The most requests at once."),
    click.option(
        "--too-long",
        type=click.Choice(["error", "truncate", "mean"]),
        default="error",
        show_default=True,
        help="For a text over the limit of the model: fail, cut it off, or average the vectors of its pieces.",
    ),
)
_source_options = _options(
    click.argument("sources", metavar="SOURCE...", nargs=-1, required=True),
    click.option("--model", default=DEFAULT_MODEL, show_default=True, help='"local" needs no key.'),
    click.option(
        "--chunk-tokens",
        type=click.IntRange(min=1, max=MAX_CHUNK_TOKENS),
        default=512,
        show_default=True,
        help="The most tokens in a chunk of a Markdown or text file.",
    ),
    click.option("--id-field", default="id", show_default=True, help="The id in JSON objects, CSV rows and queries."),
    click.option("--text-field", default="text", show_default=True, help="The text in them."),
)


def _sources_of(options: dict[str, Any]) -> FilesAndQueries:
    """Take the options for sources out of all options."""
    return FilesAndQueries(
        **{name: options.pop(name) for name in ("sources", "id_field", "text_field", "chunk_tokens")}
    )


def _exits(report: Mapping[str, Any]) -> Callable[[_Command], _Command]:
    """Decorate a command, a coroutine function that returns the exit code, and add --json to its options.

    An error that it raises is printed. With --json, a document is printed as well: the report with the error in it.
    """

    def decorated(work: _Command) -> _Command:
        @wraps(work)
        def run(*, as_json: bool, **options: Any) -> NoReturn:
            try:
                code = asyncio.run(work(as_json=as_json, **options))
                display.flush_out()
            except KeyboardInterrupt:
                code = INTERRUPTED
            except errors.AsyncEmbedError as error:
                if as_json:
                    with suppress(errors.AsyncEmbedError):  # standard output may be the reason of the error
                        display.print_json({**report, "error": display.error_document(error)})
                        display.flush_out()
                display.print_error(f"asyncembed: {display.message_of(error)}")
                code = _code(error)
            sys.exit(code)

        return click.option("--json", "as_json", is_flag=True, help="Print one JSON document, and nothing else.")(run)

    return decorated


def _code(error: errors.AsyncEmbedError) -> int:
    return MISUSED if isinstance(error, errors.ConfigError | errors.SinkConfigError | errors.InputError) else FAILED


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="asyncembed")
def command() -> None:
    """Embed files, store the vectors, find them again.

    The key is read from OPENAI_API_KEY. With --model local no key is needed.
    """


@command.command("ingest")
@click.option("--to", "target", required=True, metavar="TARGET", help="vectors.db, or postgresql://user@host/db")
@_source_options
@_provider_options
@click.option("--prune", is_flag=True, help="At the end delete rows of this model in TARGET that no SOURCE has.")
@_exits(display.report_document(IngestReport(), None, None))
async def ingest_command(target: str, model: str, prune: bool, as_json: bool, **options: Any) -> int:
    """Embed the records of SOURCE... and store them in TARGET.

    A SOURCE is a file, a folder, a quoted glob, - for JSON Lines on standard input, or rows of PostgreSQL:
    "postgresql://user@host/db?query=SELECT id, text FROM docs". Records that TARGET already has, with the same text and
    model, are skipped.
    """
    sources = _sources_of(options)
    async with Embedder(model, **options) as embedder, open_sink(target) as sink:
        path = target.removeprefix("sqlite:///")
        await sources.check(None if "://" in path else path)
        if prune and sources.empty_folders:
            raise errors.ConfigError(
                f"{sources.empty_folders[0]} holds no file to read, and so nothing is pruned: is it mounted?"
            )
        with display.show(silent=as_json) as shown, Interrupts(lambda: shown.say(_FINISHING)) as interrupts:
            for folder in sources.empty_folders:
                shown.say(f"{folder}: no file in it ends in one of {' '.join(sorted(SUFFIXES))}")
            run = ingest(
                sources,
                embedder,
                sink,
                prune=prune,
                on_progress=lambda progress: shown.update(display.with_total(progress, sources.expected())),
                stop=interrupts.stop,
            )
            try:
                report, error = await _outcome(run)
            except asyncio.CancelledError:
                if interrupts.received is None:
                    raise
                shown.say(f"asyncembed: stopped; {_AGAIN}")
                return interrupts.exit_code
    received = interrupts.received
    if as_json:
        display.print_json(display.report_document(report, None if received is None else received.name, error))
    else:
        _print_report(report, received, error)
    if received is not None:
        return interrupts.exit_code
    if error is not None:
        return _code(error)
    return FAILED if report.failures else OK


async def _outcome(run: Coroutine[Any, Any, IngestReport]) -> tuple[IngestReport, errors.AsyncEmbedError | None]:
    """Return the report, and the error that ended the run; raise an error that came before the first record."""
    try:
        return await run, None
    except errors.AsyncEmbedError as error:
        if error.report is None or not error.report.seen:
            raise
        return error.report, error


def _print_report(report: IngestReport, received: Signals | None, error: errors.AsyncEmbedError | None) -> None:
    display.print_out(str(report))
    # the error that ended the run is printed once, and not for each record that was not finished; batches that were
    # stored at the same time may have failed with the same words
    for line in display.failure_lines([failure for failure in report.failures if str(failure.error) != str(error)]):
        display.print_error(line)
    if error is not None:
        display.print_error(f"asyncembed: {display.message_of(error)}")
    if received is not None or (error is not None and _code(error) == FAILED and not isinstance(error, _LASTING)):
        display.print_error(f"asyncembed: {_AGAIN}")


@command.command("search")
@click.argument("target")
@click.argument("query")
@click.option("-k", default=5, show_default=True, type=_at_least_1, help="How many to show.")
@click.option("--model", help="Needed if TARGET holds vectors of several models.")
@_provider_options
@_exits({})
async def search_command(target: str, query: str, k: int, model: str | None, as_json: bool, **options: Any) -> int:
    """Show the texts in TARGET that are nearest to QUERY."""
    if not query:
        raise errors.ConfigError("the query is empty")
    with display.show(silent=as_json):
        async with open_sink(target) as sink:
            stored = await sink.models()
            chosen = _choose_model(stored, model)
            known = models.lookup(chosen)
            if options["dimensions"] is None and known.shortens and known.dimensions not in (None, stored[chosen]):
                options["dimensions"] = stored[chosen]
            async with Embedder(chosen, **options) as embedder:
                vector = await embedder.embed_one(query)
            hits = await sink.search(vector, k, model=chosen)
    if as_json:
        display.print_json({"model": chosen, "hits": [asdict(hit) for hit in hits]})
    else:
        for line in display.hit_lines(hits):
            display.print_out(line)
    return OK


def _choose_model(stored: Mapping[str, int], model: str | None) -> str:
    names = ", ".join(f"{name} ({dimensions} dimensions)" for name, dimensions in stored.items())
    if not stored:
        raise errors.ConfigError("TARGET holds no vectors yet: ingest into it first")
    if model is None and len(stored) > 1:
        raise errors.ConfigError(f"TARGET holds vectors of several models; choose one with --model: {names}")
    if model is not None and model not in stored:
        raise errors.ConfigError(f"TARGET holds no vectors of {model!r}; it holds: {names}")
    return model or next(iter(stored))


@command.command("plan")
@_source_options
@_provider_options
@_exits({})
async def plan_command(model: str, as_json: bool, **options: Any) -> int:
    """Show the requests, tokens and price of embedding SOURCE... Sends nothing, needs no key."""
    sources = _sources_of(options)
    with display.show(silent=as_json):
        await sources.check()
        async with Embedder(model, api_key="plan-sends-nothing", **options) as embedder:
            plan = await embedder.plan(sources)
    if as_json:
        display.print_json(display.plan_document(plan))
    else:
        display.print_out(str(plan))
        for line in display.failure_lines(plan.failures):
            display.print_error(line)
    return FAILED if plan.failures else OK
