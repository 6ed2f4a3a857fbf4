"""Bodies in and out: a request's JSON to its model, a response's struct to JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from reprise.api.errors import HttpError
from reprise.api.text_threads import TextThreads
from reprise.api.validation import parse

RequestModel = TypeVar("RequestModel", bound=BaseModel)
SLICE = 64 * 1024
"""Bytes of an answer that are sent at a time: as much as a connection keeps for a client that does not read."""

_SMALL_BODY = 16 * 1024
"""Bytes that are parsed in a few hundred microseconds: a thread would cost more than it saves."""


def check_content_type(request: Request) -> None:
    """Raises HttpError for what is not sent as JSON.

    Every client of OpenAI's API says so: a web page can send anything else to any server that its reader can reach,
    without asking that server.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise HttpError(
            415,
            "The body must be JSON, sent with the header 'Content-Type: application/json'.",
            code="unsupported_media_type",
        )


async def read_request(request: Request, model: type[RequestModel], threads: TextThreads) -> RequestModel:
    """The body as a request of this model. Raises InvalidRequestError, or HttpError for what is not sent as
    JSON. threads: where large ones are parsed.
    """
    check_content_type(request)
    body = await request.body()
    if len(body) <= _SMALL_BODY:
        return parse(model, body)
    return await threads.run(parse, model, body)


def json_response(content: msgspec.Struct, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return SlicedResponse(msgspec.json.encode(content), status, headers, media_type="application/json")


class SlicedResponse(Response):
    """A whole body that is handed on as its client takes it.

    In one piece it would all wait at the connection, after the request is over, and a shutdown would cut it off.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if len(self.body) <= SLICE:
            await super().__call__(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        body = memoryview(self.body)
        for start in range(0, len(body), SLICE):
            end = start + SLICE
            await send({"type": "http.response.body", "body": bytes(body[start:end]), "more_body": end < len(body)})
