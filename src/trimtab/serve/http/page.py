"""The web page: one file, with the headers that let it do what it does and nothing else."""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib import resources


@functools.cache
def page() -> tuple[str, dict[str, str]]:
    """The page's text, style and script inside, and its headers.

    Only its own script and style run, named by their digest: whatever a picture's name holds, no other script does.
    """
    script, style = (_read(name) for name in ("page.js", "page.css"))
    text = _read("page.html").replace("{style}", style, 1).replace("{script}", script, 1)
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src '{_digest(script)}'",
            f"style-src '{_digest(style)}'",
            "img-src 'self' blob: data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return text, headers


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"
