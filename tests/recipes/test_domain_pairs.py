"""Pictures outside the domain, as evaluation gets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny_pairs import picture_bytes, write_shard
from trimtab.config import PairSource
from trimtab.errors import DataError
from trimtab.evaluation.embedding import embed_images
from trimtab.evaluation.forgetting import measure
from trimtab.recipes.domain_pairs import general_sets


def test_pictures_of_shards_stay_where_they_are(tmp_path: Path, tiny_base: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    colours = [0, 1000, 2000, 3000]
    members = {
        f"{at}.{kind}": content
        for at, colour in enumerate(colours)
        for kind, content in (("png", picture_bytes(colour, (40, 30))), ("txt", f"colour {colour}"))
    }
    shard = write_shard(tmp_path / "s.tar", members)
    (general,) = general_sets([PairSource(str(shard))], seed=0)
    assert not any(isinstance(image, bytes) for image in general.sources)
    base = tiny_base("clip")
    found = embed_images(base, general.sources)
    assert np.allclose(found.embeddings, base.encode_image([members[f"{at}.png"] for at in range(4)]), atol=1e-5)
    assert measure(base, [general]).keys() == {"s"}

    shard.write_bytes(shard.read_bytes().replace(members["2.png"][:8], b"damaged!"))
    with pytest.raises(DataError, match=r"none of the 4 images .*s\.tar: 0\.png: not an image"):
        embed_images(base, general.sources)
