from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reprise.errors import BundleError, GenerationError, UnavailableError
from reprise.replay import bundle as bundle_module
from reprise.replay.bundle import (
    Logprobs,
    Outcome,
    Recording,
    convert,
    decode,
    encode,
    outcome_of,
    read_bundle,
)
from reprise.types import ChoiceDelta, FinishReason, LogprobEntry, LogprobToken
from support.bundles import REQUEST, bundle


def test_a_bundle_survives_its_file() -> None:
    made = bundle()
    assert decode(encode(made), source="it") == made
    assert convert(json.loads(encode(made)), source="it") == made, "as it comes in a request's body"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_double_survives_with_its_bits(value: float) -> None:
    logprobs = Logprobs(chosen=[value], top_token_ids=[[]], top_logprobs=[[]])
    (found,) = msgspec.json.decode(msgspec.json.encode(logprobs), type=Logprobs).chosen
    assert struct.pack("<d", found) == struct.pack("<d", value)


def entry(token_id: int, logprob: float, *top: tuple[int, float]) -> LogprobEntry:
    def token(number: int, value: float) -> LogprobToken:
        return LogprobToken(number, "?", b"?", value)

    return LogprobEntry(token(token_id, logprob), [token(*each) for each in top])


def test_deltas_are_recorded_as_their_fold() -> None:
    recording = Recording([REQUEST])
    recording.add(ChoiceDelta(index=1, text="a", token_ids=[7], logprobs=[entry(7, -0.5, (8, -math.inf))]))
    recording.add(ChoiceDelta(index=0, token_ids=[1], prompt_logprobs=[None, entry(6, -2.0)]))
    recording.add(ChoiceDelta(index=1, text="b", token_ids=[9], logprobs=[entry(9, -0.25)]))
    recording.add(ChoiceDelta(index=1, token_ids=[2], finish_reason=FinishReason.STOP, stop_reason="b"))
    (generation,) = recording.finish()
    assert generation.request is REQUEST
    first, second = generation.choices
    assert (first.token_ids, first.finish_reason, first.logprobs) == ([1], None, None)
    assert first.prompt_logprobs == Logprobs(chosen=[None, -2.0], top_token_ids=[[], []], top_logprobs=[[], []])
    assert (second.text, second.token_ids) == ("ab", [7, 9, 2])
    assert (second.finish_reason, second.stop_reason) == ("stop", "b")
    assert second.logprobs == Logprobs(chosen=[-0.5, -0.25], top_token_ids=[[8], []], top_logprobs=[["-inf"], []])


@pytest.mark.parametrize(
    ("error", "outcome", "code"),
    [
        (None, "complete", None),
        (GenerationError("a", code="numerical_error"), "failed", "numerical_error"),
        (GenerationError("a", code="request_timeout"), "aborted", "request_timeout"),
        (UnavailableError("a"), "aborted", "service_unavailable"),
        (RuntimeError("a"), "aborted", None),
    ],
    ids=str,
)
def test_only_errors_of_the_request_itself_are_expected_again(
    error: Exception | None, outcome: Outcome, code: str | None
) -> None:
    found, failure = outcome_of(error)
    assert (found, failure and failure.code) == (outcome, code)


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one member of a bundle's JSON, named by its path."""

    def change(document: dict[str, Any]) -> None:
        *parents, last = [int(step) if step.isdigit() else step for step in path.split(".")]
        node: Any = document
        for step in parents:
            node = node[step]
        node[last] = value

    return change


CHOICE = "generations.0.choices.0"
SAMPLING = "generations.0.request.sampling"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format", 1), "has format 1, and this version reads format 2"),
        (_set("format", "2"), "must be a JSON object whose 'format' is 2"),
        (_set("format", True), "must be a JSON object whose 'format' is 2"),
        (_set("surprise", 1), "unknown field `surprise`"),
        (_set(f"{SAMPLING}.surprise", 1), "unknown field `surprise` - at `$.generations[0].request.sampling`"),
        (_set("settings.surprise", 1), "unknown field `surprise` - at `$.settings`"),
        (_set("generations.0.request.stop.surprise", 1), "unknown field `surprise`"),
        (_set("generations", []), "length >= 1 - at `$.generations`"),
        (_set("id", "x" * 129), "`$.id`"),
        (_set("id", "cmpl-\x1b[2J"), "`$.id`"),
        (_set("id", "cmpl-1\n"), "`$.id`"),
        (_set("outcome", "good"), "`$.outcome`"),
        (_set(f"{SAMPLING}.seed", "1"), "`$.generations[0].request.sampling.seed`"),
        (_set(f"{SAMPLING}.bad_words", ["%"]), "`$.generations[0].request.sampling.bad_words"),
        (_set(f"{CHOICE}.token_ids", [2**40]), "`$.generations[0].choices[0].token_ids[0]`"),
        (_set(f"{CHOICE}.token_ids", [-1]), "`$.generations[0].choices[0].token_ids[0]`"),
        (_set(f"{CHOICE}.logprobs.chosen", [-1.0]), "must be of one length"),
        (_set(f"{CHOICE}.logprobs.top_token_ids", [[], [1], [2]]), "must be as long as"),
        (_set(f"{CHOICE}.logprobs.chosen", ["inf", -1.0, -1.0]), "`$.generations[0].choices[0].logprobs.chosen"),
        (_set("generations.0.request.num_choices", 3), "there are 2 choices, and 'num_choices' is 3"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_bundle_is_named(change: Callable[[dict[str, Any]], None], message: str) -> None:
    document = json.loads(encode(bundle()))
    change(document)
    with pytest.raises(BundleError) as caught:
        decode(json.dumps(document).encode(), source="b.json")
    assert str(caught.value).startswith("b.json ")
    assert message in str(caught.value)


def test_prompts_of_one_response_have_equally_many_choices() -> None:
    document = json.loads(encode(bundle()))
    other = json.loads(encode(bundle()))["generations"][0]
    other["request"]["num_choices"] = 1
    del other["choices"][1]
    document["generations"].append(other)
    with pytest.raises(BundleError, match="the same 'num_choices'"):
        convert(document, source="it")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]", b"null", b"[" * 100_000, b'{"format": 2}'])
def test_what_is_no_bundle_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match=r"^b\.json "):
        decode(data, source="b.json")


def test_files_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(BundleError, match=r"a\.json cannot be read: No such file"):
        read_bundle(path)
    with pytest.raises(BundleError, match="cannot be read: Is a directory"):
        read_bundle(tmp_path)
    path.write_bytes(encode(bundle()))
    assert read_bundle(path) == bundle()
    monkeypatch.setattr(bundle_module, "MAX_BUNDLE_BYTES", 100)
    with pytest.raises(BundleError, match="larger than a bundle ever is, 100 bytes"):
        read_bundle(path)
