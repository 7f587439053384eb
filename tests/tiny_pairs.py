"""Small pictures, tables and shards on disk, for tests of image-text data."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture_bytes(number: int, size: tuple[int, int] = (6, 5), format: str = "PNG") -> bytes:
    """An encoded picture of one colour; numbers up to 4095 give different bytes."""
    stream = io.BytesIO()
    colour = (16 * (number % 16), 16 * (number // 16 % 16), 16 * (number // 256 % 16))
    Image.new("RGB", size, colour).save(stream, format)
    return stream.getvalue()


def save_pictures(folder: Path, names: Iterable[str]) -> None:
    """One picture per name, all different."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture_bytes(number))


def write_table(path: Path, rows: Sequence[Sequence[Any]], columns: Sequence[str] = ("image", "text")) -> Path:
    """A table in the format of its suffix."""
    if path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(columns, row))) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({name: [row[i] for row in rows] for i, name in enumerate(columns)}), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([columns, *rows])
    return path


def write_shard(path: Path, members: Mapping[str, bytes | str] | Sequence[tuple[str, bytes | str]]) -> Path:
    """An uncompressed tar file with these members, in order; names are not looked at."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path
