"""`reprise replay`: load a bundle's model, run its requests again, tell the first difference."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby
from pathlib import Path

import click
import msgspec
import uvloop

from reprise.api.replayable import check_replayable
from reprise.api.sampling import Served
from reprise.api.service import served_text
from reprise.errors import BundleError, GenerationError, ModelLoadError, UnavailableError
from reprise.generation.async_engine import AsyncEngine
from reprise.generation.request_stream import Reader
from reprise.generation.supervision import HangLimits
from reprise.ipc.messages import Ready
from reprise.logs import logging_to
from reprise.printable import printable
from reprise.replay.bundle import Bundle
from reprise.replay.report import Report, make_report, render
from reprise.replay.run import collect
from reprise.serve import load_tokenizer, reach_hub
from reprise.settings import Settings
from reprise.startup import LoadingDisplay
from reprise.text.tokenizer import Tokenizer
from reprise.types import GenerationRequest, SamplingParams

logger = logging.getLogger(__name__)

MAX_COMPANY_PROMPT = 256
"""Tokens of the prompt of a random request at most."""


class ReplayExitCode(IntEnum):
    """Exit codes of `reprise replay`."""

    IDENTICAL = 0
    DIFFERENT = 1
    """Or the engine was lost on the way."""
    BUNDLE = 2
    """At least one could not be run to its end."""
    MODEL = 3
    """It cannot be loaded, or a bundle is of other weights."""
    INTERRUPTED = 130


@dataclass(frozen=True)
class Circumstances:
    """What is varied around a replay, for none of it may change a bit."""

    times: int = 1
    use_cache: bool = True
    """False: nothing is reused, whatever the request said."""
    company: int = 0
    """Random requests that run beside it."""
    ignore_fingerprint: bool = False
    """Go on with other weights."""


class Replayed(msgspec.Struct, frozen=True):
    """The outcome for one bundle file: the report on its first differing run, else on the last."""

    path: str
    num_runs: int
    report: Report


class _Outcomes:
    """Prints what each bundle gave, and keeps the exit code: the highest of all."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self.exit_code = ReplayExitCode.IDENTICAL

    def replayed(self, replayed: Replayed) -> None:
        click.echo(msgspec.json.encode(replayed) if self._as_json else text_of(replayed))
        if not replayed.report.identical:
            self.exit_code = max(self.exit_code, ReplayExitCode.DIFFERENT)

    def refused(self, path: Path, error: BundleError | ModelLoadError) -> None:
        logger.error("cannot replay %s: %s", printable(str(path)), printable(str(error)))
        code = ReplayExitCode.BUNDLE if isinstance(error, BundleError) else ReplayExitCode.MODEL
        self.exit_code = max(self.exit_code, code)


def run(
    bundles: Sequence[tuple[Path, Bundle, Settings]], circumstances: Circumstances, *, as_json: bool = False
) -> int:
    """Run bundles again, each with the model of its settings, and print the reports. Returns the exit code.

    as_json: an object a line instead of text. A bundle that cannot be run on its model is logged; a model that cannot
    be loaded, or an engine that is lost, ends the run.
    """
    outcomes = _Outcomes(as_json=as_json)
    with logging_to(log_format="text"):
        try:
            for settings, group in groupby(bundles, key=lambda item: item[2]):
                with LoadingDisplay() as display:
                    display.show_stage("tokenizer")
                    unreachable = reach_hub(settings.model_path, settings.draft_model_path)
                    tokenizer = load_tokenizer(settings.model_path, settings.revision, None, unreachable)
                    members = [(path, bundle) for path, bundle, _ in group]
                    uvloop.run(_replay_all(settings, tokenizer, display, members, circumstances, outcomes))
        except ModelLoadError as error:
            logger.error("cannot replay: %s", printable(str(error)))
            return ReplayExitCode.MODEL
        except UnavailableError as error:
            logger.error("cannot replay: %s", printable(str(error)))
            return max(outcomes.exit_code, ReplayExitCode.DIFFERENT)
        except KeyboardInterrupt:
            return ReplayExitCode.INTERRUPTED
    return outcomes.exit_code


async def _replay_all(
    settings: Settings,
    tokenizer: Tokenizer,
    display: LoadingDisplay,
    bundles: Sequence[tuple[Path, Bundle]],
    circumstances: Circumstances,
    outcomes: _Outcomes,
) -> None:
    limits = HangLimits(settings.heartbeat_timeout, settings.step_timeout, settings.load_timeout)
    engine = AsyncEngine(settings.engine_config(), tokenizer, on_progress=display.show, limits=limits)
    try:
        info = await _load(engine, settings)
        display.close()
        for path, bundle in bundles:
            try:
                _check_weights(bundle, info, settings, circumstances)
                replayed = await _replay(path, bundle, engine, tokenizer, info, circumstances)
            except (BundleError, ModelLoadError) as error:
                outcomes.refused(path, error)
            else:
                outcomes.replayed(replayed)
    finally:
        await engine.stop()


async def _load(engine: AsyncEngine, settings: Settings) -> Ready:
    try:
        async with asyncio.timeout(settings.load_timeout):
            await engine.start()
    except TimeoutError:
        raise ModelLoadError(f"loading took longer than {settings.load_timeout:g} seconds") from None
    if engine.info is None:
        raise RuntimeError("an engine that has started tells what it loaded")
    return engine.info


def _check_weights(bundle: Bundle, info: Ready, settings: Settings, circumstances: Circumstances) -> None:
    recorded = bundle.model
    if info.weights_fingerprint == recorded.weights_fingerprint or circumstances.ignore_fingerprint:
        return
    dtypes = "" if info.dtype == recorded.dtype else f", and is {info.dtype} instead of {recorded.dtype}"
    raise ModelLoadError(
        f"{settings.model!r} has other weights than the model of {bundle.id}: fingerprint {info.weights_fingerprint}"
        f" instead of {recorded.weights_fingerprint}{dtypes}. Name the right one by --model, or compare all the same by"
        " --ignore-fingerprint"
    )


async def _replay(
    path: Path,
    bundle: Bundle,
    engine: AsyncEngine,
    tokenizer: Tokenizer,
    info: Ready,
    circumstances: Circumstances,
) -> Replayed:
    """Raises BundleError where it cannot be run on this model, or not to its end."""
    served = Served(
        tokenizer=tokenizer,
        max_sequence_tokens=info.max_sequence_tokens,
        vocab_size=info.vocab_size,
        max_choices=len(bundle.choices),
        defaults=tokenizer.generation_defaults,
    )
    requests = check_replayable(bundle.generations, served)
    if not circumstances.use_cache:
        requests = [_without_cache(request) for request in requests]
    text = served_text(tokenizer, tokenizer.generation_defaults)
    num_runs = 0
    while True:
        num_runs += 1
        beside = [engine.submit(request) for request in _company(circumstances.company, num_runs, requests, served)]
        streams = [engine.submit(request) for request in requests]
        try:
            found, failure = await collect(bundle, requests, Reader(streams))
        except GenerationError as error:
            raise BundleError(f"{error} ({error.code})") from None
        finally:
            for stream in (*streams, *beside):
                stream.close()
        report = make_report(bundle, found, failure, info=info, text=text, spell=tokenizer.vocabulary.data)
        if not report.identical or num_runs >= circumstances.times:
            return Replayed(str(path), num_runs, report)


def _without_cache(request: GenerationRequest) -> GenerationRequest:
    sampling = msgspec.structs.replace(request.sampling, use_cache=False)
    return msgspec.structs.replace(request, sampling=sampling)


def _company(
    number: int, run_number: int, requests: Sequence[GenerationRequest], served: Served
) -> Iterator[GenerationRequest]:
    """Requests of random prompts that run at least as long as the replayed ones, other ones for every run."""
    draw = random.Random(run_number)  # noqa: S311 # no cryptography
    longest = max(request.sampling.max_tokens for request in requests)
    for index in range(number):
        num_prompt_tokens = draw.randint(1, max(1, min(MAX_COMPANY_PROMPT, served.max_sequence_tokens - longest)))
        prompt = [draw.randrange(served.num_token_ids) for _ in range(num_prompt_tokens)]
        room = served.max_sequence_tokens - num_prompt_tokens
        sampling = SamplingParams(seed=draw.getrandbits(32), max_tokens=max(1, min(longest, room)))
        yield GenerationRequest(request_id=f"company-{index}", prompt_token_ids=prompt, sampling=sampling)


def text_of(replayed: Replayed) -> str:
    """For people."""
    first, *rest = render(replayed.report).splitlines()
    which = f"in each of {replayed.num_runs} runs" if replayed.report.identical else f"in run {replayed.num_runs}"
    return "\n".join([f"{first} {which}" if replayed.num_runs > 1 else first, *rest])
