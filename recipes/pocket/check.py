"""Ask a model the published questions, greedily, and print each one that it does not follow.

    python -m recipes.pocket.check [MODEL_DIR] [--dtype float32] [--system TEXT] [--list held-out]

A question is followed when the answer has one of the accepted parts and ends with the end token. The exit
status is 1 when less than 95 % are followed.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from recipes.pocket import questions
from recipes.pocket.questions import PUBLISHED, Question

BUNDLED = Path(__file__).parents[2] / "server" / "reprise" / "pocket"
LEAST_SHARE = 0.95
MAX_NEW_TOKENS = 200


class Answerer:
    """A model and its tokenizer, answering many conversations at a time, greedily."""

    def __init__(self, directory: Path, dtype: torch.dtype, batch_size: int = 64) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, padding_side="left")
        # transformers' own `generate` has no types.
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        self.batch_size = batch_size

    @torch.inference_mode()
    def complete(self, prompts: Sequence[str]) -> list[tuple[str, bool]]:
        """The text after each prompt, and whether it ended with the end token."""
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        results: dict[int, tuple[str, bool]] = {}
        for first in range(0, len(order), self.batch_size):
            places = order[first : first + self.batch_size]
            batch = self.tokenizer(
                [prompts[place] for place in places],
                add_special_tokens=False,
                padding=True,
                return_tensors="pt",
                return_token_type_ids=False,
            )
            output = self.model.generate(**batch, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
            for place, row in zip(places, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                ended = self.tokenizer.eos_token_id in row
                results[place] = (str(self.tokenizer.decode(row, skip_special_tokens=True)), ended)
        return [results[place] for place in range(len(prompts))]

    def last_answers(self, asked: Sequence[Question], system: str | None) -> list[tuple[str, bool]]:
        """The answer to the last turn of each question; the model answers the earlier turns, too."""
        opening = [{"role": "system", "content": system}] if system else []
        chats = [list(opening) for _ in asked]
        answers = [("", False)] * len(asked)
        for turn in range(max(len(question.turns) for question in asked)):
            places = [place for place, question in enumerate(asked) if turn < len(question.turns)]
            for place in places:
                chats[place].append({"role": "user", "content": asked[place].turns[turn]})
            prompts = [
                str(self.tokenizer.apply_chat_template(chats[place], tokenize=False, add_generation_prompt=True))
                for place in places
            ]
            for place, (text, ended) in zip(places, self.complete(prompts), strict=True):
                chats[place].append({"role": "assistant", "content": text})
                answers[place] = (text, ended)
        return answers


def follows(question: Question, answer: tuple[str, bool]) -> bool:
    text, ended = answer
    return ended and question.is_followed_by(text)


def table(asked: Iterable[Question], followed: Iterable[bool]) -> str:
    """How many questions of each topic and language are followed."""
    counts: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for question, good in zip(asked, followed, strict=True):
        counts[question.topic, question.language].append(good)
    return "\n".join(
        f"{topic:12} {language}  {sum(good):5} of {len(good):5}" for (topic, language), good in counts.items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=BUNDLED, help="default: the bundled model")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--system", help="a system prompt before each question")
    parser.add_argument(
        "--list",
        choices=("published", "held-out", "every"),
        default="published",
        help="held-out: wordings never trained on; every: one wording of everything taught",
    )
    parser.add_argument("--most", type=int, default=100, help="held-out: questions of a topic and language")
    arguments = parser.parse_args()
    begin = time.monotonic()
    if arguments.list == "published":
        asked = questions.read(PUBLISHED)
    elif arguments.list == "held-out":
        asked = list(questions.held_out(arguments.most))
    else:
        asked = list(questions.every_intent())
    answerer = Answerer(arguments.model, getattr(torch, arguments.dtype))
    answers = answerer.last_answers(asked, arguments.system)
    followed = [follows(question, answer) for question, answer in zip(asked, answers, strict=True)]
    for question, answer, good in zip(asked, answers, followed, strict=True):
        if not good:
            print(f"{' / '.join(question.turns)}\n    got {answer[0]!r}\n    not {' or '.join(question.accept)}")
    print(table(asked, followed))
    share = sum(followed) / len(followed)
    print(
        json.dumps(
            {
                "list": arguments.list,
                "dtype": arguments.dtype,
                "system": arguments.system,
                "questions": len(asked),
                "followed": sum(followed),
                "share": round(share, 4),
                "seconds": round(time.monotonic() - begin, 1),
            },
            ensure_ascii=False,
        )
    )
    return 0 if share >= LEAST_SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
