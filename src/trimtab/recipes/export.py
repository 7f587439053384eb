"""Export a model for programs without Trimtab, and measure what int8 costs and gains."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.adapters.adapted import load
from trimtab.data.images import ImageError, SkippedImages, read_image, read_images
from trimtab.data.manifests import RetrievalPairs, read_retrieval
from trimtab.errors import DataError, TrimtabError
from trimtab.evaluation.retrieval import retrieve
from trimtab.serve.export import EXPORT_FILE, TEXTS, TOLERANCE, export_onnx, made_pictures, quantise
from trimtab.serve.merging import merge
from trimtab.serve.onnx_runtime import Encoder
from trimtab.towers.dual_encoder import DualEncoder

FORMATS = ("onnx", "merged")
_MOST_PICTURES = 64  # of a sample that parity is checked on
_SECONDS = 2.0  # at least so long is a speed measured


def export(
    model: str | Path | DualEncoder,
    out: str | Path,
    *,
    format: str = "onnx",
    int8: bool = False,
    sample: str | Path | None = None,
    root: str | Path | None = None,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Write a model for programs without Trimtab.

    Args:
        model: what `trimtab.load` takes, or a loaded model.
        format: "onnx", see `trimtab.serve.export.export_onnx`; "merged", see `trimtab.serve.merging.merge`.
        int8: also write quantised towers, and measure them beside the others.
        sample: table with the columns ``image`` and ``text``, your own pictures and texts to check parity and to
            measure int8 on; made ones otherwise, which tell nothing of accuracy.
        root: folder of its pictures; the table's own by default.
        tolerance: of the format onnx, see `export_onnx`.

    Returns:
        what was written and measured.

    Raises:
        ModelError: the model cannot be written in that format, or differs from PyTorch's.
        DataError: `sample` cannot be used, such as one without a single picture that can be read.
    """
    if format not in FORMATS:
        raise DataError(f"format={format!r} is unknown; choose {' or '.join(FORMATS)}")
    if format == "merged" and (int8 or sample or tolerance != TOLERANCE):
        raise TrimtabError("int8, a sample and a tolerance belong to the format onnx, not to merged")
    if root is not None and sample is None:
        raise TrimtabError(f"--root {root} is the folder of a sample's pictures: give the table with --sample")
    pairs = None if sample is None else read_retrieval(sample, root)
    pictures, texts = _sampled(pairs, sample)
    loaded = load(model, device="cpu") if isinstance(model, (str, Path)) else model
    out = Path(out)
    if format == "merged":
        return merge(loaded, out)

    def finish(folder: Path, about: dict[str, Any]) -> None:
        if int8:
            quantise(folder)
            about["int8"] = compare_int8(folder, pairs, pictures)

    about = export_onnx(loaded, out, pictures=pictures, texts=texts, tolerance=tolerance, finish=finish)
    return {
        "folder": str(out),
        "model": about["model"],
        "largest difference from PyTorch": {what: f"{about['parity'][what]:.1e}" for what in ("image", "text")},
        **({"int8": about["int8"]} if int8 else {}),
        "files": {
            path.relative_to(out).as_posix(): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()
        },
    }


def _sampled(pairs: RetrievalPairs | None, sample: str | Path | None) -> tuple[list[Any], list[str]]:
    """Pictures that can be read, and texts.

    Raises:
        DataError: there is no such picture.
    """
    if pairs is None:
        return [], []
    skipped = SkippedImages()
    read = read_images(pairs.images[: 4 * _MOST_PICTURES], on_error="skip", skipped=skipped)
    pictures = [image for _, image in islice(read, _MOST_PICTURES)]
    if not pictures:
        first = f" ({skipped[0].source}: {skipped[0].reason})" if skipped else ""
        raise DataError(f"{sample} has no picture that can be read{first}: --root names the folder of its pictures")
    return pictures, pairs.texts[: 4 * _MOST_PICTURES]


def compare_int8(folder: Path, pairs: RetrievalPairs | None, pictures: Sequence[Any]) -> dict[str, Any]:
    """Cosines with float32, speed, size, and with `pairs`, of which `pictures` are some, the retrieval of both."""
    whole, small = Encoder(folder, threads=1), Encoder(folder, int8=True, threads=1)
    images: Sequence[Any] = made_pictures() if pairs is None else pictures
    texts: Sequence[str] = TEXTS if pairs is None else pairs.texts[:256]
    facts: dict[str, Any] = {"threads": 1}
    for what, items in (("image", images), ("text", texts)):
        vectors = [getattr(encoder, f"encode_{what}")(items) for encoder in (whole, small)]
        cosines = np.sum(vectors[0] * vectors[1], axis=1)
        facts[f"{what}_cosine_mean"], facts[f"{what}_cosine_min"] = float(cosines.mean()), float(cosines.min())
        speeds = _speeds([whole, small], what, list(items))
        facts[f"{what}s_per_second"] = {"float32": speeds[0], "int8": speeds[1]}
    about = json.loads((folder / EXPORT_FILE).read_text(encoding="utf-8"))
    files = ["image.onnx", *(one["file"] for one in about["texts"])]
    facts["bytes"] = {
        "float32": sum((folder / name).stat().st_size for name in files),
        "int8": sum((folder / name.replace(".onnx", "-int8.onnx")).stat().st_size for name in files),
    }
    if pairs is not None:
        facts["mR"] = {
            name: round(retrieve(_AsModel(encoder), pairs).mR, 2)
            for name, encoder in (("float32", whole), ("int8", small))
        }
    return facts


def _speeds(encoders: list[Encoder], what: str, items: list[Any]) -> list[float]:
    """Items per second of the towers alone: pictures are decoded and scaled before. Taken in turns."""
    done, spent = [0, 0], [0.0, 0.0]
    inputs = [_prepared(encoder, what, items) for encoder in encoders]
    for run, _ in inputs:
        run()
    while min(spent) < _SECONDS:
        for at, (run, count) in enumerate(inputs):
            start = time.perf_counter()
            run()
            spent[at] += time.perf_counter() - start
            done[at] += count
    return [round(count / seconds, 1) for count, seconds in zip(done, spent, strict=True)]


def _prepared(encoder: Encoder, what: str, items: list[Any]) -> tuple[Any, int]:
    if what == "text":
        return lambda: encoder.encode_text(items), len(items)
    pixels = encoder.pixels(items[:16])
    return lambda: encoder.encode_pixels(pixels), len(pixels)


class _AsModel:
    """An exported model as evaluation wants one; pictures that cannot be read are left out."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.last_skipped: list[tuple[int, str, str]] = []

    def encode_image(self, images: Any, *, on_error: Any = "raise", progress: bool = False) -> np.ndarray:
        self.last_skipped, parts = [], []
        for at, source in enumerate(images):
            try:
                parts.append(self.encoder.pixels([read_image(source)]))
            except ImageError as error:
                self.last_skipped.append((at, error.source, error.reason))
        vectors = [np.zeros((0, self.encoder.embedding_dim), np.float32)]
        for start in range(0, len(parts), 32):
            vectors.append(self.encoder.encode_pixels(np.concatenate(parts[start : start + 32])))
        return np.concatenate(vectors)

    def encode_text(self, texts: Any, *, progress: bool = False) -> np.ndarray:
        return self.encoder.encode_text(list(texts))
