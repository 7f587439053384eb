"""Folders of pictures: walking through one, and the one that picture paths are relative to, which none leads out of."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from trimtab.data.images import is_address
from trimtab.errors import DataError


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`root` and the folders below, but for hidden ones and links, each with its folders, sorted, and its files.

    Raises:
        DataError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:  # os.walk would leave the folder out without a word
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for where, subfolders, files in os.walk(root, onerror=refuse):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(where), subfolders, files


class PictureFolder:
    """Looks up the pictures of one table or folder.

    Folders below are resolved once and remembered, so a new one is made for each reading.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._base = self.root.resolve()
        self._folders: dict[str, tuple[Path, bool]] = {}

    def find(self, value: str, *, file: str | Path, row: int) -> Path:
        r"""Path of a picture, symbolic links followed; the file itself may be missing.

        A path that is missing as it is written may be there with `/` in place of `\`, or in another normal form of
        Unicode; then it is that one.

        Args:
            value: path relative to the folder.
            file: table or folder that names it, for messages.
            row: its row there, for messages.

        Raises:
            DataError: for an address, an empty path, and whatever leads out of the folder: an absolute path, `..`,
                a symbolic link. The message names file, row and remedy.
        """
        where = f"{file}, row {row}: image path {value!r}"
        if not value.strip() or "\0" in value:
            raise DataError(f"{where} is empty or not a path: give a path relative to {self.root}")
        if is_address(value):
            raise DataError(f"{where} is an address, and addresses are never opened: download the pictures first")
        try:
            resolved, inside, settled = self._follow(value)
            if inside and settled:
                return resolved
            if inside:
                others = (self._follow(other) for other in _spellings(value))
                return next((path for path, inside, settled in others if inside and settled), resolved)
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a path the system refuses
            raise DataError(f"{where} cannot be followed ({error}): mend the link or the path") from error
        remedy = (
            f"outside the data folder {self.root}: pass the folder that holds the pictures with --root, or in a recipe "
            f"as {{path: {file}, root: FOLDER}}"
        )
        if Path(os.path.normpath(self._base / value)).is_relative_to(self._base):
            raise DataError(f"{where} is a symbolic link that leads {remedy}, or copy the file")
        raise DataError(f"{where} leads {remedy}")

    def _follow(self, value: str) -> tuple[Path, bool, bool]:
        """Where a path leads, whether that lies in the folder, and whether it is worth no other spelling."""
        folder, name = os.path.split(value)
        if name in ("", ".", ".."):
            return self._follow_whole(value)
        if (known := self._folders.get(folder)) is None:
            parent = (self._base / folder).resolve()
            known = self._folders[folder] = parent, parent.is_relative_to(self._base)
        path = known[0] / name
        try:
            mode = path.lstat().st_mode
        except OSError:
            return path, known[1] or path.is_relative_to(self._base), False
        if stat.S_ISLNK(mode):
            return self._follow_whole(value)
        return path, known[1] or path.is_relative_to(self._base), True

    def _follow_whole(self, value: str) -> tuple[Path, bool, bool]:
        resolved = (self._base / value).resolve()
        return resolved, resolved.is_relative_to(self._base), True


def _spellings(value: str) -> list[str]:
    r"""How another system would write a path: with `/` for `\`, in another normal form of Unicode."""
    if value.isascii() and "\\" not in value:
        return []
    texts = (value, value.replace("\\", "/"))
    forms = (unicodedata.normalize(form, text) for text in texts for form in ("NFC", "NFD"))
    return [text for text in dict.fromkeys((*texts, *forms)) if text != value]
