"""The web page: one file, with the headers that let it do what it does and nothing else."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
_STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)


@functools.cache
def page() -> tuple[str, dict[str, str]]:
    """The page's text and its headers.

    Only its own script and style run, named by their digest: whatever a picture's name holds, no other script does.
    """
    text = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {_digests(_SCRIPT, text)}",
            f"style-src {_digests(_STYLE, text)}",
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


def _digests(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.findall(text)
    return " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode('ascii')}'" for one in found
    )
