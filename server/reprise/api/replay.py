"""`POST /v1/replay`: run a recorded response again on the engine that serves, and tell the first difference."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack

from fastapi import Request, Response

from reprise.api.body import json_response, read_request
from reprise.api.errors import HttpError
from reprise.api.generation import Submitted
from reprise.api.head import ResponseHead
from reprise.api.replayable import check_replayable
from reprise.api.respond import unless_client_leaves
from reprise.api.sampling import Served
from reprise.api.service import Service, new_id
from reprise.errors import BundleError, InvalidRequestError
from reprise.generation.request_stream import Reader
from reprise.ipc.messages import Ready
from reprise.protocol.requests import CompletionRequest, ReplayRequest
from reprise.protocol.responses import RepriseExtension
from reprise.replay.bundle import Bundle, convert
from reprise.replay.report import Report, make_report
from reprise.replay.run import collect
from reprise.types import GenerationRequest

logger = logging.getLogger(__name__)


async def replay(request: Request) -> Response:
    """The report on a response's replay: identical, or where it first differs.

    Raises InvalidRequestError for a bundle that no client could have asked for, HttpError 404 where there is none, and
    500 where the server's own cannot be read.
    """
    service: Service = request.app.state.service
    cleanup: ExitStack = request.scope["state"]["cleanup"]
    info = service.check_available()
    service.admission.check_room()
    body = await read_request(request, ReplayRequest, service.text_threads)
    place = service.admission.reserve(1)
    cleanup.callback(place.release)
    async with service.bundle_loads:
        bundle = await _bundle_of(body, service, request.scope["state"]["request_id"])
    place.release()
    ticket = service.admission.reserve(len(bundle.choices))
    cleanup.callback(ticket.release)
    served = service.served(info)
    try:
        requests = await service.text_threads.run(check_replayable, bundle.generations, served)
    except BundleError as error:
        raise _refusal(error, body) from None
    with ExitStack() as undo:
        streams = []
        service.check_available()
        for generation in requests:
            stream = service.engine.submit(generation)
            undo.callback(stream.close)
            streams.append(stream)
        head = _head(bundle, requests, info, service.fingerprint(info))
        submitted = Submitted(head, CompletionRequest(), requests, streams, ticket, digest=b"", owner=b"")
        running, reader = service.generations.begin(submitted)
        undo.pop_all()
    cleanup.callback(service.generations.leave, running, reader)
    report = await unless_client_leaves(request, _report(service, served, bundle, requests, reader, info))
    return json_response(report)


async def _bundle_of(body: ReplayRequest, service: Service, request_id: str) -> Bundle:
    """The bundle that a request brings or names."""
    if (body.id is None) == (body.bundle is None):
        raise InvalidRequestError("Give either 'id' or 'bundle'.", param="id")
    if body.bundle is not None:
        try:
            return await service.text_threads.run(convert, body.bundle, source="'bundle'")
        except BundleError as error:
            raise _refusal(error, body) from None
    if service.bundles is None:
        raise InvalidRequestError(
            "This server keeps no bundles. Send the bundle itself as 'bundle', or start the server with --bundle-dir.",
            param="id",
            code="bundles_off",
        )
    try:
        bundle = await service.bundles.get(body.id or "")
    except BundleError as error:
        # Its message has the path of the file, which is nobody's business but the operator's.
        logger.error("request %s: %s", request_id, error)
        message = f"The bundle of that response cannot be read. The server's log has the cause under {request_id}."
        raise HttpError(500, message, code="bundle_unreadable", headers={"x-should-retry": "false"}) from None
    if bundle is None:
        raise HttpError(404, "There is no bundle of that response here.", code="bundle_not_found")
    return bundle


def _refusal(error: BundleError, body: ReplayRequest) -> InvalidRequestError:
    return InvalidRequestError(str(error), param="id" if body.bundle is None else "bundle", code="invalid_bundle")


def _head(bundle: Bundle, requests: list[GenerationRequest], info: Ready, fingerprint: str) -> ResponseHead:
    return ResponseHead(
        id=new_id("replay"),
        created=int(time.time()),
        model=bundle.settings.model,
        system_fingerprint=fingerprint,
        extension=RepriseExtension(requests[0].sampling.seed, [], info.deterministic),
        num_prompt_tokens=tuple(len(request.prompt_token_ids) for request in requests),
        num_choices=bundle.num_choices,
    )


async def _report(
    service: Service,
    served: Served,
    bundle: Bundle,
    requests: list[GenerationRequest],
    reader: Reader,
    info: Ready,
) -> Report:
    found, error = await collect(bundle, requests, reader)
    return await service.text_threads.run(
        make_report,
        bundle,
        found,
        error,
        info=info,
        text=service.text,
        spell=served.tokenizer.vocabulary.data,
    )
