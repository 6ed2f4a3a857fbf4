"""`GET /v1/models` and `GET /v1/models/{model}`."""

from __future__ import annotations

from fastapi import Request, Response

from reprise.api.body import json_response
from reprise.api.service import Service
from reprise.protocol.responses import Model, ModelList


def describe(service: Service, name: str) -> Model:
    """A served name, with what loading found out about the model behind it."""
    info = service.engine.info
    if info is None:
        return Model(id=name, created=service.created, root=service.settings.model)
    return Model(
        id=name,
        created=service.created,
        root=service.settings.model,
        max_model_len=info.max_model_len,
        tier=info.tier,
        tier_reason=info.tier_reason,
        kernels=info.kernels,
        architecture=info.architecture,
        num_parameters=info.num_parameters,
        dtype=info.dtype,
        device=info.device,
        deterministic=info.deterministic,
        deterministic_reason=info.deterministic_reason,
        system_fingerprint=service.fingerprint(info),
    )


async def list_models(request: Request) -> Response:
    """The names that requests may use."""
    service: Service = request.app.state.service
    return json_response(ModelList([describe(service, name) for name in service.settings.model_names]))


async def get_model(request: Request, model: str) -> Response:
    """One name; it may hold slashes."""
    service: Service = request.app.state.service
    return json_response(describe(service, service.model_name(model)))
