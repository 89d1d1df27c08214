"""The web app: its routes, and the lifespan that opens one `DocumentSearch` for all of them."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.requests import ClientDisconnect

from asyncembed import AsyncEmbedError

from . import metrics, problems
from .connection import ClientLeftError, while_connected
from .service import DocumentSearch
from .settings import Settings

PAGE = (Path(__file__).parent / "page.html").read_text()
# The page contains everything it needs. The browser loads nothing from other hosts, even if a document injects a link.
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self' 'unsafe-inline'; img-src data:; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
# nginx's status for this case, for middleware that counts; the client does not read this response.
CLIENT_LEFT = 499

router = APIRouter()


async def the_search(request: Request) -> DocumentSearch:
    service: DocumentSearch = request.app.state.service
    return service


Service = Annotated[DocumentSearch, Depends(the_search)]


@router.get("/", response_class=HTMLResponse)
async def page() -> HTMLResponse:
    """The search page."""
    return HTMLResponse(PAGE, headers=PAGE_HEADERS)


@router.get("/search")
async def search(
    request: Request,
    service: Service,
    q: Annotated[str, Query(min_length=1, max_length=2_000)],
    k: Annotated[int, Query(ge=1, le=50)] = 5,
) -> dict[str, Any]:
    """Return the sections nearest to the question, best first."""
    hits = await while_connected(request, service.search(q, k))
    return {"hits": [{"id": hit.id, "score": hit.score, "text": hit.text, "metadata": hit.metadata} for hit in hits]}


@router.put("/documents/{name:path}")
async def put_document(
    request: Request,
    response: Response,
    service: Service,
    # Ids are `name#section`. PUT, which a form on a foreign page cannot send.
    name: Annotated[str, PathParameter(pattern=r"^[^#\x00-\x1f]{1,200}$")],
) -> dict[str, Any]:
    """Store a document, Markdown or plain text, replacing the one with that name; 422 if a section cannot be stored.

    It is stored even if the client disconnects: unlike the result of a search, it is not lost then.
    """
    stored = await service.put(name, await read_text(request, request.app.state.settings.max_document_bytes))
    report = stored.report
    response.status_code = 422 if report.failures else 200
    return {
        "sections": stored.sections,
        "stored": report.success_count,
        "unchanged": report.skipped_count,
        "deleted": stored.deleted,
        "failed": [{"id": failure.id, "reason": str(failure.error)} for failure in report.failures],
        "tokens": report.total_tokens,
    }


async def read_text(request: Request, most_bytes: int) -> str:
    """Return the request's body as text.

    Raises:
        HTTPException: It is too long (413; the rest is not read) or not UTF-8 (415).
        ClientLeftError: The client disconnected before the end of the body.
    """
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > most_bytes:
                raise HTTPException(413, f"A document has at most {most_bytes:,} bytes.")
    except ClientDisconnect:
        raise ClientLeftError from None
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise HTTPException(415, "A document must be text in UTF-8.") from None


@router.get("/health")
async def health(service: Service) -> JSONResponse:
    """Report whether searches can be answered; 503 if not."""
    found = await service.health()
    return JSONResponse(asdict(found), 200 if found.is_good else 503)


@router.get("/metrics", response_class=PlainTextResponse)
async def show_metrics(service: Service) -> PlainTextResponse:
    """The embedder's counts in the format of Prometheus."""
    return PlainTextResponse(metrics.exposition(service.embedder.stats()), media_type=metrics.CONTENT_TYPE)


async def client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


def make_app(settings: Settings | None = None) -> FastAPI:
    """Return the app; each worker process of a server makes its own."""
    settings = settings or Settings.read(os.environ)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        async with DocumentSearch.opened(settings) as app.state.service:
            yield  # the app serves here; uvicorn continues once all open requests are answered

    # FastAPI's documentation pages load scripts from other hosts
    app = FastAPI(title="Search", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.settings = settings
    app.include_router(router)
    app.add_exception_handler(AsyncEmbedError, problems.answer)
    app.add_exception_handler(ClientLeftError, client_left)
    return app
