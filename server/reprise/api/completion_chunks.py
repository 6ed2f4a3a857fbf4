"""Completions: deltas as chunks, chunks as the full response."""

from __future__ import annotations

from msgspec import UNSET

from reprise.api.chunks import ResponseChunks
from reprise.api.completions import prompts_of
from reprise.api.head import ResponseHead
from reprise.api.legacy_logprobs import LegacyLogprobsWriter, extend
from reprise.protocol.requests import CompletionRequest
from reprise.protocol.responses import Completion, CompletionChoice, LegacyLogprobs, Usage
from reprise.text.vocabulary import Vocabulary
from reprise.types import ChoiceDelta, GenerationRequest


def echoed_texts(request: CompletionRequest, vocabulary: Vocabulary) -> list[str]:
    """What `echo` puts before each prompt's choices: the prompt as it was given; ids are spelt out."""
    return [
        prompt
        if isinstance(prompt, str)
        else b"".join(vocabulary.data(token_id) for token_id in prompt).decode(errors="replace")
        for prompt in prompts_of(request)
    ]


class CompletionChunks(ResponseChunks[CompletionChoice, Completion]):
    """The echoed prompt comes before a choice's first text; its finish reason comes with its last."""

    def __init__(
        self,
        head: ResponseHead,
        request: CompletionRequest,
        generations: list[GenerationRequest],
        vocabulary: Vocabulary,
        *,
        include_usage: bool,
    ) -> None:
        super().__init__(head, Completion, include_usage=include_usage)
        self._num_choices = head.num_choices
        self._token_ids = bool(request.return_token_ids)
        self._generations = generations
        self._vocabulary = vocabulary
        self._echoes = echoed_texts(request, vocabulary) if request.echo else None
        self._logprobs = request.logprobs is not None
        self._writers: dict[int, LegacyLogprobsWriter] = {}

    def _opening(self, delta: ChoiceDelta) -> CompletionChoice | None:
        if self._echoes is None:
            return None
        prompt_index = delta.index // self._num_choices
        text = self._echoes[prompt_index]
        logprobs = None
        if self._logprobs:
            prompt_ids = self._generations[prompt_index].prompt_token_ids
            entries = delta.prompt_logprobs or []
            logprobs = self._writer(delta.index).prompt(text, prompt_ids, entries)
        return CompletionChoice(delta.index, text, logprobs)

    def _generated(self, delta: ChoiceDelta) -> list[CompletionChoice]:
        if not (
            delta.text or delta.logprobs or delta.finish_reason is not None or (delta.token_ids and self._token_ids)
        ):
            return []
        logprobs: LegacyLogprobs | None = None
        if self._logprobs:
            logprobs = self._writer(delta.index).generated(delta.logprobs or [])
        choice = CompletionChoice(delta.index, delta.text, logprobs)
        if delta.finish_reason is not None:
            choice.finish_reason = delta.finish_reason
            choice.stop_reason = delta.stop_reason
        if self._token_ids:
            choice.token_ids = delta.token_ids
        return [choice]

    def _writer(self, index: int) -> LegacyLogprobsWriter:
        return self._writers.setdefault(index, LegacyLogprobsWriter(self._vocabulary))


class CompletionFold:
    """Chunks of a response, usage included, to the response."""

    def __init__(self) -> None:
        self._choices: dict[int, CompletionChoice] = {}
        self._texts: dict[int, list[str]] = {}
        self._first: Completion | None = None
        self._usage: Usage | None = None

    def push(self, chunk: Completion) -> None:
        self._first = self._first or chunk
        if isinstance(chunk.usage, Usage):
            self._usage = chunk.usage
        for new in chunk.choices:
            choice = self._choices.setdefault(new.index, CompletionChoice(new.index, "", stop_reason=None))
            self._texts.setdefault(new.index, []).append(new.text)
            if new.logprobs is not None:
                choice.logprobs = extend(choice.logprobs, new.logprobs)
            if new.token_ids is not UNSET:
                choice.token_ids = choice.token_ids or []
                choice.token_ids.extend(new.token_ids)
            if new.finish_reason is not None:
                choice.finish_reason = new.finish_reason
                choice.stop_reason = new.stop_reason

    def result(self) -> Completion:
        """The response. Only for a fold of all chunks."""
        first = self._first
        if first is None or self._usage is None:
            raise ValueError("these are not all chunks of a response with usage")
        for index, texts in self._texts.items():
            self._choices[index].text = "".join(texts)
        return Completion(
            id=first.id,
            created=first.created,
            model=first.model,
            system_fingerprint=first.system_fingerprint,
            choices=[self._choices[index] for index in sorted(self._choices)],
            usage=self._usage,
            reprise=first.reprise,
        )
