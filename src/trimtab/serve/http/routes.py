"""The routes: parse, ask the service, shape the answer as OpenAI's clients expect it."""

from __future__ import annotations

import base64
import json
import time
from functools import partial
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from trimtab import __version__
from trimtab.serve.http.bodies import is_form, read_form, read_json, takes
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

_NO_STORE = {"Cache-Control": "no-store"}


def add_state_routes(app: FastAPI, service: Service) -> None:
    """The page, and what tells how the server is."""
    started = int(time.time())

    # HEAD as well as GET: monitors ask so.
    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def web_page() -> HTMLResponse:
        content, headers = page()
        return HTMLResponse(content, headers=headers)

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", tags=["state"])
    async def health() -> JSONResponse:
        """Whether the model can be asked."""
        alive = service.alive
        state = {"status": "ok" if alive else "unavailable", "model": service.name, "version": __version__}
        return JSONResponse(state, 200 if alive else 503)

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics", tags=["state"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters in Prometheus's text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", tags=["state"])
    async def models() -> dict[str, Any]:
        """The one model, and what it was started with."""
        model = {"id": service.name, "object": "model", "created": started, "owned_by": "trimtab"}
        return {"object": "list", "data": [{**model, **service.describe()}]}


def add_model_routes(app: FastAPI, service: Service) -> None:
    """What the model is for."""

    def known_model(name: str | None) -> None:
        if name is not None and name not in (service.name, service.model.name):
            raise Problem(404, f"the model {name[:100]!r} is not served here; it is {service.name!r}", param="model")

    @app.post("/v1/embeddings", tags=["model"], openapi_extra=takes(EmbeddingRequest, form=False))
    async def embeddings(request: Request) -> Response:
        """Unit vectors of texts and pictures in one space."""
        sent = await read_json(request, EmbeddingRequest)
        known_model(sent.model)
        if sent.dimensions not in (None, service.model.embedding_dim):
            raise Problem(
                422, f"embeddings have {service.model.embedding_dim} dimensions, and are not cut", param="dimensions"
            )
        items = items_of(sent.input, limit=service.max_inputs, max_text=service.options.max_text)
        vectors, tokens = await service.embed(items)
        # Thousands of numbers as text: other requests shall not wait for it.
        return await service.in_pool(partial(_embeddings, vectors, tokens, sent.encoding_format, service.name))

    @app.post("/v1/classify", tags=["model"], openapi_extra=takes(ClassifyRequest, form=True))
    async def classify(request: Request) -> Response:
        """Names of pictures with probabilities, best first."""
        if is_form(request):
            form = await read_form(request)
            pictures: list[Picture | bytes] = list(form.files)
            sent = form.values(ClassifyRequest, lists=("classes", "templates"))
        else:
            sent = await read_json(request, ClassifyRequest)
            pictures = [Picture(one, f"images[{at}]") for at, one in enumerate(sent.images or ())]
        if sent.image is not None:
            pictures.append(Picture(sent.image, "image"))
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

    @app.post("/v1/search", tags=["model"], openapi_extra=takes(SearchRequest, form=True))
    async def search(request: Request) -> Response:
        """The nearest items of the index to a text or a picture."""
        begun = time.monotonic()
        query: Text | Picture | bytes
        if is_form(request):
            form = await read_form(request)
            sent, files = form.values(SearchRequest), form.files
        else:
            sent, files = await read_json(request, SearchRequest), []
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


def _embeddings(vectors: np.ndarray, tokens: int, encoding: str, model: str) -> Response:
    data = [
        {"object": "embedding", "index": at, "embedding": _shown(vector, encoding)} for at, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return _answer({"object": "list", "data": data, "model": model, "usage": usage})


def _shown(vector: np.ndarray, encoding: str) -> Any:
    """Floats as such, or their little-endian bytes in base64."""
    if encoding == "base64":
        return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode("ascii")
    return vector.tolist()


def _answer(content: dict[str, Any]) -> Response:
    # Thousands of vectors are written several times faster without FastAPI's walk over every number.
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text.encode("utf-8", "replace"), media_type="application/json", headers=_NO_STORE)
