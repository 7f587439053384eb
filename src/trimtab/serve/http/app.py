"""The routes: parse, ask the service, shape the answer as OpenAI's clients expect it."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Collection
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from trimtab import __version__
from trimtab.serve.http.guards import Bounded, KnownHost, Measured, WithKey
from trimtab.serve.http.inputs import (
    ClassifyRequest,
    EmbeddingRequest,
    Picture,
    SearchRequest,
    Text,
    checked_text,
    items_of,
)
from trimtab.serve.http.metrics import CONTENT_TYPE
from trimtab.serve.http.page import page
from trimtab.serve.http.problems import Problem
from trimtab.serve.http.service import Service

logger = logging.getLogger(__name__)

Body = TypeVar("Body", bound=BaseModel)
_FORM_PARTS = 300
_NO_STORE = {"Cache-Control": "no-store"}


def create_app(service: Service, *, api_key: str | None = None, host_names: Collection[str] | None = None) -> Any:
    """The ASGI application over a service, which it starts and stops.

    Args:
        api_key: what clients must show; None lets everybody in.
        host_names: the only names that the server answers to; None for any.
    """
    started = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        if not service.stop(service.options.timeout):
            logger.error("the last forward passes did not end within %g seconds", service.options.timeout)

    app = FastAPI(
        title="Trimtab", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Embeddings, labels and search from one vision-language model.",
    )  # fmt: skip
    _add_problems(app)

    def known_model(name: str | None) -> None:
        if name is not None and name not in (service.name, service.model.name):
            raise Problem(404, f"the model {name[:100]!r} is not served here; it is {service.name!r}", param="model")

    @app.get("/", include_in_schema=False)
    async def web_page() -> HTMLResponse:
        content, headers = page()
        return HTMLResponse(content, headers=headers)

    @app.get("/healthz", tags=["state"])
    async def health() -> JSONResponse:
        """Whether the model can be asked."""
        alive = service.batcher.alive
        state = {"status": "ok" if alive else "unavailable", "model": service.name, "version": __version__}
        return JSONResponse(state, 200 if alive else 503)

    @app.get("/metrics", tags=["state"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters in Prometheus's text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", tags=["state"])
    async def models() -> dict[str, Any]:
        """The one model, and what it was started with."""
        model = {"id": service.name, "object": "model", "created": started, "owned_by": "trimtab"}
        return {"object": "list", "data": [{**model, **service.describe()}]}

    @app.post("/v1/embeddings", tags=["model"], openapi_extra=_takes(EmbeddingRequest, form=False))
    async def embeddings(request: Request) -> Response:
        """Unit vectors of texts and pictures in one space."""
        sent = await _json(request, EmbeddingRequest)
        known_model(sent.model)
        if sent.dimensions not in (None, service.model.embedding_dim):
            raise Problem(
                422, f"embeddings have {service.model.embedding_dim} dimensions, and are not cut", param="dimensions"
            )
        items = items_of(sent.input, limit=service.max_inputs, max_text=service.options.max_text)
        vectors, tokens = await service.embed(items)
        data = [
            {"object": "embedding", "index": at, "embedding": _shown(vector, sent.encoding_format)}
            for at, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return _answer({"object": "list", "data": data, "model": service.name, "usage": usage})

    @app.post("/v1/classify", tags=["model"], openapi_extra=_takes(ClassifyRequest, form=True))
    async def classify(request: Request) -> Response:
        """Names of pictures with probabilities, best first."""
        if _is_form(request):
            form = await _form(request)
            pictures: list[Picture | bytes] = list(form.files)
            sent = form.values(ClassifyRequest, lists=("classes", "templates"))
        else:
            sent = await _json(request, ClassifyRequest)
            pictures = [Picture(one, f"images[{at}]") for at, one in enumerate(sent.images or ())]
            if sent.image is not None:
                pictures.insert(0, Picture(sent.image, "image"))
        known_model(sent.model)
        if not pictures or (sent.image is not None and sent.images is not None):
            raise Problem(422, "send the picture as image, or several as images", param="images")
        found, classes = await service.classify(
            pictures, classes=sent.classes, templates=sent.templates, top_k=sent.top_k
        )
        data = [
            {"object": "classification", "index": at, "labels": [one._asdict() for one in labels]}
            for at, labels in enumerate(found)
        ]
        return _answer({"object": "list", "data": data, "model": service.name, "classes": len(classes)})

    @app.post("/v1/search", tags=["model"], openapi_extra=_takes(SearchRequest, form=True))
    async def search(request: Request) -> Response:
        """The nearest items of the index to a text or a picture."""
        begun = time.monotonic()
        query: Text | Picture | bytes
        if _is_form(request):
            form = await _form(request)
            sent, files = form.values(SearchRequest), form.files
        else:
            sent, files = await _json(request, SearchRequest), []
        known_model(sent.model)
        if (sent.text is not None) + (sent.image is not None) + len(files) != 1:
            raise Problem(422, "send either a text or one image", param="text")
        if files:
            query = files[0]
        elif sent.image is not None:
            query = Picture(sent.image, "image")
        else:
            query = checked_text(sent.text or "", "text", service.options.max_text)
        data = await service.search(query, sent.k)
        took = round(1000 * (time.monotonic() - begun), 1)
        return _answer({"object": "list", "data": data, "model": service.name, "took_ms": took})

    @app.get("/v1/thumbnail", tags=["model"], response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})
    async def thumbnail(id: str) -> Response:
        """A small copy of an indexed picture, by its id in the index."""
        headers = {"Cache-Control": "private, max-age=300", "X-Content-Type-Options": "nosniff"}
        return Response(await service.thumbnail(id), media_type="image/jpeg", headers=headers)

    routes = [getattr(route, "path", "") for route in app.routes]
    options = service.options
    inner = Bounded(app, max_body=options.max_body, max_buffered=options.max_buffered, timeout=options.timeout)
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
        found = _as_problem(error.errors())
        return JSONResponse(found.body, found.status)

    async def bug(_: Request, error: Exception) -> Response:
        return JSONResponse(Problem(500, f"the server failed ({type(error).__name__}); its log says more").body, 500)

    app.add_exception_handler(Problem, problem)
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, bug)


# Requests


async def _json(request: Request, shape: type[Body]) -> Body:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        # Not only for order's sake: browsers send other types to other sites without asking.
        raise Problem(415, "send JSON, with the header Content-Type: application/json")
    body = await request.body()
    try:
        return shape.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        raise _as_problem(found) from error


def _as_problem(errors: Any) -> Problem:
    """The first fault; of a union, the one in the member that got furthest."""
    first = max(errors, key=lambda one: len(one["loc"])) if errors else {"type": "", "loc": (), "msg": "is invalid"}
    if first["type"] == "json_invalid":
        return Problem(400, f"the body is not JSON ({first['msg']})")
    names = [str(part) for part in first["loc"] if part not in ("body", "str", "TextInput", "ImageInput")]
    where = ".".join(name for name in names if not name.startswith(("function-", "list[", "union")))[:200]
    return Problem(422, f"{where or 'the body'}: {first['msg']}", param=where or None)


def _is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


class _Form:
    """A multipart form: files named ``image`` or ``images``, and fields."""

    def __init__(self, files: list[bytes], fields: dict[str, list[str]]) -> None:
        self.files, self.fields = files, fields

    def values(self, shape: type[Body], *, lists: Collection[str] = ()) -> Body:
        """The fields as a request; numbers come as text here."""
        values: dict[str, Any] = {}
        for name, sent in self.fields.items():
            if name in lists:
                values[name] = sent
            elif len(sent) > 1:
                raise Problem(422, f"{name[:100]} stands {len(sent)} times", param=name[:100])
            else:
                values[name] = int(sent[0]) if name in ("k", "top_k") and sent[0].isdecimal() else sent[0]
        try:
            return shape.model_validate(values)
        except ValidationError as error:
            raise _as_problem(error.errors(include_url=False, include_input=False, include_context=False)) from error


async def _form(request: Request) -> _Form:
    try:
        async with request.form(max_files=_FORM_PARTS, max_fields=_FORM_PARTS) as form:
            files: list[bytes] = []
            fields: dict[str, list[str]] = {}
            for name, value in form.multi_items():
                if not isinstance(value, UploadFile):
                    fields.setdefault(name, []).append(value)
                elif name in ("image", "images", "images[]"):
                    files.append(await value.read())
                else:
                    raise Problem(422, f"a file must be named image, not {name[:100]!r}", param="image")
    except HTTPException as error:
        raise Problem(400, f"the form cannot be read ({error.detail})") from error
    return _Form(files, fields)


def _takes(shape: type[BaseModel], *, form: bool) -> dict[str, Any]:
    """The request's part of the OpenAPI description; routes read bodies themselves, to answer in one shape."""
    schema = shape.model_json_schema(ref_template="#/components/schemas/{model}")
    for inner in schema.pop("$defs", {}).items():
        _inline(schema, *inner)
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if form:
        content["multipart/form-data"] = {
            "schema": {"type": "object", "properties": {"image": {"type": "string", "format": "binary"}}}
        }
    problem = {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "object", "required": ["message", "type", "code"]}},
    }
    statuses = (400, 401, 404, 408, 413, 415, 421, 422, 429, 500, 503, 504)
    answers = {
        str(status): {"description": "a problem", "content": {"application/json": {"schema": problem}}}
        for status in statuses
    }
    return {"requestBody": {"required": True, "content": content}, "responses": answers}


def _inline(schema: Any, name: str, definition: dict[str, Any]) -> None:
    """Put a definition where it is referred to."""
    if isinstance(schema, dict):
        if schema.get("$ref") == f"#/components/schemas/{name}":
            schema.clear()
            schema.update(definition)
        for value in schema.values():
            _inline(value, name, definition)
    elif isinstance(schema, list):
        for value in schema:
            _inline(value, name, definition)


# Answers


def _shown(vector: np.ndarray, encoding: str) -> Any:
    """Floats as such, or their little-endian bytes in base64."""
    if encoding == "base64":
        return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode("ascii")
    return vector.tolist()


def _answer(content: dict[str, Any]) -> Response:
    # Thousands of vectors are written several times faster without FastAPI's walk over every number.
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text.encode("utf-8", "replace"), media_type="application/json", headers=_NO_STORE)
