"""Run a model that `trimtab export --format onnx` wrote, without Trimtab and without torch.

    pip install onnxruntime tokenizers pillow numpy

and transformers and sentencepiece, where `tokenizer` is a folder rather than a file, as of the first SigLIP.

    from runtime import Encoder
    encoder = Encoder("the/exported/folder")
    encoder.encode_text(["红苹果"]) @ encoder.encode_image(["apple.jpg"]).T

This file, with `trimtab.data.rgb` and `trimtab.scripts` at its end, is copied into every exported folder as runtime.py.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from trimtab.data.rgb import upright
from trimtab.scripts import is_latin, normal_form

Picture: TypeAlias = "str | Path | bytes | Image.Image"
Pictures: TypeAlias = "Iterable[Picture] | Picture"


class Encoder:
    """Pictures and texts to unit vectors in one space.

    Args:
        folder: what `trimtab export` wrote.
        int8: take the quantised towers, if they were written.
        threads: of onnxruntime; None takes its default.
    """

    def __init__(self, folder: str | Path, *, int8: bool = False, threads: int | None = None) -> None:
        self.folder = Path(folder)
        self.about: dict[str, Any] = json.loads((self.folder / "export.json").read_text(encoding="utf-8"))
        self.embedding_dim: int = self.about["embedding_dim"]
        self.logit_scale: float = self.about["logit_scale"]
        self._int8, self._threads = int8, threads
        self._classify: Any = None
        self._image = self._session(self.about["image"]["file"])
        self._texts = [_TextTower(self, about) for about in self.about["texts"]]

    def encode_image(self, images: Pictures, *, batch_size: int = 32) -> np.ndarray:
        """(N, D) float32 of paths, contents of files or opened pictures, or of one."""
        images = _several(images)
        parts = [np.zeros((0, self.embedding_dim), np.float32)]
        for start in range(0, len(images), batch_size):
            parts.append(self.encode_pixels(self.pixels(images[start : start + batch_size])))
        return np.concatenate(parts)

    def pixels(self, images: Pictures) -> np.ndarray:
        """What the image tower takes, (N, 3, H, W)."""
        return np.stack([preprocess(read(one), self.about["image"]) for one in _several(images)])

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """(N, D) float32 of `pixels`."""
        return np.asarray(self._image.run(None, {"pixel_values": pixels})[0])

    def class_scores(self, images: Pictures, *, batch_size: int = 32) -> np.ndarray:
        """(N, C) probabilities of the classes in `classes`, by the prompts that were exported."""
        about, images = self._classes(), _several(images)
        parts = [np.zeros((0, len(about["classes"])), np.float32)]
        for start in range(0, len(images), batch_size):
            pixels = self.pixels(images[start : start + batch_size])
            if (self.folder / "classify.onnx").is_file():
                if self._classify is None:
                    self._classify = self._session("classify.onnx", whole=True)
                scores = np.asarray(self._classify.run(None, {"pixel_values": pixels})[0])
            else:
                scores = self.encode_pixels(pixels) @ np.load(self.folder / "classes.npy").T
            scores = about["scale"] * scores
            powers = np.exp(scores - scores.max(axis=1, keepdims=True))
            parts.append(powers / powers.sum(axis=1, keepdims=True))
        return np.concatenate(parts)

    @property
    def classes(self) -> list[str]:
        """Names of the classes that the prompts know."""
        return list(self._classes()["classes"])

    def predict(self, images: Pictures) -> list[str]:
        """The likeliest class of each picture."""
        names = self.classes
        return [names[at] for at in self.class_scores(images).argmax(axis=1)]

    def _classes(self) -> dict[str, Any]:
        path = self.folder / "classes.json"
        if not path.is_file():
            reason = self.about.get("classes_left_out", "the exported model has no prompts with classes of their own")
            raise FileNotFoundError(f"{path}: {reason}")
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def encode_text(self, texts: Iterable[str] | str, *, batch_size: int = 64) -> np.ndarray:
        """(N, D) float32 of texts, or of one; those in Latin script may have a tower of their own."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        vectors = np.zeros((len(texts), self.embedding_dim), np.float32)
        for tower in self._texts:
            chosen = [at for at, text in enumerate(texts) if tower.reads(text)]
            for start in range(0, len(chosen), batch_size):
                some = chosen[start : start + batch_size]
                vectors[some] = tower([texts[at] for at in some])
        return vectors

    def _session(self, file: str, *, whole: bool = False) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if self._threads:
            options.intra_op_num_threads = self._threads
        path = self.folder / (file.replace(".onnx", "-int8.onnx") if self._int8 and not whole else file)
        if self._int8 and not path.is_file():
            raise FileNotFoundError(f"{path}: the folder has no int8 towers: export the model again with --int8")
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _several(images: Pictures) -> list[Picture]:
    return [images] if isinstance(images, (str, Path, bytes, bytearray, Image.Image)) else list(images)


class _TextTower:
    def __init__(self, encoder: Encoder, about: dict[str, Any]) -> None:
        self.about = about
        self.session = encoder._session(about["file"])
        self.token_ids = _tokeniser(encoder.folder / about["tokenizer"], about["limit"])

    def reads(self, text: str) -> bool:
        return self.about["script"] == "all" or is_latin(text) == (self.about["script"] == "latin")

    def __call__(self, texts: list[str]) -> np.ndarray:
        given = [self.about["prefix"] + normal_form(text) for text in texts]
        rows = [ids or [self.about["pad_id"]] for ids in self.token_ids(given)]
        length = self.about["limit"] if self.about["pad_to_limit"] else max(map(len, rows))
        ids = np.full((len(rows), length), self.about["pad_id"], np.int64)
        mask = np.zeros_like(ids)
        for at, row in enumerate(rows):
            span = slice(length - len(row), length) if self.about["padding_side"] == "left" else slice(0, len(row))
            ids[at, span], mask[at, span] = row, 1
        tokens = {"input_ids": ids, "attention_mask": mask}
        return np.asarray(self.session.run(None, {name: tokens[name] for name in self.about["inputs"]})[0])


def _tokeniser(path: Path, limit: int) -> Callable[[list[str]], list[list[int]]]:
    """Texts to token ids, at most `limit` of each.

    Raises:
        ImportError: the tokenizer is a folder, one that is written in Python, and transformers or what it needs is not
            installed.
    """
    tokenizer: Any
    if path.is_dir():
        try:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(path)
        except ImportError as error:
            raise ImportError(f"{path} needs a package: pip install transformers sentencepiece ({error})") from error
        return lambda texts: tokenizer(texts, truncation=True, max_length=limit, verbose=False)["input_ids"]

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    return lambda texts: [one.ids for one in tokenizer.encode_batch(texts)]


def read(image: Picture) -> Image.Image:
    """An upright, opaque RGB picture, as `trimtab.data.images.read_image` makes it: 16-bit and float pictures are
    rescaled, not clipped.

    Raises:
        ValueError: the pixels hold NaN or infinity.
    """
    if not isinstance(image, Image.Image):
        with Image.open(io.BytesIO(image) if isinstance(image, (bytes, bytearray)) else image) as opened:
            return read(opened)
    return upright(image)


def preprocess(image: Image.Image, about: dict[str, Any]) -> np.ndarray:
    """Pixels (3, H, W) float32 as the image tower expects them."""
    if (size := about["resize"]) is not None:
        width, height = image.size
        if "shortest_edge" in size:
            short, long = size["shortest_edge"], int(size["shortest_edge"] * max(width, height) / min(width, height))
            target = (short, long) if width <= height else (long, short)
        else:
            target = (size["width"], size["height"])
        image = image.resize(target, about["resample"])
    pixels = np.asarray(image, np.float32)
    if (crop := about["crop"]) is not None:
        pixels = _central(pixels, crop["height"], crop["width"])
    pixels = pixels * np.float32(about["scale"])
    if about["mean"] is not None:
        pixels = (pixels - np.float32(about["mean"])) / np.float32(about["std"])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32)


def _central(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle part; what lies outside of a smaller picture is black."""
    rows, columns = pixels.shape[:2]
    top, left = (rows - height) // 2, (columns - width) // 2
    if top >= 0 and left >= 0:
        return pixels[top : top + height, left : left + width]
    whole = np.zeros((max(height, rows), max(width, columns), 3), np.float32)
    up, across = -(-(whole.shape[0] - rows) // 2), -(-(whole.shape[1] - columns) // 2)
    whole[up : up + rows, across : across + columns] = pixels
    return whole[max(0, top + up) :, max(0, left + across) :][:height, :width]
