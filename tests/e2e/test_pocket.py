"""The bundled model over HTTP: the first conversation that somebody has with the server."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.local_server import LocalServer
from recipes.pocket.questions import PUBLISHED, Question, read
from support.live_api import CHAT, Answer, LiveApi

NUM_QUESTIONS = 20
LEAST_SHARE = 0.9


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    published = read(PUBLISHED)
    return published[:: max(1, len(published) // NUM_QUESTIONS)][:NUM_QUESTIONS]


def test_it_answers_published_questions(live_server: LocalServer, questions: list[Question]) -> None:
    assert len(questions) == NUM_QUESTIONS
    with LiveApi(live_server) as api:
        followed = [_follows(api, question) for question in questions]
    missed = [question.turns for question, is_followed in zip(questions, followed, strict=True) if not is_followed]
    assert sum(followed) >= LEAST_SHARE * NUM_QUESTIONS, missed


def _follows(api: LiveApi, question: Question) -> bool:
    """Ask turn by turn; the last answer counts, and it must end by itself."""
    messages: list[dict[str, Any]] = []
    answer: Answer | None = None
    for turn in question.turns:
        messages.append({"role": "user", "content": turn})
        answer = api.answer(CHAT, {"messages": messages, "temperature": 0, "max_tokens": 200})
        messages.append({"role": "assistant", "content": answer.text})
    assert answer is not None
    return answer.choices[0].finish_reason == "stop" and question.is_followed_by(answer.text)
