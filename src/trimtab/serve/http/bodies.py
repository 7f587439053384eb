"""Bodies of requests: JSON or forms into the shapes of `inputs`, faults as problems, and their description."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from trimtab.serve.http.problems import Problem

Body = TypeVar("Body", bound=BaseModel)
_FORM_PARTS = 300
_SMALL = 1 << 20  # bytes of a body that may hold anything
_CONTAINERS, _STRUCTURE = 250_000, 4_000_000  # brackets; brackets, commas and quotes
_FAULTS = 1000
_DIGITS = 18  # of a number in a form


async def read_json(request: Request, shape: type[Body]) -> Body:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        # Not only for order's sake: browsers send other types to other sites without asking.
        raise Problem(415, "send JSON, with the header Content-Type: application/json")
    body = await request.body()
    _check_structure(body)
    # Parsed first and then looked at: pydantic, given the JSON itself, copies a faulty value for each of its faults.
    try:
        content = from_json(body, cache_strings="none")
    except ValueError as error:
        raise Problem(400, f"the body is not JSON (Invalid JSON: {error})") from error
    try:
        return shape.model_validate(content)
    except ValidationError as error:
        raise invalid(error) from error


def _check_structure(body: bytes) -> None:
    """Refuse what would take many times its own size to parse: millions of empty objects, lists or texts."""
    if len(body) <= _SMALL:
        return
    containers = body.count(b"{") + body.count(b"[")
    if containers > _CONTAINERS or containers + body.count(b",") + body.count(b'"') > _STRUCTURE:
        raise Problem(422, "the body has too many values: send fewer at once")


def invalid(error: ValidationError) -> Problem:
    """What is wrong with a body; of very many faults only their number."""
    if error.error_count() > _FAULTS:
        return Problem(422, f"the body has {error.error_count()} faults")
    found = error.errors(include_url=False, include_context=False)
    if any(one["loc"][:1] == ("input",) and _is_token(one["input"]) for one in found):
        # OpenAI's own clients send these by default in some frameworks, so the remedy is told.
        words = "input: token ids are not understood, since tokenizers differ: send the texts themselves"
        return Problem(422, words, param="input")
    return as_problem(found)


def _is_token(value: Any) -> bool:
    """A token, or a list of them."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, int) and not isinstance(first, bool)


def as_problem(errors: Any) -> Problem:
    """The first fault; of a union, the one in the member that got furthest."""
    first = max(errors, key=lambda one: len(one["loc"])) if errors else {"type": "", "loc": (), "msg": "is invalid"}
    names = [str(part) for part in first["loc"] if part not in ("body", "str", "TextInput", "ImageInput")]
    where = ".".join(name for name in names if not name.startswith(("function-", "list[", "union")))[:200]
    return Problem(422, f"{where or 'the body'}: {first['msg']}", param=where or None)


def is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


class Form:
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
                number = name in ("k", "top_k") and sent[0].isdecimal() and len(sent[0]) <= _DIGITS
                values[name] = int(sent[0]) if number else sent[0]
        try:
            return shape.model_validate(values)
        except ValidationError as error:
            raise invalid(error) from error


class _InMemory(MultiPartParser):
    """Writes no file to disk: pictures are nobody else's business, and the body as a whole is bounded already."""

    spool_max_size = max_file_size = sys.maxsize  # the second name is that of older versions of Starlette


async def read_form(request: Request) -> Form:
    _check_sender(request)
    parser = _InMemory(request.headers, request.stream(), max_files=_FORM_PARTS, max_fields=_FORM_PARTS)
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError) as error:  # Starlette before 1 lets the second through
        raise Problem(400, f"the form cannot be read ({getattr(error, 'message', error)})") from error
    files: list[bytes] = []
    fields: dict[str, list[str]] = {}
    for name, value in form.multi_items():
        if not isinstance(value, UploadFile):
            fields.setdefault(name, []).append(value)
        elif name in ("image", "images", "images[]"):
            files.append(await value.read())
        else:
            raise Problem(422, f"a file must be named image, not {name[:100]!r}", param="image")
    return Form(files, fields)


def _check_sender(request: Request) -> None:
    """Refuse forms that a page elsewhere makes a browser here send, and those in an encoding that is slow to decode."""
    if request.headers.get("sec-fetch-site", "").strip().lower() == "cross-site":
        # Browsers ask before they send JSON to other sites, but never before a form.
        raise Problem(403, "a page of another site sent this form: send forms from the server's own page or a program")
    # Starlette decodes with whatever the client names; it reads the header with this same function.
    _, options = parse_options_header(request.headers.get("content-type"))
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8", b"us-ascii", b"ascii"):
        raise Problem(415, "a form must be in UTF-8: leave the charset out of its Content-Type")


def problems() -> dict[int | str, dict[str, Any]]:
    """The answers other than the one asked for, as the OpenAPI description names them."""
    fields = {"message": {"type": "string"}, "type": {"type": "string"}, "code": {"type": "integer"}}
    error = {"type": "object", "required": list(fields), "properties": fields}
    problem = {"type": "object", "required": ["error"], "properties": {"error": error}}
    statuses = (400, 401, 403, 404, 408, 413, 415, 421, 422, 429, 500, 503, 504)
    return {
        status: {"description": "a problem", "content": {"application/json": {"schema": problem}}}
        for status in statuses
    }


def takes(shape: type[BaseModel], *, form: bool) -> dict[str, Any]:
    """The request's part of the OpenAPI description; routes read bodies themselves, to answer in one shape."""
    schema = shape.model_json_schema(ref_template="#/components/schemas/{model}")
    for inner in schema.pop("$defs", {}).items():
        _inline(schema, *inner)
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if form:
        content["multipart/form-data"] = {
            "schema": {"type": "object", "properties": {"image": {"type": "string", "format": "binary"}}}
        }
    return {"requestBody": {"required": True, "content": content}}


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
