"""Models of every link, and of several together, answer over HTTP as they do in the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trimtab
from tiny_links import save_language, save_tiny_domain, save_tiny_prompt
from tiny_server import data_uri, png, running
from trimtab.serve.http.service import Service
from trimtab.towers.text_encoder import TextEncoder

TEXTS = ["一只猫的照片", "a photo of a dog"]


@pytest.fixture(scope="module")
def folders(
    tiny_base: Callable[[str], Any], tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    base = tiny_base("clip")
    student = TextEncoder.load(str(tiny_folder("bert")), device="cpu")
    where = tmp_path_factory.mktemp("links")
    return {
        "language": save_language(where / "language", base, student),
        "domain": save_tiny_domain(where / "domain", base),
        "prompt": save_tiny_prompt(where / "prompt", base),
        "instance": save_tiny_prompt(where / "instance", base, instance=True),
        "patches": save_tiny_prompt(where / "patches", base, patches=True),
    }


ONE = [["language"], ["domain"], ["prompt"], ["instance"], ["patches"]]


@pytest.mark.parametrize("links", [*ONE, ["language", "domain"], ["language", "instance"], ["language", "patches"]])
def test_answers_are_those_of_the_library(
    folders: dict[str, Path], tiny_folder: Callable[[str], Path], links: list[str]
) -> None:
    if len(links) == 1:
        model = trimtab.load(folders[links[0]], device="cpu")
    else:
        model = trimtab.load(tiny_folder("clip"), links=[folders[link] for link in links], device="cpu")
    content = [png(), png((3, 200, 90))]
    expected = model.encode_text(TEXTS), model.encode_image(content)
    learned = bool({"prompt", "instance", "patches"} & set(links))
    classifier = model.classifier(None if learned else ["cat", "dog"])
    labels = classifier.predict(content, top_k=2)
    with running(Service(model, name="tiny")) as server:
        sent = [*TEXTS, *({"image": data_uri(one)} for one in content)]
        vectors = [one["embedding"] for one in server.post("/v1/embeddings", {"input": sent}).json()["data"]]
        np.testing.assert_allclose(vectors, np.concatenate(expected), atol=2e-6)
        body = {"images": [data_uri(one) for one in content], "top_k": 2}
        body |= {} if learned else {"classes": ["cat", "dog"]}
        found = server.post("/v1/classify", body).json()
    for row, wanted in zip(found["data"], labels, strict=True):
        assert [one["label"] for one in row["labels"]] == [one.label for one in wanted]
        np.testing.assert_allclose([one["score"] for one in row["labels"]], [one.score for one in wanted], atol=1e-5)
    assert found["classes"] == len(classifier.classes)


def test_texts_that_were_cut_are_counted_by_the_tower_that_cut_them(folders: dict[str, Path]) -> None:
    model: Any = trimtab.load(folders["language"], device="cpu")
    model.base.text_inputs = replace(model.base.text_inputs, limit=8)
    english = "a cat " * 5  # which the base reads; the student could take more
    assert model.text_inputs.token_ids([english])[1] == 0
    service = Service(model, name="tiny")
    with running(service) as server:
        assert server.post("/v1/embeddings", {"input": [english, "a cat"]}).status_code == 200
    assert service.metrics.truncated.value() == 1
