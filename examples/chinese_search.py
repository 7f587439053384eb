"""Search a folder of pictures with Chinese text.

    python examples/chinese_search.py runs/quickstart/language-zh my-photos/ 海边的狗 一碗面条

Any adapted folder will do, with its own language. The embeddings of the pictures are kept in Trimtab's cache folder, so
the second search only has to encode the query.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import trimtab
from trimtab.evaluation import nearest
from trimtab.files import atomic_path, cache_home, digest_of

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an adapted folder")
    parser.add_argument("folder", type=Path, help="searched with all folders in it")
    parser.add_argument("queries", nargs="+")
    parser.add_argument("--top", type=int, default=5)
    chosen = parser.parse_args(arguments)

    pictures = sorted(path for path in chosen.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not pictures:
        sys.exit(f"{chosen.folder} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    model = trimtab.load(chosen.model)
    names, embeddings = embed_folder(model, chosen.folder, pictures)
    if not names:
        sys.exit(f"none of the {len(pictures)} pictures in {chosen.folder} can be read")
    places, cosines = nearest(model.encode_text(chosen.queries), embeddings, chosen.top)
    for query, found, scores in zip(chosen.queries, places, cosines, strict=True):
        print(query)
        for place, score in zip(found, scores, strict=True):
            print(f"  {score:.3f}  {names[place]}")


def embed_folder(model: trimtab.DualEncoder, folder: Path, pictures: list[Path]) -> tuple[list[str], np.ndarray]:
    """Names of the pictures that can be read, and their embeddings (N, D)."""
    states = [(str(path.relative_to(folder)), path.stat()) for path in pictures]
    # Another model, or any change of a file, makes another key.
    key = digest_of(model.fingerprint, *(f"{name} {state.st_size} {state.st_mtime_ns}" for name, state in states))
    cache = cache_home() / "example-search" / f"{key}.npz"
    if cache.is_file():
        with np.load(cache, allow_pickle=False) as stored:
            return stored["names"].tolist(), stored["embeddings"]
    embeddings = model.encode_image(pictures, on_error="skip", progress=True)
    for _, source, reason in model.last_skipped:
        print(f"left out {source}: {reason}", file=sys.stderr)
    skipped = set(model.last_skipped.indices)
    names = [name for at, (name, _) in enumerate(states) if at not in skipped]
    with atomic_path(cache) as temporary, temporary.open("wb") as stream:
        np.savez(stream, names=np.array(names, dtype=np.str_), embeddings=embeddings)
    return names, embeddings


if __name__ == "__main__":
    main()
