"""Pictures out of base64, data URIs and addresses; items out of what OpenAI's clients send."""

from __future__ import annotations

import base64
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import DataError
from trimtab.serve.http.inputs import EmbeddingRequest, Picture, Text, bytes_of, items_of
from trimtab.serve.http.problems import Problem


@given(content=st.binary(min_size=1, max_size=200))
def test_what_is_encoded_comes_back(content: bytes) -> None:
    encoded = base64.b64encode(content).decode()
    folded = base64.encodebytes(content).decode()
    uris = [f"data:image/png;base64,{encoded}", f"data:;base64,{encoded}", f"DATA:image/PNG;BASE64,{encoded}"]
    for sent in (encoded, folded, *uris):
        assert bytes_of(sent, None) == content
    assert bytes_of(f"data:image/svg+xml;charset=utf-8;base64,{encoded}", None) == content


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ("", "empty"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png,abc", "must be in base64"),
        ("data:nonsense", "never opened"),
        ("äöü", "not valid base64"),
        ("abc", "not valid base64"),
        ("ab-_", "not valid base64"),
        ("a*bcd", "not valid base64"),  # four letters of the alphabet without the star
        ("file:///etc/passwd", "never opened"),
        ("ftp://a.example/b", "never opened"),
        ("https://a.example/b", "fetches none"),
    ],
)
def test_what_is_no_picture(sent: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        bytes_of(sent, None)


@given(text=st.text(max_size=200))
def test_no_text_does_harm(text: str) -> None:
    with contextlib.suppress(DataError):
        assert isinstance(bytes_of(text, None), bytes)


def test_items_are_told_apart() -> None:
    sent = EmbeddingRequest.model_validate(
        {"input": ["a", "data:image/png;base64,QQ==", {"text": "data:image/png"}, {"image": "QQ=="}, "DATA:IMAGE/PNG,"]}
    )
    items = items_of(sent.input, limit=10, max_text=100)
    assert [type(item) for item in items] == [Text, Picture, Text, Picture, Picture]
    assert [item.where for item in items] == [f"input[{at}]" for at in range(5)]
    assert items_of("a", limit=10, max_text=100) == [Text("a", "input")]


@pytest.mark.parametrize("sent", [[], "", " ", ["a", ""], "a" * 101, ["a"] * 11])
def test_items_that_are_refused(sent: str | list[str]) -> None:
    with pytest.raises(Problem) as caught:
        items_of(sent, limit=10, max_text=100)  # type: ignore[arg-type]
    assert caught.value.status == 422
