"""What can go wrong between this client and a server."""

from __future__ import annotations


class ClientError(Exception):
    """Anything that this client raises on purpose.

    `request_id` is the server's name for the request, where there was an answer: quote it in a report.
    """

    def __init__(self, message: str, *, request_id: str | None = None) -> None:
        super().__init__(f"{message} (request {request_id})" if request_id else message)
        self.message = message
        self.request_id = request_id


class APIError(ClientError):
    """The server refused or failed the request and says why.

    `status` is the HTTP status, or None where the error came inside a stream. `param` names the request's
    field, `code` is a word for the reason, `retry_after` are seconds after which to try again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None,
        error_type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, request_id=request_id)
        self.status = status
        self.error_type = error_type
        self.param = param
        self.code = code
        self.retry_after = retry_after


class ConnectionFailedError(ClientError):
    """No answer: nobody listens, the connection broke, or a time-out passed."""


class StreamBrokenError(ClientError):
    """A stream ended before the server said that it was complete."""
