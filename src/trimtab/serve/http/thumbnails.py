"""Small copies of indexed pictures. Clients name an item of the index, never a file."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

from trimtab.data.images import ImageError, read_image
from trimtab.data.picture_folder import PictureFolder
from trimtab.errors import DataError
from trimtab.serve.http.problems import Problem

SIDE = 320
_QUALITY = 82
_KEPT_BYTES = 64 << 20


class Thumbnails:
    """JPEGs of at most 320 x 320 pixels, the last ones kept in memory.

    Args:
        find: the columns of an item by its id, None if the index does not have it.
        root: the folder that pictures must be in, whatever the index says of them.
        max_pixels: of a picture; larger ones are not shown.
    """

    def __init__(
        self, find: Callable[[str], Mapping[str, str] | None], root: str | Path, *, max_pixels: int = 120_000_000
    ) -> None:
        self.find, self.root, self.max_pixels = find, Path(root).resolve(), max_pixels
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def jpeg(self, id: str) -> bytes:
        """The file's bytes.

        Raises:
            Problem: 404, the index has no such item, or its picture is gone, damaged or outside the root.
        """
        with self._lock:
            if id in self._kept:
                self._kept.move_to_end(id)
                return self._kept[id]
        known = self.find(id)
        path = None if known is None else self.path_of(known)
        if path is None:
            raise Problem(404, "the index has no picture of this id")
        try:
            image = read_image(path, max_pixels=self.max_pixels)
        except ImageError as error:
            # Its path is the server's own business.
            raise Problem(404, f"the picture cannot be shown: {error.reason}") from error
        image.thumbnail((SIDE, SIDE))
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=_QUALITY)
        return self._keep(id, stream.getvalue())

    def path_of(self, known: Mapping[str, str]) -> Path | None:
        """Its file, symlinks followed, if that is inside the root; found as `trimtab embed` found it."""
        try:
            path = PictureFolder(self.root).find(known.get("image") or "", file="the index", row=0)
            return path if path.is_file() else None
        except (DataError, OSError, ValueError):  # no path, or one that leads out; a name too long
            return None

    def _keep(self, id: str, content: bytes) -> bytes:
        with self._lock:
            if id not in self._kept:
                self._kept[id] = content
                self._bytes += len(content)
            while self._bytes > _KEPT_BYTES:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= len(dropped)
        return content
