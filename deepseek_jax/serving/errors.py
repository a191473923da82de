"""Refusals, in the form that clients of OpenAI's API read."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

KINDS = {401: "authentication_error", 403: "permission_error", 408: "timeout_error", 429: "rate_limit_error"}
INVALID, SERVER = "invalid_request_error", "server_error"
# Of routes and methods that there are not; Starlette's own words would name neither.
WORDS = {404: "there is no such address; GET /v1/models is one", 405: "this address does not take this method"}


class ApiError(Exception):
    """A request that cannot be answered.

    Attributes:
        status: of HTTP.
        param: the field that is wrong.
        code: a word for programs, such as "model_not_found".
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        """Keep what the answer will say."""
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        """Return the JSON of the answer."""
        kind = KINDS.get(self.status, INVALID if self.status < 500 else SERVER)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def answer_api_error(_, error: Exception) -> JSONResponse:
    """Answer an `ApiError`."""
    assert isinstance(error, ApiError)
    return error.response()


def answer_http_exception(_, error: Exception) -> JSONResponse:
    """Answer Starlette's own refusals, of unknown addresses and methods."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers) if error.headers else None
    return ApiError(error.status_code, WORDS.get(error.status_code, error.detail), headers=headers).response()


def answer_fault(_, error: Exception) -> JSONResponse:
    """Answer a fault of ours; the log has its call stack, the client nothing of it."""
    return internal().response()


def internal() -> ApiError:
    """Return what a client is told of a fault of ours."""
    return ApiError(500, "the server made a mistake; its log says more", code="internal_error")
