"""A small bundle to change."""

from __future__ import annotations

from typing import Any

import msgspec

from reprise.ipc.messages import EngineConfig
from reprise.replay.bundle import Bundle, Choice, Generation, Logprobs
from reprise.replay.facts import ServedModel, ServedText, software, system_fingerprint
from reprise.types import GenerationRequest, SamplingParams, StopStrings
from support.scripted_engine import READY

REQUEST = GenerationRequest(
    request_id="cmpl-1-0",
    prompt_token_ids=[5, 6, 7],
    sampling=SamplingParams(
        seed=2**63 - 1,
        max_tokens=3,
        temperature=0.1 + 0.2,
        logit_bias={40: -1.5},
        bad_words=(b"\xc3\xa9",),
        end_token_ids=(2, 3),
        num_logprobs=2,
        num_prompt_logprobs=2,
    ),
    num_choices=2,
    stop=StopStrings(("stop",), include_in_output=True),
)
TEXT = ServedText(
    tokenizer_fingerprint="0123456789abcdef",
    end_token_ids=(2, 3),
    start_token_ids=(1,),
    chat_template_fingerprint="feedbeef",
    generation_defaults={"top_k": 20, "temperature": 0.6},
)


def choice(*token_ids: int, **changes: Any) -> Choice:
    """A finished choice with log-probabilities that need all digits of a double."""
    values = [-0.1 - 0.2 * token_id for token_id in token_ids]
    logprobs = Logprobs(
        chosen=list(values),
        top_token_ids=[[token_id, 9] for token_id in token_ids],
        top_logprobs=[[value, "-inf"] for value in values],
    )
    prompt = Logprobs(chosen=[None, -0.0, -1e-300], top_token_ids=[[], [6], [7]], top_logprobs=[[], [-0.0], [-1e-300]])
    made = Choice(token_ids=list(token_ids), text="x" * len(token_ids), finish_reason="length",
                  logprobs=logprobs, prompt_logprobs=prompt)  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def bundle(**changes: Any) -> Bundle:
    """A completion with two choices of three tokens."""
    made = Bundle(
        id="cmpl-1",
        endpoint="/v1/completions",
        created=1_700_000_000,
        outcome="complete",
        system_fingerprint=system_fingerprint(ServedModel.of(READY), TEXT),
        software=software(),
        settings=EngineConfig(model="pocket", device="cpu"),
        model=ServedModel.of(READY),
        text=TEXT,
        parameters={"prompt": "Hello", "n": 2},
        generations=[Generation(request=REQUEST, choices=[choice(10, 11, 12), choice(20, 21, 22)])],
    )
    return msgspec.structs.replace(made, **changes)
