"""Chat: deltas as chunks, chunks as the full response."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from msgspec import UNSET

from reprise.api.chunks import ResponseChunks
from reprise.api.head import ResponseHead
from reprise.protocol.requests import ChatCompletionRequest
from reprise.protocol.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    PositionLogprobs,
    TokenLogprob,
    Usage,
    finite,
)
from reprise.types import ChoiceDelta, LogprobEntry, LogprobToken


class ChatChunks(ResponseChunks[ChatChunkChoice, ChatCompletionChunk]):
    """A choice's role comes first, its finish reason last."""

    def __init__(
        self,
        head: ResponseHead,
        request: ChatCompletionRequest,
        *,
        include_usage: bool,
        prediction_token_ids: Sequence[int] = (),
    ) -> None:
        make_chunk = partial(ChatCompletionChunk, service_tier=UNSET if request.service_tier is None else "default")
        super().__init__(head, make_chunk, include_usage=include_usage, prediction_token_ids=prediction_token_ids)
        self._logprobs = bool(request.logprobs)
        self._token_ids = bool(request.return_token_ids)

    def _opening(self, delta: ChoiceDelta) -> ChatChunkChoice:
        empty = ChatLogprobs([]) if self._logprobs else None
        return ChatChunkChoice(delta.index, ChatDelta("assistant", ""), empty)

    def _generated(self, delta: ChoiceDelta) -> list[ChatChunkChoice]:
        choices = []
        ids = delta.token_ids if self._token_ids and delta.token_ids else UNSET
        if delta.text or delta.logprobs or ids:
            logprobs = ChatLogprobs([_position(entry) for entry in delta.logprobs]) if delta.logprobs else None
            choices.append(ChatChunkChoice(delta.index, ChatDelta(content=delta.text), logprobs, token_ids=ids))
        if delta.finish_reason is not None:
            # By itself: whether tokens are in it may not depend on what the delta was merged from.
            choices.append(ChatChunkChoice(delta.index, ChatDelta(), None, delta.finish_reason, delta.stop_reason))
        return choices


class ChatFold:
    """Chunks of a response, usage included, to the response."""

    def __init__(self) -> None:
        self._choices: dict[int, ChatChoice] = {}
        self._texts: dict[int, list[str]] = {}
        self._first: ChatCompletionChunk | None = None
        self._usage: Usage | None = None

    def push(self, chunk: ChatCompletionChunk) -> None:
        self._first = self._first or chunk
        if isinstance(chunk.usage, Usage):
            self._usage = chunk.usage
        for new in chunk.choices:
            choice = self._choices.setdefault(new.index, ChatChoice(new.index, ChatMessage()))
            if new.delta.content is not UNSET:
                self._texts.setdefault(new.index, []).append(new.delta.content)
            if new.logprobs is not None:
                choice.logprobs = choice.logprobs or ChatLogprobs([])
                choice.logprobs.content.extend(new.logprobs.content)
            if new.token_ids is not UNSET:
                choice.token_ids = choice.token_ids or []
                choice.token_ids.extend(new.token_ids)
            if new.finish_reason is not None:
                choice.finish_reason = new.finish_reason
                choice.stop_reason = None if new.stop_reason is UNSET else new.stop_reason

    def result(self) -> ChatCompletion:
        """The response. Only for a fold of all chunks."""
        first = self._first
        if first is None or first.reprise is UNSET or self._usage is None:
            raise ValueError("these are not all chunks of a response with usage")
        for index, texts in self._texts.items():
            self._choices[index].message.content = "".join(texts)
        return ChatCompletion(
            id=first.id,
            created=first.created,
            model=first.model,
            system_fingerprint=first.system_fingerprint,
            service_tier=first.service_tier,
            choices=[self._choices[index] for index in sorted(self._choices)],
            usage=self._usage,
            reprise=first.reprise,
        )


def _position(entry: LogprobEntry) -> PositionLogprobs:
    token, top = entry.token, entry.top
    return PositionLogprobs(token.text, finite(token.logprob), list(token.data), [_likely(likely) for likely in top])


def _likely(token: LogprobToken) -> TokenLogprob:
    return TokenLogprob(token.text, finite(token.logprob), list(token.data))
