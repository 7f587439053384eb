"""One query against an index folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.adapters.adapted import load
from trimtab.errors import DataError, ModelError
from trimtab.serve.index import Index
from trimtab.serve.store import SCORE
from trimtab.towers.dual_encoder import DualEncoder


def search(
    index: str | Path | Index,
    *,
    text: str | None = None,
    image: Any = None,
    model: str | Path | DualEncoder | None = None,
    k: int = 10,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """The items nearest to a text or picture, best first: their columns, and ``score``, the cosine.

    Args:
        index: an index folder, or an open index.
        image: what `DualEncoder.encode_image` takes.
        model: what `trimtab.load` takes, or a loaded model; None loads the model of the index.

    Raises:
        DataError: a damaged index, an empty text, neither text nor image or both.
        ModelError: a model of another space than the index, or none where it should be.
    """
    if (text is None) == (image is None):
        raise DataError("give either a text or an image to search for")
    if text is not None and not text.strip():
        raise DataError("the text to search for is empty")
    found = index if isinstance(index, Index) else Index.open(index)
    if not isinstance(model, DualEncoder):
        try:
            model = load(model or found.model.loadable, device=device)
        except ModelError as error:
            if model is None:
                raise ModelError(f"the index was made with {found.model_name!r}: {error}. Give --model") from error
            raise
    found.check_model(model)
    query = model.encode_image(image) if text is None else model.encode_text(text)
    hits = found.search(query, k)
    return [{**item, SCORE: score} for item, score in zip(hits.metadata[0], hits.scores[0], strict=True)]
