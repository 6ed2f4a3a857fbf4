"""Run a recorded response again, as far as it was recorded."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from reprise.errors import GenerationError
from reprise.replay.bundle import Bundle, Failure, Generation, Recording, is_circumstance
from reprise.types import ChoiceDelta, GenerationRequest


async def collect(
    bundle: Bundle, requests: Sequence[GenerationRequest], deltas: AsyncIterator[ChoiceDelta]
) -> tuple[list[Generation], Failure | None]:
    """What the deltas of another run give, and the request's own error that it ends with.

    requests: the bundle's, or variations of them. Where the recorded response did not end, the run is not read to its
    end either: as soon as every choice is as far as in the bundle. One that failed is read a token further, where the
    error is to be expected. The caller closes what still runs. Raises UnavailableError where there is no engine, and
    GenerationError where circumstances end the run, which tells nothing of the response.
    """
    recording, failure = Recording(requests), None
    further = bundle.outcome == "failed"
    enough = [None if choice.finish_reason else len(choice.token_ids) + further for choice in bundle.choices]
    num_open = sum(num_tokens != 0 for num_tokens in enough)
    done = [num_tokens == 0 for num_tokens in enough]
    try:
        while num_open:
            delta = await anext(deltas)
            recording.add(delta)
            choice, num_tokens = recording.choices[delta.index], enough[delta.index]
            reached = num_tokens is not None and len(choice.token_ids) >= num_tokens
            if not done[delta.index] and (reached or choice.finish_reason is not None):
                done[delta.index] = True
                num_open -= 1
    except StopAsyncIteration:
        pass
    except GenerationError as error:
        if is_circumstance(error):
            raise
        failure = Failure(code=error.code, message=str(error))
    return recording.finish(), failure
