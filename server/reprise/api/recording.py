"""Hands a bundle of every response to the store when its generation ends, however it ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import get_args, get_type_hints

import msgspec

from reprise.api.generation import Generation
from reprise.generation.interface import Engine
from reprise.ipc.messages import EngineConfig, Ready
from reprise.replay.bundle import Bundle, Recording, outcome_of
from reprise.replay.facts import ServedModel, ServedText, software
from reprise.replay.store import BundleStore
from reprise.settings import Settings

ENDPOINTS = {"chatcmpl": "/v1/chat/completions", "cmpl": "/v1/completions"}
"""By the prefix of a response's id. What has another one, as a replay has, is not recorded."""


def recorder(store: BundleStore, settings: Settings, engine: Engine, text: ServedText) -> Callable[[Generation], None]:
    """A callback for `Generations.on_begin`."""

    def begin(generation: Generation) -> None:
        info = engine.info
        # One that is computed again never takes the place of the first's bundle.
        new = not generation.submitted.recomputed
        if info is not None and new and generation.head.id.partition("-")[0] in ENDPOINTS:
            generation.keep_log()
            generation.on_end.append(lambda ended: store.put(partial(make_bundle, ended, settings, info, text)))

    return begin


def make_bundle(generation: Generation, settings: Settings, info: Ready, text: ServedText) -> Bundle:
    """The bundle of a generation that has ended: nothing is added to its log any more, so any thread may call this."""
    submitted, head = generation.submitted, generation.head
    recording = Recording(submitted.requests)
    for choice in generation.choices():
        recording.add(choice)
    outcome, failure = outcome_of(generation.error)
    return Bundle(
        id=head.id,
        endpoint=ENDPOINTS[head.id.partition("-")[0]],
        created=head.created,
        outcome=outcome,
        error=failure,
        system_fingerprint=head.system_fingerprint,
        software=software(),
        settings=recorded_settings(settings, info),
        model=ServedModel.of(info),
        text=text,
        parameters=submitted.parameters.model_dump(mode="json", exclude_unset=True),
        generations=recording.finish(),
    )


def recorded_settings(settings: Settings, info: Ready) -> EngineConfig:
    """What the engine was started with: the model as it was named, and what was chosen where it could choose."""
    kernels = info.kernels.partition(",")[0]  # the rest is the instruction set, which is no setting
    if kernels not in get_args(get_type_hints(EngineConfig)["kernels"]):
        kernels = "auto"  # those that can be had in no other way, as the decoder for CUDA
    chosen = {"device": info.device, "dtype": info.dtype, "tier": info.tier, "kernels": kernels}
    return msgspec.structs.replace(settings.engine_config(), model=settings.model, **chosen)
