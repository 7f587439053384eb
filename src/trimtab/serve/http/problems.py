"""What a client gets instead of an answer: a status, and a body of the shape that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    422: "invalid_request_error",
    429: "overloaded_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class Problem(Exception):  # noqa: N818 - it is an answer, of which most are the client's doing
    """An answer other than the one asked for.

    Attributes:
        status: of HTTP.
        message: for people; it never holds more than a few words of what the client sent.
        param: the field at fault.
        headers: sent with it.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON to send."""
        kind = _KINDS.get(self.status, "server_error")
        # A lone surrogate in what a client sent must not break the answer about it.
        message = self.message.encode("utf-8", "replace").decode("utf-8")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.status}}


def overloaded(message: str, *, status: int = 429, after: int = 1) -> Problem:
    """One that asks the client to come again after some seconds."""
    return Problem(status, message, headers={"Retry-After": str(after)})
