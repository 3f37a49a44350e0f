"""Errors as OpenAI's envelope: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any


_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    499: "request_cancelled",
    503: "service_unavailable",
    504: "timeout_error",
}
_RETRY_AFTER = {"retry-after": "1"}  # seconds


class ApiError(Exception):
    """An answer other than success.

    Attributes:
      status: the HTTP status.
      message: for the client; never holds a secret.
      param: the field of the request that is to blame, if one is.
      code: a word a program can act on, if there is one.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The envelope."""
        type_ = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": type_, "param": self.param, "code": self.code or self.status}}

    @property
    def headers(self) -> dict[str, str]:
        """When to try again, where that helps."""
        return dict(_RETRY_AFTER) if self.status in (429, 503) else {}
