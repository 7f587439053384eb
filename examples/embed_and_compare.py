"""Which text fits which picture: the base alone, before any training.

    python examples/embed_and_compare.py
    python examples/embed_and_compare.py my-photos/*.jpg --text "a dog on a beach" --text "a bowl of noodles"
    python examples/embed_and_compare.py my-photos/*.jpg --model path/to/clip

Without pictures of your own it takes four stamps of Tux Paint, which apt-get downloads once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import trimtab


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", type=Path)
    parser.add_argument("--text", action="append", help="repeat it for several")
    parser.add_argument("--model", default="starter", help="'starter', a transformers folder, or an adapted folder")
    chosen = parser.parse_args(arguments)
    pictures, texts = chosen.pictures, chosen.text
    if not pictures:
        pictures, own_texts = stamps()
        texts = texts or own_texts
    texts = texts or ["a photo of an animal", "a photo of food", "a photo of a building", "a photo of a person"]

    model = trimtab.load(chosen.model)
    images = model.encode_image(pictures)  # (N, D) float32, every row of length 1
    sentences = model.encode_text(texts)  # (M, D)
    cosines = model.similarity(images, sentences)  # (N, M)

    for picture, row in zip(pictures, cosines, strict=True):
        best = int(row.argmax())
        print(f"{picture.name}: {texts[best]}  (" + ", ".join(f"{cosine:.2f}" for cosine in row) + ")")


def stamps() -> tuple[list[Path], list[str]]:
    """Four photos at even distances through Tux Paint's stamps, and their own sentences."""
    from trimtab.data.pictures import tuxpaint_photos

    photos = tuxpaint_photos("zh_CN")
    picked = photos[len(photos) // 8 :: len(photos) // 4][:4]
    return [photo.path for photo in picked], [photo.english for photo in picked]


if __name__ == "__main__":
    main()
