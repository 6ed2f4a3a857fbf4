"""The published question list, and other lists to check a model with.

python -m recipes.pocket.questions      writes questions.jsonl
"""

import dataclasses
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from recipes.pocket.corpus import LANGUAGES, Intent, Language, Topic, intents

PUBLISHED = Path(__file__).parent / "questions.jsonl"

# The published list takes one intent in this many of each topic.
ONE_IN: dict[Topic, int] = {
    "reprise": 1,
    "small talk": 1,
    "knowledge": 4,
    "tables": 20,
    "sums": 40,
    "numbers": 20,
}
NUM_UNKNOWN = 8

# Conversations whose last turn needs the ones before it.
CONVERSATIONS: tuple[tuple[Language, tuple[str, ...], str], ...] = (
    ("en", ("What is the capital of France?", "And of Italy?"), "Rome"),
    ("en", ("What is the capital of Japan?", "What about Norway?"), "Oslo"),
    ("en", ("Hello", "My name is Clara.", "What is my name?"), "Clara"),
    ("en", ("My name is Oscar.", "What is 3 + 4?", "What is my name?"), "Oscar"),
    ("en", ("What is use_cache?", "And temperature?"), "how random"),
    ("en", ("What is the opposite of big?", "And hot?"), "cold"),
    ("en", ("What is the promise?", "Again, please."), "pure function"),
    ("en", ("Why is the sky blue?", "In Chinese, please."), "散射"),
    ("zh", ("法国的首都是哪里？", "那德国呢？"), "柏林"),
    ("zh", ("日本的首都是哪里？", "那埃及呢？"), "开罗"),
    ("zh", ("我叫小明。", "我叫什么？"), "小明"),
    ("zh", ("top_p 是什么？", "seed 呢？"), "固定随机数"),
    ("zh", ("3 + 4 等于多少？", "那5 + 6呢？"), "= 11"),
    ("zh", ("什么是贪心解码？", "请用英文再说一遍。"), "most likely token"),
)


@dataclasses.dataclass(frozen=True)
class Question:
    """What the user says, turn by turn; the last answer follows it when it has one of `accept`."""

    turns: tuple[str, ...]
    accept: tuple[str, ...]
    language: str
    topic: str

    def is_followed_by(self, answer: str) -> bool:
        return any(part.casefold() in answer.casefold() for part in self.accept)


def question(intent: Intent, wording: str) -> Question:
    return Question((wording,), intent.accept, intent.language, intent.topic)


def published() -> Iterator[Question]:
    for topic, one_in in ONE_IN.items():
        for language in LANGUAGES:
            chosen = [i for i in intents() if i.topic == topic and i.language == language]
            for intent in chosen[::one_in]:
                yield question(intent, intent.wordings[0])
    for intent in intents():
        if intent.topic == "unknown":
            step = max(1, len(intent.trained_wordings) // NUM_UNKNOWN)
            for wording in intent.trained_wordings[::step][:NUM_UNKNOWN]:
                yield question(intent, wording)
    for language, turns, accept in CONVERSATIONS:
        yield Question(turns, (accept,), language, "conversation")


def held_out(most: int) -> Iterator[Question]:
    """Wordings that were kept out of the training text, at most so many of a topic and language."""
    rng = random.Random(0)
    groups: dict[tuple[str, str], list[Question]] = {}
    for intent in intents():
        for wording in intent.held_out_wordings:
            groups.setdefault((intent.topic, intent.language), []).append(question(intent, wording))
    for group in groups.values():
        yield from rng.sample(group, min(most, len(group)))


def every_intent() -> Iterator[Question]:
    """The first wording of everything that pocket was taught."""
    for intent in intents():
        yield question(intent, intent.wordings[0])


def write(questions: Iterable[Question], path: Path) -> None:
    lines = [json.dumps(dataclasses.asdict(entry), ensure_ascii=False) for entry in questions]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(path: Path) -> list[Question]:
    questions = []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        questions.append(Question(tuple(entry["turns"]), tuple(entry["accept"]), entry["language"], entry["topic"]))
    return questions


if __name__ == "__main__":
    write(published(), PUBLISHED)
    print(f"{len(read(PUBLISHED))} questions in {PUBLISHED}")
