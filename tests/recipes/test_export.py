from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trimtab.adapters.adapted import load
from trimtab.errors import DataError, ModelError, TrimtabError
from trimtab.recipes import export as module
from trimtab.recipes.export import export


@pytest.fixture
def sample(tmp_path: Path, pictures: list[Image.Image]) -> Path:
    folder = tmp_path / "sample"
    folder.mkdir()
    rows = [("image", "text"), ("bad.png", "a dog")]
    for at, picture in enumerate(pictures):
        picture.save(folder / f"{at}.png")
        rows.append((f"{at}.png", ["a cat", "一只猫", "two apples", "the moon", "a black bear"][at]))
    (folder / "bad.png").write_bytes(b"no picture")
    with (folder / "sample.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return folder / "sample.csv"


def test_int8_is_measured_on_a_sample(
    tiny_base: Callable[[str], Any], sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SECONDS", 0.01)
    outcome = export(tiny_base("clip"), tmp_path / "out", int8=True, sample=sample)
    about = json.loads((tmp_path / "out/export.json").read_text())
    assert about["parity"]["pictures"] > 5  # those of the sample too
    assert about["int8"] == outcome["int8"]
    assert about["int8"]["image_cosine_min"] > 0.9
    assert set(about["int8"]["mR"]) == {"float32", "int8"}
    assert about["int8"]["texts_per_second"]["int8"] > 0
    assert "image-int8.onnx" in outcome["files"]


def test_a_run_that_ends_while_int8_is_written_leaves_nothing_that_looks_whole(
    tiny_base: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "compare_int8", stopped)
    with pytest.raises(KeyboardInterrupt):
        export(tiny_base("clip"), tmp_path / "out", int8=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "words"), [(b"no picture", "not an image"), (None, "no such file")])
def test_a_sample_without_a_picture_that_can_be_read_is_refused(
    sample: Path, tmp_path: Path, content: bytes | None, words: str
) -> None:
    for path in sample.parent.glob("*.png"):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    with pytest.raises(DataError, match=rf"sample\.csv.*{words}"):
        export("no-such-model", tmp_path / "out", int8=True, sample=sample)
    assert not (tmp_path / "out").exists()


def test_a_plain_model_is_a_transformers_folder(
    tiny_base: Callable[[str], Any], pictures: list[Image.Image], tmp_path: Path
) -> None:
    from transformers import AutoModel

    model = tiny_base("clip")
    outcome = export(model, tmp_path / "out", format="merged")
    assert outcome["load_with"].startswith("transformers.CLIPModel.from_pretrained")
    assert type(AutoModel.from_pretrained(tmp_path / "out")).__name__ == "CLIPModel"
    assert np.array_equal(load(tmp_path / "out", device="cpu").encode_image(pictures), model.encode_image(pictures))
    with pytest.raises(ModelError, match="other files"):
        export(model, tmp_path / "out", format="merged")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"format": "tflite"}, DataError, "onnx or merged"),
        ({"format": "merged", "int8": True}, TrimtabError, "belong to the format onnx"),
        ({"format": "merged", "tolerance": 0.01}, TrimtabError, "belong to the format onnx"),
        ({"root": "photos"}, TrimtabError, "--sample"),
        ({"sample": "gone.csv"}, DataError, "no such file"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        export("no-such-model", tmp_path / "out", **options)
