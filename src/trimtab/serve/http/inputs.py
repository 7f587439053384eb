"""What clients send: the shapes of requests, and pictures out of base64, data URIs and addresses."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trimtab.data.images import ImageError, is_address, read_image
from trimtab.errors import DataError
from trimtab.serve.http.addresses import Fetcher
from trimtab.serve.http.problems import Problem

_DATA_URI = re.compile(
    r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]+)*(?P<base64>;base64)?,", re.ASCII | re.IGNORECASE
)
_IS_PICTURE = re.compile(r"data:image/", re.IGNORECASE)


class _Strict(BaseModel):
    # Numbers are not taken for texts, and a key that is misspelt is told rather than ignored.
    model_config = ConfigDict(extra="forbid", strict=True)


class TextInput(_Strict):
    """A text."""

    text: str


class ImageInput(_Strict):
    """A picture: base64, a data URI, or an address if the server was told to fetch those."""

    image: str


# A list of millions of wrong things must not make as many messages.
_MOST = 100_000
Item = str | TextInput | ImageInput
Items = Annotated[list[Item], Field(max_length=_MOST, fail_fast=True)]
Texts = Annotated[list[str], Field(max_length=_MOST, fail_fast=True)]


class _Request(_Strict):
    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, sent: Any) -> Any:
        """Some clients send null for what is not set."""
        if not isinstance(sent, dict):
            return sent
        return {name: value for name, value in sent.items() if value is not None or name not in cls.model_fields}


class EmbeddingRequest(_Request):
    """As OpenAI's; `input` may also hold `{"image": ...}`, and data URIs of pictures as they are."""

    model_config = ConfigDict(extra="ignore", strict=True)  # clients send fields that OpenAI adds over time

    input: Item | Items
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


class ClassifyRequest(_Request):
    """Pictures to name."""

    image: str | None = None
    images: Texts | None = None
    classes: Texts | None = None
    templates: Texts | None = None
    top_k: int = Field(default=5, ge=1, le=1000)
    model: str | None = None


class SearchRequest(_Request):
    """A text or a picture to search the index with."""

    text: str | None = None
    image: str | None = None
    k: int = Field(default=12, ge=1)
    model: str | None = None


@dataclass(frozen=True)
class Picture:
    """A picture as it was sent: its address, or its bytes still in base64."""

    sent: str
    where: str
    """The field it stood in, for messages."""


@dataclass(frozen=True)
class Text:
    """A text and the field it stood in."""

    text: str
    where: str


def items_of(sent: Item | list[Item], *, limit: int, max_text: int) -> list[Text | Picture]:
    """The items of an embedding request, in order.

    Raises:
        Problem: 422, too many, or a text that is empty or too long.
    """
    listed = sent if isinstance(sent, list) else [sent]
    if not listed:
        raise Problem(422, "input is an empty list: send at least one text or picture", param="input")
    check_count(len(listed), limit, "input")
    found: list[Text | Picture] = []
    for at, item in enumerate(listed):
        where = f"input[{at}]" if isinstance(sent, list) else "input"
        if isinstance(item, ImageInput):
            found.append(Picture(item.image, where))
        elif isinstance(item, str) and _IS_PICTURE.match(item):
            found.append(Picture(item, where))
        else:
            found.append(checked_text(item if isinstance(item, str) else item.text, where, max_text))
    return found


def check_count(count: int, limit: int, where: str) -> None:
    """Raises:
    Problem: 422, more than `limit`.
    """
    if count > limit:
        raise Problem(422, f"{where} has {count} items; {limit} are the limit of one call: send several", param=where)


def checked_text(text: str, where: str, max_text: int) -> Text:
    """Raises:
    Problem: 422, the text is empty, too long, or no Unicode text.
    """
    if not text.strip():
        raise Problem(422, f"{where} is an empty text", param=where)
    if len(text) > max_text:
        raise Problem(422, f"{where} has {len(text)} characters; {max_text} are the limit", param=where)
    return Text(text, where)


def pixels_of(
    picture: Picture | bytes,
    *,
    where: str = "",
    max_pixels: int,
    fetcher: Fetcher | None,
    preprocess: Callable[[Any], Mapping[str, Any]],
) -> Mapping[str, Any]:
    """What the image tower reads of a picture. It takes time, and runs in a thread of the decoding pool.

    Raises:
        Problem: 422, with what is wrong with it.
    """
    where = picture.where if isinstance(picture, Picture) else where
    try:
        content = picture if isinstance(picture, bytes) else bytes_of(picture.sent, fetcher)
        return preprocess(read_image(content, max_pixels=max_pixels))
    except ImageError as error:
        raise Problem(422, f"{where} {error.reason}", param=where) from error
    except DataError as error:
        raise Problem(422, f"{where}: {error}", param=where) from error


def is_web_address(sent: str) -> bool:
    """Whether a field names a picture that must be fetched."""
    return sent.lower().startswith(("http://", "https://"))


def fetched(picture: Picture, fetcher: Fetcher) -> bytes:
    """The file behind an address. It waits for the network, and runs in a thread of the fetching pool.

    Raises:
        Problem: 422, with what is wrong with it.
    """
    try:
        return bytes_of(picture.sent, fetcher)
    except DataError as error:
        raise Problem(422, f"{picture.where}: {error}", param=picture.where) from error


def bytes_of(sent: str, fetcher: Fetcher | None) -> bytes:
    """The file that a field stands for.

    Raises:
        DataError: no base64, no picture's data URI, or an address that may not be fetched.
    """
    if found := _DATA_URI.match(sent):
        if not found["base64"]:
            raise DataError("a data URI must be in base64: data:image/png;base64,...")
        return _decoded(sent[found.end() :])
    if is_address(sent):
        if not is_web_address(sent):
            raise DataError("is an address of a kind that is never opened: send the picture itself, in base64")
        if fetcher is None:
            raise DataError("is an address, and this server fetches none: send the picture itself, in base64")
        return fetcher.fetch(sent)
    return _decoded(sent)


def _decoded(text: str) -> bytes:
    if not text:
        raise DataError("is empty")
    try:
        return base64.b64decode(re.sub(r"\s", "", text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"is not valid base64 ({error})") from error
