"""The ASGI application: which URL leads where, and what every request passes through."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from reprise import __version__
from reprise.api import generation_routes, models, operations, replay, tokens
from reprise.api.allowed_hosts import AllowHosts, hosts_allowed
from reprise.api.auth import PUBLIC_PATHS, RequireKey
from reprise.api.errors import error_response
from reprise.api.limits import LimitBody
from reprise.api.request_context import RequestContext
from reprise.api.service import Service
from reprise.generation.interface import Engine
from reprise.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    ReplayRequest,
    TokenizeRequest,
)
from reprise.settings import Settings
from reprise.text.tokenizer import Tokenizer

_SCHEMA_REFERENCE = "#/components/schemas/{model}"
EXPOSED_HEADERS = [
    "x-request-id",
    "openai-processing-ms",
    "x-reprise-seed",
    "x-reprise-ignored-parameters",
    "idempotent-replayed",
    "retry-after",
    "x-should-retry",
]


def create_app(settings: Settings, tokenizer: Tokenizer, engine: Engine, addresses: Collection[str]) -> FastAPI:
    """The app over an engine that somebody else starts and stops. addresses: where it will be listening."""
    service = Service(settings, tokenizer, engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="Reprise",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # Logs by telemetry would hold messages of exceptions, which may quote a prompt.
        telemetry={"logs": False},
    )
    app.state.service = service
    app.add_exception_handler(HTTPException, error_response)
    _add_routes(app, settings)
    _add_layers(app, settings, service, addresses)
    _describe_bodies(app)
    return app


def _add_routes(app: FastAPI, settings: Settings) -> None:
    post, get = ["POST"], ["GET"]
    for path, endpoint, body in (
        ("/v1/chat/completions", generation_routes.create_chat_completion, ChatCompletionRequest),
        ("/v1/completions", generation_routes.create_completion, CompletionRequest),
        ("/v1/replay", replay.replay, ReplayRequest),
        ("/tokenize", tokens.tokenize, TokenizeRequest),
        ("/detokenize", tokens.detokenize, DetokenizeRequest),
    ):
        app.add_api_route(path, endpoint, methods=post, response_model=None, openapi_extra=_body(body))
    app.add_api_route("/v1/models", models.list_models, methods=get, response_model=None)
    app.add_api_route("/v1/models/{model:path}", models.get_model, methods=get, response_model=None)
    app.add_api_route("/health", operations.health, methods=get, response_model=None)
    app.add_api_route("/ready", operations.ready, methods=get, response_model=None)
    for path, probe in (("/health", operations.health), ("/ready", operations.ready)):
        app.add_api_route(path, probe, methods=["HEAD"], include_in_schema=False, response_model=None)
    app.add_api_route("/version", operations.version, methods=get, response_model=None)
    if settings.metrics:
        app.add_api_route("/metrics", operations.metrics, methods=get, response_model=None)


def _add_layers(app: FastAPI, settings: Settings, service: Service, addresses: Collection[str]) -> None:
    """From the innermost to the outermost: what is added last sees a request first."""
    app.add_middleware(LimitBody, max_bytes=settings.max_body_size)
    if settings.api_key:
        public = PUBLIC_PATHS | ({"/metrics"} if settings.public_metrics else set())
        keys = [key.get_secret_value() for key in settings.api_key]
        app.add_middleware(RequireKey, keys=keys, public_paths=public)
    hosts = hosts_allowed(settings.host, settings.allowed_hosts, addresses)
    if hosts is not None:
        app.add_middleware(AllowHosts, hosts=hosts)
    app.add_middleware(RequestContext, observe=service.metrics.observe_request)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )


def _describe_bodies(app: FastAPI) -> None:
    """Add to /openapi.json the schemas of bodies that routes read themselves."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for model in (ChatCompletionRequest, CompletionRequest, ReplayRequest, TokenizeRequest, DetokenizeRequest):
            schema = model.model_json_schema(ref_template=_SCHEMA_REFERENCE)
            schemas |= schema.pop("$defs", {}) | {model.__name__: schema}
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # the hook that FastAPI documents


def _body(model: type[BaseModel]) -> dict[str, Any]:
    reference = {"$ref": _SCHEMA_REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}
