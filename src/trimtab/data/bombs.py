"""What makes a small file cost very much to decode, beyond the size that its header tells."""

from __future__ import annotations

import re
from typing import BinaryIO

_BLOCK = 1 << 16

# What has a length or ends the picture: no stuffed byte (00), filler (ff), restart (d0 to d7), or reserved code.
_JPEG_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])")
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = 0xD8, 0xD9, 0xDA


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
