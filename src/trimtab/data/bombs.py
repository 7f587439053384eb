"""What makes a small file cost very much to decode, beyond the size that its header tells."""

from __future__ import annotations

import re
import struct
from typing import BinaryIO

_BLOCK = 1 << 16

# What has a length or ends the picture: no stuffed byte (00), filler (ff), restart (d0 to d7), or reserved code.
_JPEG_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])")
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = 0xD8, 0xD9, 0xDA

_TILE_WIDTH, _TILE_LENGTH = 322, 323
_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q"}  # by TIFF's field types
_MOST_TAGS = 4096  # libtiff reads no directory with more


def count_scans(stream: BinaryIO, start: int, most: int) -> int:
    """Scans of a JPEG that begins at `start`, of which a progressive one decodes each over the whole picture.

    Goes through the markers as libjpeg does, so that nothing counts that stands in metadata or behind the picture. It
    ends where libjpeg ends or fails, and above `most`.
    """
    stream.seek(start + 2)
    scans, block, at = 0, b"", 0
    while scans <= most:
        found = _JPEG_MARKER.search(block, at)
        if found is None:
            more = stream.read(_BLOCK)
            if not more:
                break
            block, at = block[at:][-1:] + more, 0  # a marker may lie across two blocks
            continue
        marker, at = found[1][0], found.end()
        if marker in (_START_OF_IMAGE, _END_OF_IMAGE):
            break
        if len(block) < at + 3:
            block, at = block[at:] + stream.read(_BLOCK), 0
            if len(block) < 3:
                break
        length = int.from_bytes(block[at : at + 2], "big")
        if marker == _START_OF_SCAN:
            channels = block[at + 2]
            if length != 6 + 2 * channels:
                break  # no scan begins so: the picture lost its end, and something else stands here
            scans += 1
        at += max(2, length)
        if at > len(block):
            stream.seek(at - len(block), 1)
            block, at = b"", 0
    return scans


def tile_of_tiff(stream: BinaryIO, directory: int) -> tuple[int, int]:
    """Width and height of the tiles, which are decoded whole, in the directory at this place of a TIFF; zeros if none.

    Read from the file and not from Pillow's tags: of a tag that stands twice libtiff takes the first, some versions of
    Pillow the last. Here the largest counts.
    """
    stream.seek(0)
    head = stream.read(4)
    order, big = ("<" if head[:2] == b"II" else ">"), 43 in head[2:]
    stream.seek(directory)
    (entries,) = struct.unpack(order + ("Q" if big else "H"), stream.read(8 if big else 2))
    entry, size = (order + "HHQ8s", 20) if big else (order + "HHI4s", 12)
    content = stream.read(size * min(entries, _MOST_TAGS))
    sides = {_TILE_WIDTH: 0, _TILE_LENGTH: 0}
    for tag, kind, _, value in struct.iter_unpack(entry, content[: len(content) // size * size]):
        if tag in sides and kind in _WHOLE_NUMBERS:
            sides[tag] = max(sides[tag], _first_number(stream, order, _WHOLE_NUMBERS[kind], value))
    return sides[_TILE_WIDTH], sides[_TILE_LENGTH]


def _first_number(stream: BinaryIO, order: str, kind: str, value: bytes) -> int:
    """The first number of a tag's values, which stand elsewhere if they do not fit."""
    size = struct.calcsize(order + kind)
    if size > len(value):
        stream.seek(*struct.unpack(order + "I", value))
        value = stream.read(size)
    return int(struct.unpack(order + kind, value[:size])[0])
