"""What clients get: parity with the library, OpenAI's shapes, and a status for each way to be wrong."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tiny_server import Running, Site, StubIndex, data_uri, png, running
from trimtab.serve.http import service as service_module
from trimtab.serve.http.addresses import FetchError
from trimtab.serve.http.options import ServeOptions
from trimtab.serve.http.problems import Problem
from trimtab.serve.http.service import Service
from trimtab.serve.http.thumbnails import Thumbnails
from trimtab.towers.classifier import Classifier

CLASSES = ["cat", "dog", "狗"]
COLORS = {"red.png": (200, 30, 30), "green.png": (30, 200, 30), "blue.png": (30, 30, 200)}


@dataclass
class Held:
    """Passes of a service that wait for `hold`: what each was given, and whether one was entered."""

    hold: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    passes: list[list[Any]] = field(default_factory=list)


def hold_passes(service: Service, kind: str = "text") -> Held:
    """From now on the service's passes of a kind wait, ten seconds at most."""
    held, real = Held(), service.batcher.forwards[kind]

    def slow(items: list[Any]) -> Any:
        held.passes.append(list(items))
        held.entered.set()
        held.hold.wait(10)
        return real(items)

    service.batcher.forwards[kind] = slow
    return held


@pytest.fixture(scope="module")
def pictures_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, color in COLORS.items():
        (folder / name).write_bytes(png(color))
    return folder


@pytest.fixture(scope="module")
def server(tiny_base: Callable[[str], Any], pictures_folder: Path) -> Iterator[Running]:
    model = tiny_base("clip")
    vectors = model.encode_image([pictures_folder / name for name in COLORS])
    index = StubIndex(vectors, list(COLORS), model.fingerprint)
    options = ServeOptions(max_inputs=100, max_body_mib=2, max_megapixels=1, max_classes=20, max_text=1000)
    service = Service(
        model, name="tiny", options=options, classes=CLASSES, index=index,
        thumbnails=Thumbnails(index.find, pictures_folder),
    )  # fmt: skip
    with running(service) as found:
        yield found


def embedded(answer: Any) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([one["embedding"] for one in answer.json()["data"]], np.float32)


# Embeddings


def test_embeddings_are_those_of_the_library(server: Running, tiny_base: Callable[[str], Any]) -> None:
    model = tiny_base("clip")
    texts = ["a photo of a cat", "一只狗的照片", "a"]
    answer = server.post("/v1/embeddings", {"input": texts, "model": "tiny"})
    np.testing.assert_allclose(embedded(answer), model.encode_text(texts), atol=1e-6)
    body = answer.json()
    assert [one["index"] for one in body["data"]] == [0, 1, 2]
    assert {one["object"] for one in body["data"]} == {"embedding"}
    assert (body["object"], body["model"]) == ("list", "tiny")
    tokens = sum(len(one) for one in model.text_inputs.token_ids(texts)[0])
    assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_pictures_and_texts_may_stand_in_one_call(server: Running, tiny_base: Callable[[str], Any]) -> None:
    model, content = tiny_base("clip"), png()
    sent = ["a cat", {"image": base64.b64encode(content).decode()}, data_uri(content), {"text": "data:image/x"}]
    vectors = embedded(server.post("/v1/embeddings", {"input": sent}))
    np.testing.assert_allclose(vectors[[0, 3]], model.encode_text(["a cat", "data:image/x"]), atol=1e-6)
    np.testing.assert_allclose(vectors[[1, 2]], model.encode_image([content, content]), atol=1e-6)


def test_base64_embeddings_are_the_same_numbers(server: Running) -> None:
    floats = embedded(server.post("/v1/embeddings", {"input": "a cat"}))
    answer = server.post("/v1/embeddings", {"input": "a cat", "encoding_format": "base64"}).json()
    packed = base64.b64decode(answer["data"][0]["embedding"])
    np.testing.assert_array_equal(np.frombuffer(packed, "<f4"), floats[0])


def test_fields_that_openai_may_add_are_ignored(server: Running) -> None:
    body = {"input": "a", "user": "u", "dimensions": 12, "some_new_field": 1}
    assert server.post("/v1/embeddings", body).status_code == 200


def test_null_is_as_good_as_nothing(server: Running) -> None:
    unset = {"encoding_format": None, "dimensions": None, "user": None, "model": None}
    assert server.post("/v1/embeddings", {"input": "a", **unset}).status_code == 200
    picture = {"image": data_uri(png()), "templates": None, "top_k": None}
    assert len(server.post("/v1/classify", picture).json()["data"][0]["labels"]) == 3
    assert len(server.post("/v1/search", {"text": "a", "k": None}).json()["data"]) == 3
    assert server.post("/v1/search", {"text": "a", "kk": None}).status_code == 422


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 422, "input: Field required"),
        ({"input": None}, 422, "input"),
        ({"input": []}, 422, "empty list"),
        ({"input": ""}, 422, "empty text"),
        ({"input": ["a", " \n"]}, 422, "input[1] is an empty text"),
        ({"input": 3}, 422, "token ids"),
        ({"input": {"text": [3]}}, 422, "input"),
        ({"input": [1.5]}, 422, "input"),
        ({"input": [True]}, 422, "input"),
        ({"input": [[1, 2], [3]]}, 422, "token ids"),
        ({"input": [1, 2]}, 422, "token ids"),
        ({"input": {"text": 3}}, 422, "input"),
        ({"input": {"txt": "a"}}, 422, "input"),
        ({"input": "x" * 1001}, 422, "1000 are the limit"),
        ({"input": ["a"] * 101}, 422, "100 are the limit"),
        ({"input": "a", "encoding_format": "float16"}, 422, "encoding_format"),
        ({"input": "a", "dimensions": 5}, 422, "12 dimensions"),
        ({"input": "a", "dimensions": "12"}, 422, "dimensions"),
        ({"input": "a", "model": "gpt-4"}, 404, "it is 'tiny'"),
        ({"input": {"image": "!!!"}}, 422, "input is not"),
        ({"input": {"image": ""}}, 422, "is empty"),
        ({"input": {"image": "data:image/png,abc"}}, 422, "must be in base64"),
        ({"input": {"image": "aGVsbG8="}}, 422, "not an image of a supported format"),
        ({"input": {"image": "file:///etc/passwd"}}, 422, "never opened"),
        ({"input": {"image": "http://127.0.0.1/"}}, 422, "fetches none"),
        ({"input": ["a", {"image": data_uri(png()[:60])}]}, 422, "input[1] is cut off or damaged"),
        ([], 422, ""),
        ("text", 422, ""),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_place(server: Running, body: Any, status: int, words: str) -> None:
    answer = server.post("/v1/embeddings", body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert words.split(" is not")[0] in error["message"]
    assert error["code"] == status
    assert server.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"nonsense", 400),
        (b'{"input": "\xff"}', 400),
        (b'{"input": "\\ud800"}', 400),
        (b"[" * 50_000, 400),
        (b'{"input": ' + b"9" * 10_000 + b"}", 400),
        (b'{"input": NaN}', 422),
    ],
)
def test_what_is_no_json_is_told(server: Running, content: bytes, status: int) -> None:
    answer = server.post_raw("/v1/embeddings", content)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_other_content_types_are_refused(server: Running) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert server.post_raw("/v1/embeddings", b'{"input": "a"}', kind).status_code == 415


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80))
def test_unicode_of_every_plane(server: Running, text: str) -> None:
    answer = server.post("/v1/embeddings", {"input": [text, "a"]})
    if text.strip():
        assert np.isfinite(embedded(answer)).all()
    else:
        assert answer.status_code == 422


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ("input", "image", "images", "text", "k", "top_k", "classes", "templates", "model", "encoding_format")


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(["embeddings", "classify", "search"]), body=st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_no_body_breaks_the_server(server: Running, path: str, body: dict[str, Any]) -> None:
    answer = server.post_raw(f"/v1/{path}", json.dumps(body).encode())
    assert answer.status_code in (200, 400, 404, 422), answer.text
    assert answer.json()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300), start=st.sampled_from([b"", png()[:50], b"\xff\xd8\xff\xe0", b"GIF89a"]))
def test_no_picture_breaks_the_server(server: Running, content: bytes, start: bytes) -> None:
    answer = server.post("/v1/classify", {"image": base64.b64encode(start + content).decode()})
    assert answer.status_code in (200, 422), answer.text


# Limits


@pytest.mark.parametrize(
    ("start", "item", "end"),
    [
        (b'{"input":[', b"{}", b"]}"),
        (b'{"input":[', b'""', b"]}"),
        (b'{"input":[', b"1", b"]}"),
        (b'{"input":[', b"[]", b"]}"),
        (b'{"input":"a","x":[', b"null", b"]}"),
        (b"{", b'"a":1', b"}"),
    ],
)
@pytest.mark.parametrize("route", ["embeddings", "classify"])
def test_bodies_of_very_many_values_are_refused_soon(
    tiny_base: Callable[[str], Any], start: bytes, item: bytes, end: bytes, route: str
) -> None:
    body = start + (item + b",") * (10_000_000 // (len(item) + 1)) + item + end
    with running(Service(tiny_base("clip"), name="tiny")) as server:
        answer = server.post_raw(f"/v1/{route}", body)
        assert answer.status_code in (200, 422), answer.text[:200]
        assert len(answer.content) < 2000


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that says it has very many pixels."""
    stream = io.BytesIO()
    Image.new("1", (8, 8)).save(stream, "PNG")
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + stream.getvalue()[24:29]
    checksum = zlib.crc32(b"IHDR" + header).to_bytes(4, "big")
    return stream.getvalue()[:16] + header + checksum + stream.getvalue()[33:]


def test_a_picture_of_too_many_pixels_is_not_decoded(server: Running) -> None:
    answer = server.post("/v1/classify", {"image": data_uri(bomb(100_000, 100_000))})
    assert answer.status_code == 422
    assert "too large to decode safely" in answer.json()["error"]["message"]
    narrow = server.post("/v1/classify", {"image": data_uri(png(size=(1, 900)))})
    assert narrow.status_code == 422
    assert "too narrow" in narrow.json()["error"]["message"]


def test_a_body_above_the_limit_is_refused_before_it_is_read(server: Running) -> None:
    read = 0

    async def endless() -> Any:
        nonlocal read
        while True:
            read += 1
            yield b"x" * 65536

    headers = {"content-type": "application/json", "content-length": str(1 << 40)}
    assert server.post("/v1/embeddings", content=endless(), headers=headers).status_code == 413
    assert read == 0
    headers.pop("content-length")
    assert server.post("/v1/embeddings", content=endless(), headers=headers).status_code == 413
    assert read < 40
    assert server.get("/healthz").status_code == 200


def test_a_full_queue_says_so(tiny_base: Callable[[str], Any]) -> None:
    service = Service(tiny_base("clip"), name="tiny", options=ServeOptions(queue=3))
    held = hold_passes(service)
    with running(service) as server:
        threading.Timer(0.3, held.hold.set).start()
        answers = server.post_all([("/v1/embeddings", {"input": ["a", "b"]})] * 4)
    assert sorted(one.status_code for one in answers) == [200, 429, 429, 429]
    refused = next(one for one in answers if one.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "overloaded_error"
    assert service.batcher.reserved == 0


def test_what_could_never_fit_into_the_queue_is_not_told_to_come_again(tiny_base: Callable[[str], Any]) -> None:
    with running(Service(tiny_base("clip"), name="tiny", options=ServeOptions(queue=3))) as server:
        assert server.post("/v1/embeddings", {"input": ["a"] * 4}).status_code == 422


def test_a_pass_that_takes_too_long_gives_504(tiny_base: Callable[[str], Any]) -> None:
    service = Service(tiny_base("clip"), name="tiny", options=ServeOptions(timeout=0.2))
    held = hold_passes(service)
    with running(service) as server:
        answer = server.post("/v1/embeddings", {"input": "a"})
        assert answer.status_code == 504
        held.hold.set()
        assert server.post("/v1/embeddings", {"input": "a"}).status_code == 200
        assert service.batcher.reserved == 0


def test_what_a_client_that_left_had_asked_for_is_not_computed(tiny_base: Callable[[str], Any]) -> None:
    service = Service(tiny_base("clip"), name="tiny", options=ServeOptions(max_batch=2))
    held = hold_passes(service)
    site = Site(service)
    try:
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{site.address}v1/embeddings", json={"input": ["left"] * 100}, timeout=0.5, trust_env=False)
        assert held.entered.wait(10)
        while service.batcher.reserved:
            time.sleep(0.01)
        assert service.batcher.waiting == 0
        held.hold.set()
        answer = httpx.post(f"{site.address}v1/embeddings", json={"input": ["a"]}, timeout=30, trust_env=False)
        assert answer.status_code == 200
    finally:
        site.close()
    assert held.passes == [["left", "left"], ["a"]]
    assert service.metrics.requests.value("/v1/embeddings", "499") == 1


def test_a_text_that_is_refused_takes_its_pictures_with_it(tiny_base: Callable[[str], Any]) -> None:
    service = Service(tiny_base("clip"), name="tiny")
    held = hold_passes(service, "image")
    submit = service.batcher.submit

    async def refuse_texts(kind: str, items: Any) -> Any:
        if kind == "text":
            raise Problem(413, "too much")
        return await submit(kind, items)

    service.batcher.submit = refuse_texts  # type: ignore[method-assign]
    with running(service) as server:
        sent = ["a", *[{"image": data_uri(png())}] * 40]
        assert server.post("/v1/embeddings", {"input": sent}).status_code == 413
        assert service.batcher.waiting == 0
        held.hold.set()


def test_classes_take_turns_with_texts_of_others(tiny_base: Callable[[str], Any]) -> None:
    service = Service(tiny_base("clip"), name="tiny")
    held = hold_passes(service)
    body = {"image": data_uri(png()), "classes": [f"class {at}" for at in range(100)]}
    with running(service) as server:
        large = asyncio.run_coroutine_threadsafe(server.client.post("/v1/classify", json=body), server.loop)
        assert held.entered.wait(10)
        before = service.batcher.reserved  # the picture and its classes
        small = asyncio.run_coroutine_threadsafe(
            server.client.post("/v1/embeddings", json={"input": "small"}), server.loop
        )
        while service.batcher.reserved == before:
            time.sleep(0.01)
        held.hold.set()
        assert small.result(30).status_code == 200
        assert len(large.result(30).json()["data"][0]["labels"]) == 5
    assert sum("small" in one for one in held.passes[:3]) == 1
    assert len(held.passes) > 20


class Decoder:
    """In place of `pixels_of`: notes what is decoded, and waits; a picture named "bad" is refused at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hold, self.entered, self.seen = threading.Event(), threading.Event(), []  # type: ignore[var-annotated]
        self.real = service_module.pixels_of
        monkeypatch.setattr(service_module, "pixels_of", self)

    def __call__(self, picture: Any, **options: Any) -> Any:
        if picture.sent == "bad":
            raise Problem(422, "is bad")
        self.seen.append(picture.sent)
        self.entered.set()
        self.hold.wait(20)
        return self.real(picture, **options)


def test_a_text_does_not_wait_for_pictures_of_others(
    tiny_base: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(monkeypatch)
    with running(Service(tiny_base("clip"), name="tiny")) as server:
        large = asyncio.run_coroutine_threadsafe(
            server.client.post("/v1/embeddings", json={"input": [{"image": data_uri(png())}] * 40}), server.loop
        )
        assert decoder.entered.wait(10)
        assert server.post("/v1/embeddings", {"input": "a"}).status_code == 200
        assert not large.done()
        decoder.hold.set()
        assert large.result(30).status_code == 200


def test_a_request_with_many_pictures_takes_turns(
    tiny_base: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(monkeypatch)
    many, one = data_uri(png((200, 30, 30))), data_uri(png((30, 30, 200)))
    with running(Service(tiny_base("clip"), name="tiny")) as server:
        asked = []
        for body in ({"input": [{"image": many}] * 100}, {"input": [{"image": one}]}):
            asked.append(asyncio.run_coroutine_threadsafe(server.client.post("/v1/embeddings", json=body), server.loop))
            assert decoder.entered.wait(10)
        while server.service.batcher.reserved < 101:
            time.sleep(0.01)
        decoder.hold.set()
        assert [one.result(30).status_code for one in asked] == [200, 200]
    assert len(decoder.seen) == 101
    assert decoder.seen.index(one) < 30


def test_pictures_beside_one_that_is_refused_are_not_decoded(
    tiny_base: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(monkeypatch)
    with running(Service(tiny_base("clip"), name="tiny")) as server:
        sent = [{"image": data_uri(png())}] * 100
        assert server.post("/v1/embeddings", {"input": [{"image": "bad"}, *sent]}).status_code == 422
        decoder.hold.set()
        assert server.post("/v1/embeddings", {"input": {"image": data_uri(png((30, 30, 200)))}}).status_code == 200
    assert len(decoder.seen) < 20


def test_pictures_are_preprocessed_by_few_batches_at_a_time(
    tiny_base: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(monkeypatch)
    decoder.hold.set()
    service = Service(tiny_base("clip"), name="tiny", options=ServeOptions(max_batch=2))
    held = hold_passes(service, "image")
    pictures = [{"image": data_uri(png((at, 0, 0)))} for at in range(40)]
    with running(service) as server:
        asked = [
            asyncio.run_coroutine_threadsafe(server.client.post("/v1/embeddings", json={"input": sent}), server.loop)
            for sent in (pictures[:20], pictures[20:], pictures[:1])
        ]
        while service.batcher.reserved < 41 or service.batcher.waiting < 7:  # and a batch of two is in a pass
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(decoder.seen) == 9  # two parts of two of each request; the single one did not have to wait
        held.hold.set()
        answers = [one.result(30) for one in asked]
    expected = tiny_base("clip").encode_image([png((at, 0, 0)) for at in range(40)])
    np.testing.assert_allclose(embedded(answers[0]), expected[:20], atol=1e-6)
    np.testing.assert_allclose(embedded(answers[1]), expected[20:], atol=1e-6)
    assert service.batcher.reserved == 0


def test_places_are_given_in_order_and_come_back() -> None:
    async def run() -> list[str]:
        places, said = service_module._Places(4), []

        async def take(name: str, count: int, wait: float) -> None:
            async with places.taken(count):
                said.append(name)
                await asyncio.sleep(wait)

        first = [asyncio.ensure_future(take(*one)) for one in (("a", 3, 0.05), ("b", 3, 0.0), ("c", 1, 0.0))]
        await asyncio.sleep(0.01)
        gone = asyncio.ensure_future(take("gone", 4, 0.0))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(*first, gone, return_exceptions=True)
        await asyncio.wait_for(take("all", 4, 0.0), 5)
        return said

    assert asyncio.run(run()) == ["a", "b", "c", "all"]


def test_a_model_that_fails_costs_one_answer(tiny_base: Callable[[str], Any]) -> None:
    service = Service(tiny_base("clip"), name="tiny")
    real = service.batcher.forwards["text"]

    def fail(texts: list[str]) -> Any:
        if "bad" in texts:
            raise RuntimeError("/secret/path")
        return real(texts)

    service.batcher.forwards["text"] = fail
    with running(service) as server:
        answer = server.post("/v1/embeddings", {"input": "bad"})
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert server.post("/v1/embeddings", {"input": "good"}).status_code == 200


# Classification


def test_labels_are_those_of_the_library(server: Running, tiny_base: Callable[[str], Any]) -> None:
    content = png()
    answer = server.post("/v1/classify", {"image": data_uri(content), "top_k": 2}).json()
    expected = tiny_base("clip").classifier(CLASSES).predict([content], top_k=2)[0]
    labels = answer["data"][0]["labels"]
    assert [one["label"] for one in labels] == [one.label for one in expected]
    np.testing.assert_allclose([one["score"] for one in labels], [one.score for one in expected], atol=1e-5)
    assert answer["classes"] == 3


def test_a_request_may_bring_classes_and_templates(server: Running) -> None:
    body = {"images": [data_uri(png())] * 2, "classes": ["a", "b", "c", "d"], "templates": ["a {} here"]}
    for _ in range(2):  # the second time from memory
        answer = server.post("/v1/classify", body).json()
        assert [len(one["labels"]) for one in answer["data"]] == [4, 4]
        assert sum(one["score"] for one in answer["data"][0]["labels"]) == pytest.approx(1, abs=1e-5)


def test_a_form_may_hold_the_picture(server: Running) -> None:
    files = [("image", ("a.png", png())), ("image", ("b.png", png((1, 2, 3))))]
    answer = server.post("/v1/classify", files=files, data={"classes": ["cat", "狗"], "top_k": "1"})
    assert answer.status_code == 200, answer.text
    assert [len(one["labels"]) for one in answer.json()["data"]] == [1, 1]


def test_a_field_of_a_form_may_be_a_picture_as_in_json(server: Running) -> None:
    field = ("image", (None, data_uri(png((200, 30, 30)))))
    alone = server.post("/v1/classify", files=[field, ("classes", (None, "cat"))])
    assert len(alone.json()["data"]) == 1
    both = server.post("/v1/classify", files=[("image", ("a.png", png())), field])
    assert len(both.json()["data"]) == 2


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"files": {"other": ("a", b"x")}}, 422),
        ({"files": {"image": ("a", b"x")}}, 422),
        ({"files": {"image": ("a", png())}, "data": {"top_k": "x"}}, 422),
        ({"files": {"image": ("a", png())}, "data": {"top_k": ["1", "2"]}}, 422),
        ({"files": {"image": ("a", png())}, "data": {"top_k": "9" * 5000}}, 422),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400),
    ],
)
def test_forms_that_cannot_be_used(server: Running, options: Any, status: int) -> None:
    answer = server.post("/v1/classify", **options)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def form(charset: str) -> dict[str, Any]:
    """A form with a text to search, which says how it is encoded."""
    content = b'--b\r\nContent-Disposition: form-data; name="text"\r\n\r\na cat\r\n--b--\r\n'
    return {"content": content, "headers": {"content-type": f"multipart/form-data; boundary=b{charset}"}}


@pytest.mark.parametrize(
    "charset",
    [
        *("; charset=punycode", "; charset=undefined", "; charset=idna", '; charset="utf-7"', "; CHARSET=latin-1"),
        *("; charset=", "; charset=\xfc"),
    ],
)
def test_forms_in_other_encodings_are_refused(server: Running, charset: str) -> None:
    sent = form(charset)
    sent["headers"] = {name: value.encode("latin-1") for name, value in sent["headers"].items()}
    answer = server.post("/v1/search", **sent)
    assert answer.status_code == 415, answer.text
    assert "UTF-8" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "charset", ["", "; charset=utf-8", '; charset="UTF-8"', "; charset=utf8", "; charset=us-ascii"]
)
def test_forms_in_utf8_may_say_so(server: Running, charset: str) -> None:
    assert server.post("/v1/search", **form(charset)).status_code == 200


@pytest.mark.parametrize("path", ["/v1/search", "/v1/classify"])
def test_forms_of_pages_elsewhere_are_refused(server: Running, path: str) -> None:
    for site, refused in (("cross-site", True), ("same-origin", False), ("none", False)):
        files = {"image": ("a.png", png())}
        answer = server.post(path, files=files, headers={"sec-fetch-site": site})
        assert answer.status_code == (403 if refused else 200), answer.text
        if refused:
            assert answer.json()["error"]["type"] == "permission_error"


@pytest.mark.parametrize(
    "change",
    [
        {"image": None},
        {"images": []},
        {"images": [data_uri(png())]},
        {"classes": []},
        {"classes": ["a", "a"]},
        {"classes": ["a", " "]},
        {"classes": ["a"] * 21},
        {"classes": ["a", "x" * 2000]},
        {"classes": "ab"},
        {"classes": ["a"], "templates": ["no place"]},
        {"classes": ["a"], "templates": []},
        {"classes": ["a"], "templates": ["{}"] * 17},
        {"classes": [f"{at}" for at in range(15)], "templates": [f"{at} {{}}" for at in range(10)]},
        {"templates": ["a {}"]},
        {"top_k": 0},
        {"top_k": "3"},
        {"unknown": 1},
    ],
)
def test_classifications_that_cannot_be_asked_for(server: Running, change: dict[str, Any]) -> None:
    answer = server.post("/v1/classify", {"image": data_uri(png()), **change})
    assert answer.status_code == 422, answer.text


def test_class_names_count_with_all_their_templates(tiny_base: Callable[[str], Any]) -> None:
    service = Service(tiny_base("clip"), name="tiny", options=ServeOptions(max_inputs=20, queue=20))
    picture = data_uri(png())
    with running(service) as server:
        many = server.post("/v1/classify", {"image": picture, "classes": ["a", "b", "c"]})  # eight templates each
        assert many.status_code == 422
        assert "classes times templates" in many.json()["error"]["message"]
        assert server.post("/v1/classify", {"image": picture, "classes": ["a", "b"]}).status_code == 200
        held = hold_passes(service)
        waiting = asyncio.run_coroutine_threadsafe(
            server.client.post("/v1/classify", json={"image": picture, "classes": ["c", "d"]}), server.loop
        )
        assert held.entered.wait(10)
        assert service.batcher.reserved == 17  # texts, and the picture
        assert server.post("/v1/embeddings", {"input": ["a"] * 4}).status_code == 429
        held.hold.set()
        assert waiting.result(30).status_code == 200


def test_without_classes_they_must_be_named(tiny_base: Callable[[str], Any]) -> None:
    with running(Service(tiny_base("clip"), name="tiny")) as server:
        answer = server.post("/v1/classify", {"image": data_uri(png())})
        assert answer.status_code == 422
        assert "--classes" in answer.text
        assert server.post("/v1/search", {"text": "a"}).status_code == 404
        assert server.get("/v1/thumbnail", params={"id": "a"}).status_code == 404


class Looking(Classifier):
    """Reads pictures rather than embeddings, as one with learned prompts does."""

    reads_embeddings = False

    def pixel_similarities(self, pixels: Any) -> np.ndarray:
        return self.similarities(self.model._embeddings(self.model.pixel_features(pixels), "an image"))


def looking(tiny_base: Callable[[str], Any], **options: Any) -> Service:
    service = Service(tiny_base("clip"), name="tiny", options=ServeOptions(**options))
    service.classifier = Looking(tiny_base("clip"), CLASSES)
    return service


def test_a_classifier_that_looks_into_pictures_gets_them(tiny_base: Callable[[str], Any]) -> None:
    service = looking(tiny_base)
    contents = [png((at, 50, 50)) for at in range(10)]
    with running(service) as server:
        answer = server.post("/v1/classify", {"images": [data_uri(one) for one in contents], "top_k": 1}).json()
        wrong = server.post("/v1/classify", {"images": [data_uri(one) for one in [*contents[:9], b"x"]]})
    expected = tiny_base("clip").classifier(CLASSES).predict(contents, top_k=1)
    assert [one["labels"][0]["label"] for one in answer["data"]] == [one[0].label for one in expected]
    assert wrong.status_code == 422
    assert "images[9]" in wrong.text
    assert service.metrics.items.value("image") >= 10


def test_of_many_requests_for_such_a_classifier_some_are_answered_and_the_others_refused(
    tiny_base: Callable[[str], Any],
) -> None:
    service = looking(tiny_base, timeout=4.0)
    real = service.batcher.forwards["look"]

    def slow(items: list[Any]) -> Any:
        time.sleep(0.02 * len(items))
        return real(items)

    service.batcher.forwards["look"] = slow
    body = {"images": [data_uri(png())] * 16}
    with running(service) as server:
        assert server.post("/v1/classify", body).status_code == 200  # from here on the pace is known
        found = [one.status_code for one in server.post_all([("/v1/classify", body)] * 40)]
    assert 0 < found.count(200) < 20
    assert found.count(429) > 20
    assert set(found) <= {200, 429, 504}


# Search


def test_a_picture_finds_itself(server: Running) -> None:
    answer = server.post("/v1/search", {"image": data_uri(png(COLORS["green.png"])), "k": 2}).json()
    first = answer["data"][0]
    assert (first["rank"], first["id"]) == (1, "green.png")
    assert first["score"] == pytest.approx(1, abs=1e-4)
    assert len(answer["data"]) == 2
    assert answer["took_ms"] >= 0
    form = server.post("/v1/search", files={"image": ("a.png", png(COLORS["blue.png"]))}, data={"k": "1"}).json()
    assert [one["id"] for one in form["data"]] == ["blue.png"]


def test_a_text_finds_pictures(server: Running) -> None:
    answer = server.post("/v1/search", {"text": "绿色"}).json()
    assert {one["id"] for one in answer["data"]} == set(COLORS)


@pytest.mark.parametrize(
    "body", [{}, {"text": ""}, {"text": "a", "image": "b"}, {"text": "a", "k": 0}, {"text": "a", "k": 101}, {"k": 3}]
)
def test_searches_that_cannot_be_asked_for(server: Running, body: dict[str, Any]) -> None:
    assert server.post("/v1/search", body).status_code == 422


def test_a_number_in_a_form_may_be_of_any_length(server: Running) -> None:
    for digits in (3, 18, 19, 5000):
        answer = server.post("/v1/search", files={"image": ("a.png", png())}, data={"k": "9" * digits})
        assert answer.status_code == 422
        assert "k" in answer.json()["error"]["message"]


def test_thumbnails_are_of_indexed_pictures_alone(server: Running) -> None:
    answer = server.get("/v1/thumbnail", params={"id": "red.png"})
    assert answer.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(answer.content)).size == (40, 30)
    for id in ("../red.png", "/etc/passwd", "no.png", "", "\x00", "red.png/"):
        assert server.get("/v1/thumbnail", params={"id": id}).status_code == 404
    assert server.get("/v1/thumbnail").status_code == 422


# Addresses


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1/a.png", "http://localhost:80/", "http://[::1]/", "http://169.254.169.254/latest/"]
)
def test_private_addresses_are_not_fetched_even_where_others_are(tiny_base: Callable[[str], Any], address: str) -> None:
    service = Service(tiny_base("clip"), name="tiny", options=ServeOptions(allow_urls=True))
    with running(service) as server:
        answer = server.post("/v1/embeddings", {"input": {"image": address}})
        assert answer.status_code == 422
        assert "no public address" in answer.text


def test_a_fetched_picture_is_as_good_as_a_sent_one(tiny_base: Callable[[str], Any]) -> None:
    class Answers:
        def fetch(self, url: str) -> bytes:
            assert url == "https://pictures.example/a.png"
            return png()

    service = Service(tiny_base("clip"), name="tiny", options=ServeOptions(allow_urls=True))
    service.fetcher = Answers()  # type: ignore[assignment]
    with running(service) as server:
        vectors = embedded(server.post("/v1/embeddings", {"input": {"image": "https://pictures.example/a.png"}}))
    np.testing.assert_allclose(vectors, tiny_base("clip").encode_image([png()]), atol=1e-6)


def test_pictures_that_are_sent_do_not_wait_for_slow_addresses(tiny_base: Callable[[str], Any]) -> None:
    hold, entered = threading.Event(), threading.Event()

    class Slow:
        def fetch(self, url: str) -> bytes:
            entered.set()
            hold.wait(10)
            raise FetchError("fetching from slow.example took too long")

    service = Service(tiny_base("clip"), name="tiny", options=ServeOptions(allow_urls=True))
    service.fetcher = Slow()  # type: ignore[assignment]
    many = {"input": [{"image": "https://slow.example/a.png"}] * 50}
    with running(service) as server:
        slow = asyncio.run_coroutine_threadsafe(server.client.post("/v1/embeddings", json=many), server.loop)
        assert entered.wait(10)
        assert server.post("/v1/embeddings", {"input": {"image": data_uri(png())}}).status_code == 200
        assert not slow.done()
        hold.set()
        answer = slow.result(30)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"].startswith("input[")


# The rest


def test_state(server: Running) -> None:
    assert server.get("/healthz").json()["status"] == "ok"
    model = server.get("/v1/models").json()["data"][0]
    assert model["id"] == "tiny"
    assert model["embedding_dim"] == 12
    assert model["classes"] == 3
    assert model["languages"] == []
    assert model["index"] == {"items": 3, "pictures": True, "checksum": "0123456789abcdef"}
    text = server.get("/metrics").text
    assert 'trimtab_requests_total{route="/healthz",status="200"}' in text
    assert "trimtab_items_in_work 0" in text
    assert server.get("/nowhere").status_code == 404
    assert server.get("/v1/embeddings").status_code == 405
    assert 'route="other"' in server.get("/metrics").text


@pytest.mark.parametrize("path", ["/", "/healthz", "/metrics"])
def test_monitors_may_ask_for_the_head_alone(server: Running, path: str) -> None:
    assert server.do(server.client.head(path)).status_code == 200


def test_health_fails_when_a_pass_hangs(tiny_base: Callable[[str], Any]) -> None:
    service = Service(tiny_base("clip"), name="tiny")
    held = hold_passes(service)
    with running(service) as server:
        asked = asyncio.run_coroutine_threadsafe(server.client.post("/v1/embeddings", json={"input": "a"}), server.loop)
        assert held.entered.wait(10)
        assert server.get("/healthz").status_code == 200
        service.batcher._pass_begun = time.monotonic() - 4 * service.options.timeout - 1
        assert server.get("/healthz").status_code == 503
        found = re.search(r"^trimtab_pass_seconds (\S+)$", server.get("/metrics").text, re.MULTILINE)
        assert found is not None
        assert float(found[1]) > 120
        held.hold.set()
        assert asked.result(30).status_code == 200
        while service.batcher.pass_seconds:
            time.sleep(0.01)
        assert server.get("/healthz").status_code == 200


def test_health_fails_when_the_model_is_gone(tiny_base: Callable[[str], Any]) -> None:
    service = Service(tiny_base("clip"), name="tiny")
    with running(service) as server:
        service.batcher.stop(5)
        assert server.get("/healthz").status_code == 503
        assert server.post("/v1/embeddings", {"input": "a"}).status_code == 503


def test_the_description_names_every_route(server: Running) -> None:
    described = server.get("/openapi.json").json()
    assert set(described["paths"]) == {
        "/healthz", "/metrics", "/v1/models", "/v1/embeddings", "/v1/classify", "/v1/search", "/v1/thumbnail",
    }  # fmt: skip
    assert "$defs" not in json.dumps(described)


def test_a_proxy_may_have_the_server_below_a_path_of_its_own(tiny_base: Callable[[str], Any]) -> None:
    with running(Service(tiny_base("clip"), name="tiny"), root_path="/clip") as server:
        assert server.get("/openapi.json").json()["servers"] == [{"url": "/clip"}]
        page = server.get("/").text
    assert re.search(r"""["'`]v1/models""", page)
    assert not re.search(r"""["'`]/v1/""", page)


def test_the_page_runs_its_own_script_and_no_other(server: Running) -> None:
    answer = server.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "sha256-" in policy
    for word in ("http://", "https://", "innerHTML", "eval("):
        assert word not in answer.text.replace("http://www.w3.org", ""), word
