"""What the toys of domain and prompt link share: colours whose names the tiny BERT knows, tables, signals; a
camera file."""

from __future__ import annotations

import functools
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

import tiny_pairs

COLOURS = {"red": (200, 30, 30), "yellow": (220, 210, 40), "blue": (30, 60, 200), "green": (40, 160, 60)}


def noisy(pixels: np.ndarray, number: int, strength: int) -> Image.Image:
    """Pixels (40, 40, 3) with noise that differs for every number."""
    noise = np.random.default_rng(number).integers(-strength, strength, (40, 40, 3))
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


def write_pictures(
    folder: Path,
    numbers: Sequence[int],
    picture: Callable[[int], Image.Image],
    text: Callable[[int], str],
    name: str,
    **options: Any,
) -> Path:
    """Pictures and their table."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        picture(number).save(folder / f"{number:03d}.png")
    rows = [(f"{number:03d}.png", text(number)) for number in numbers]
    return tiny_pairs.write_table(folder / name, rows, **options)


def signal_at(task: type, step: int, number: int) -> None:
    """Have this process send itself a signal at the start of a step of a task."""
    original, calls = task.step, 0  # type: ignore[attr-defined]

    @functools.wraps(original)
    def counted(self: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), number)
        return original(self, batch)

    task.step = counted  # type: ignore[attr-defined]


def tiff_of_12_bits(levels: np.ndarray) -> bytes:
    """A grey TIFF file as industrial cameras write it, 12 bits a pixel; `levels` (H, W) 0..4095, an even number."""
    height, width = levels.shape
    first, second = levels.reshape(-1, 2).astype(np.uint16).T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8).tobytes()
    packed += b"\0" * (len(packed) % 2)
    # Tag, type (3: two bytes, 4: four) and value of each field: sizes, bits, no compression, 0 is black, one strip.
    fields = [
        (256, 3, width), (257, 3, height), (258, 3, 12), (259, 3, 1), (262, 3, 1),
        (273, 4, 8), (277, 3, 1), (278, 3, height), (279, 4, len(packed)),
    ]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in fields)
    return struct.pack("<4sI", b"II*\0", 8 + len(packed)) + packed + struct.pack("<H", 9) + directory + bytes(4)


def bmp_with_alpha(pixels: np.ndarray) -> bytes:
    """A BMP file of 32 bits with a mask for alpha; `pixels` (H, W, 4) uint8."""
    height, width, _ = pixels.shape
    data = np.ascontiguousarray(pixels[::-1, :, [2, 1, 0, 3]]).tobytes()
    head = struct.pack("<IiiHHIIiiII", 124, width, height, 1, 32, 3, len(data), 2835, 2835, 0, 0)
    head += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs"
    start = 14 + 124
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + head.ljust(124, b"\0") + data


def many_scans(jpeg: bytes, more: int) -> bytes:
    """A JPEG whose last scan stands so many times more."""
    start, end = jpeg.rfind(b"\xff\xda"), jpeg.rfind(b"\xff\xd9")
    return jpeg[:end] + jpeg[start:end] * more + jpeg[end:]


def jpeg_segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 255, marker, len(content) + 2) + content


def tiled_tiff(
    *tiles: tuple[int, int], order: str = "<", big: bool = False, kind: Literal["H", "I", "Q"] = "I"
) -> bytes:
    """A grey TIFF of 64x64 pixels with one tile of zeros, told to be of each of these sizes, and deflated.

    The content is that of the last size, if it is small.

    Args:
        order: of bytes, as `struct` has it.
        big: a BigTIFF.
        kind: how the sizes are stored, as `struct` has it.
    """
    width, height = tiles[-1]
    packed = zlib.compress(bytes(width * height if width * height < 1 << 20 else 1))
    head = 16 if big else 8
    directory = head + len(packed) + 16  # 16 bytes for two values that do not fit
    fields: list[tuple[int, str, int]] = [
        (256, "H", 64), (257, "H", 64), (258, "H", 8), (259, "H", 8), (262, "H", 1), (277, "H", 1),
        *((322, kind, size) for size, _ in tiles), *((323, kind, size) for _, size in tiles),
        (324, "I", head), (325, "I", len(packed)),
    ]  # fmt: skip
    far, entries = b"", b""
    for tag, form, value in fields:
        content = struct.pack(order + form, value)
        if len(content) > (8 if big else 4):
            content, far = struct.pack(order + "I", head + len(packed) + len(far) % 16), far + content
        number = {"H": 3, "I": 4, "Q": 16}[form]
        entries += struct.pack(order + ("HHQ" if big else "HHI"), tag, number, 1) + content.ljust(
            8 if big else 4, b"\0"
        )
    mark = b"II" if order == "<" else b"MM"
    start = struct.pack(order + ("HHHQ" if big else "HI"), *((43, 8, 0) if big else (42,)), directory)
    count = struct.pack(order + ("Q" if big else "H"), len(fields))
    return mark + start + packed + far.ljust(16, b"\0")[:16] + count + entries + bytes(8)
