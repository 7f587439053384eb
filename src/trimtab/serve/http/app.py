"""The ASGI application: routes, errors in one shape, and the guards before them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Collection
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from trimtab import __version__
from trimtab.serve.http.bodies import as_problem, problems
from trimtab.serve.http.connections import Unread
from trimtab.serve.http.guards import Bounded, KnownHost, Measured, WithKey
from trimtab.serve.http.problems import Problem
from trimtab.serve.http.routes import add_model_routes, add_state_routes
from trimtab.serve.http.service import Service

logger = logging.getLogger(__name__)


def create_app(
    service: Service,
    *,
    api_key: str | None = None,
    host_names: Collection[str] | None = None,
    root_path: str = "",
    unread: Unread | None = None,
) -> Any:
    """The ASGI application over a service, which it starts and stops.

    Args:
        api_key: what clients must show; None lets everybody in.
        host_names: the only names that the server answers to; None for any.
        root_path: where a proxy has the server, for the description at ``/openapi.json``.
        unread: answers that the server holds until they are read; they count beside the bodies of requests.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        if not service.stop(service.options.timeout):
            logger.error("the last forward passes did not end within %g seconds", service.options.timeout)

    app = FastAPI(
        title="Trimtab", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        servers=[{"url": root_path}] if root_path else None,
        description="Embeddings, labels and search from one vision-language model.", responses=problems(),
    )  # fmt: skip
    _add_problems(app)

    add_state_routes(app, service)
    add_model_routes(app, service)
    routes = [getattr(route, "path", "") for route in app.routes]
    options = service.options
    inner = Bounded(
        app, max_body=options.max_body, max_buffered=options.max_buffered, timeout=options.timeout, unread=unread
    )
    return Measured(KnownHost(WithKey(inner, api_key), host_names), service.metrics, routes)


def _add_problems(app: FastAPI) -> None:
    """Every error in one shape, none with what the client sent."""

    async def problem(_: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return JSONResponse(error.body, error.status, headers=error.headers)

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        found = Problem(error.status_code, str(error.detail))
        return JSONResponse(found.body, found.status, headers=error.headers)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        found = as_problem(error.errors())
        return JSONResponse(found.body, found.status)

    async def bug(_: Request, error: Exception) -> Response:
        return JSONResponse(Problem(500, f"the server failed ({type(error).__name__}); its log says more").body, 500)

    app.add_exception_handler(Problem, problem)
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, bug)
