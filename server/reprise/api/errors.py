"""The one table from errors to HTTP, and OpenAI's shape for them.

error                   status  type                   code                         retry
InvalidRequestError     400     invalid_request_error  the error's own word         no
ModelNotFoundError      404     invalid_request_error  model_not_found              no
OverloadedError         429     rate_limit_error       rate_limit_exceeded          Retry-After
UnavailableError        503     server_error           service_unavailable          Retry-After
GenerationError         500     server_error           the error's own word         no: the same request
                                                                                    would fail in the same way
  "capacity"            503                                                         yes
  "request_timeout"     504                                                         no
  "no_admissible_token" 400     invalid_request_error: the request's masks contradict each other
HttpError               its own: 401, 404, 405, 408, 409, 413, 415, 421, 422, 431, 500
anything else           500     server_error           internal_error               yes
"""

from __future__ import annotations

import logging
import traceback
from typing import NamedTuple

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from reprise.api.sampling import MASKS_LEAVE_NOTHING
from reprise.errors import (
    GenerationError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    RepriseError,
    UnavailableError,
)
from reprise.protocol.responses import Error, ErrorResponse

logger = logging.getLogger(__name__)

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
_GENERATION_STATUS = {"capacity": 503, "request_timeout": 504}


class HttpError(RepriseError):
    """A refusal that only HTTP knows: a status, and a word for it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers or {}


class ErrorReply(NamedTuple):
    """An error as HTTP says it."""

    status: int
    error: Error
    headers: dict[str, str]

    def body(self) -> bytes:
        return msgspec.json.encode(ErrorResponse(self.error))

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def to_reply(error: Exception, *, request_id: str) -> ErrorReply:
    """The reply to an error. One that nobody foresaw is logged and told with the request's id alone."""
    match error:
        case ModelNotFoundError():
            return _refusal(404, error)
        case InvalidRequestError():
            return _refusal(400, error)
        case OverloadedError():
            refused = Error(_sentence(str(error)), "rate_limit_error", None, "rate_limit_exceeded")
            return ErrorReply(429, refused, {"retry-after": str(max(1, error.retry_after))})
        case UnavailableError():
            refused = Error(_sentence(str(error)), SERVER_ERROR, None, "service_unavailable")
            return ErrorReply(503, refused, {"retry-after": str(max(1, error.retry_after))})
        case GenerationError() if error.code == MASKS_LEAVE_NOTHING:
            return to_reply(blame(error, mask=None), request_id=request_id)
        case GenerationError():
            status = _GENERATION_STATUS.get(error.code, 500)
            failed = Error(f"{_sentence(str(error))} (request {request_id})", SERVER_ERROR, None, error.code)
            return ErrorReply(status, failed, {"x-should-retry": "true" if status == 503 else "false"})
        case HttpError():
            kind = INVALID_REQUEST if error.status < 500 else SERVER_ERROR
            return ErrorReply(
                error.status, Error(_sentence(error.message), kind, error.param, error.code), error.headers
            )
        case HTTPException():
            return to_reply(_from_framework(error), request_id=request_id)
        case _:
            log_unforeseen(error, request_id)
            message = f"The server failed on this request. Its log has the cause under {request_id}."
            return ErrorReply(500, Error(message, SERVER_ERROR, None, "internal_error"), {})


def blame(error: Exception, *, mask: str | None) -> Exception:
    """What the engine found out, as the client's own doing where it is. mask: the field that the request masks by."""
    if isinstance(error, GenerationError) and error.code == MASKS_LEAVE_NOTHING:
        return InvalidRequestError(str(error), param=mask, code=error.code)
    return error


def log_unforeseen(error: BaseException, request_id: str) -> None:
    """Where it happened and of what type it is; never its message, which may quote a prompt."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %s failed with %s at\n%s", request_id, type(error).__name__, frames)


async def error_response(request: Request, error: Exception) -> Response:
    """FastAPI's handler for every error raised in a route."""
    return to_reply(error, request_id=request.scope["state"]["request_id"]).response()


def _refusal(status: int, error: InvalidRequestError) -> ErrorReply:
    code = error.code or "invalid_value"
    return ErrorReply(status, Error(_sentence(error.message), INVALID_REQUEST, error.param, code), {})


def _sentence(text: str) -> str:
    """Begin with a capital and end with a full stop."""
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?", ")")) else text + "."


def _from_framework(error: HTTPException) -> HttpError:
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return HttpError(404, "There is no such URL here. The API is under /v1.", code="not_found")
    if error.status_code == 405:
        allowed = headers.get("Allow") or headers.get("allow") or "another one"
        return HttpError(
            405,
            f"This URL does not take that method, but {allowed}.",
            code="method_not_allowed",
            headers=headers,
        )
    return HttpError(error.status_code, str(error.detail), code="http_error", headers=headers)
