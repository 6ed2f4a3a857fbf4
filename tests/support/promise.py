"""The fifty requests of the promise, and answers to them in a form that is compared byte by byte.

A canonical answer is everything that a client got but `id`, `created` and the number of cached tokens: sorted JSON with
every number spelt as the server spelt it. A stream's is that of the response that its chunks add up to.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import httpx

from reprise.api.event_ids import parse
from support.live_api import CHAT, COMPLETIONS, Call

NUM_REQUESTS = 50
LONGEST_PROMPT = 600
_FIRST_ID, _NUM_IDS = 20, 380
"""Token ids that every served vocabulary here has, none of them special."""


def token_ids(length: int, salt: int) -> list[int]:
    """A prompt of so many ids; prompts of one salt begin alike."""
    generator = random.Random(salt)
    return [_FIRST_ID + generator.randrange(_NUM_IDS) for _ in range(length)]


def _chat(*contents: str) -> list[dict[str, str]]:
    """A system message where there are several, then the turns."""
    roles = ["user", "assistant"] * len(contents)
    if len(contents) > 1:
        roles = ["system", *roles]
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


_SYSTEM = "You answer in one short sentence. " * 6
_GREEDY = {"temperature": 0}
_BIASED = {str(token_id): 3.5 for token_id in range(60, 76)}

_COMPLETIONS: list[tuple[Any, dict[str, Any]]] = [
    # Prompts that begin alike, on both sides of the edges of KV blocks (16) and key blocks (128).
    (token_ids(1, 1), {**_GREEDY, "logprobs": 5}),
    (token_ids(15, 1), {"temperature": 1.0}),
    (token_ids(16, 1), {"temperature": 0.7, "top_p": 0.9, "logprobs": 0}),
    (token_ids(17, 1), {"top_k": 20, "logprobs": 20}),
    (token_ids(33, 1), {"min_p": 0.05, "n": 2}),
    (token_ids(120, 1), {"typical_p": 0.8, "logprobs": 2}),
    (token_ids(127, 1), {"repetition_penalty": 1.3, "logprobs": 3}),
    (token_ids(128, 1), {"presence_penalty": 1.2, "temperature": 0.8}),
    (token_ids(129, 1), {"frequency_penalty": 0.9, "logprobs": 1}),
    (token_ids(200, 1), {**_GREEDY, "repetition_penalty": 1.2, "logprobs": 4}),
    (token_ids(240, 1), {**_GREEDY, "logprobs": 5}),
    (token_ids(257, 1), {"temperature": 1.3, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.95}),
    (token_ids(400, 1), {"temperature": 1.0, "logprobs": 5}),
    (token_ids(LONGEST_PROMPT, 1), {**_GREEDY, "logprobs": 1}),
    # The same beginning with another end, and prompts that share nothing.
    (token_ids(150, 1) + token_ids(20, 2), {"temperature": 1.0, "logprobs": 2}),
    (token_ids(150, 1) + token_ids(40, 3), {"temperature": 1.5, "top_p": 0.8}),
    (token_ids(97, 4), {"logit_bias": _BIASED, "temperature": 1.1, "logprobs": 2}),
    (token_ids(64, 5), {"allowed_token_ids": list(range(30, 230)), "logprobs": 3}),
    (token_ids(301, 6), {"presence_penalty": -0.5, "frequency_penalty": 0.3, "temperature": 0.9}),
    ([token_ids(21, 7), token_ids(8, 8)], {"n": 2, "logprobs": 1, "temperature": 1.0}),
    (token_ids(45, 9), {"echo": True, "logprobs": 2, "temperature": 1.0}),
    (token_ids(140, 10), {"echo": True, "logprobs": 5, "max_tokens": 0}),
    (token_ids(140, 1), {"echo": True, "logprobs": 0, **_GREEDY}),
    ("The quick brown fox", {"echo": True, "temperature": 0.6, "n": 2}),
    # Texts: what ends them, what they must not say, and characters of several tokens.
    ("The quick brown fox jumps over", {"stop": ["e", "zq"], "logprobs": 2}),
    ("Stop here, or stop there!", {"stop": ["a", "t"], "include_stop_str_in_output": True, "temperature": 1.2}),
    ("def main():\n", {"stop": ["the end", "e of"], "temperature": 1.0}),
    ("你好，世界。北京是", {"temperature": 1.0, "logprobs": 3}),
    ("Smileys 🙂 and families 👩🏽‍🚀", {"temperature": 1.6, "top_k": 200}),
    ("A story: ", {"bad_words": ["a", "the", "e", "\n"], "temperature": 1.0, "logprobs": 1}),
    ("A story: ", {"stop_token_ids": list(range(40, 60)), "min_tokens": 6, "temperature": 1.3}),
    ("", {"temperature": 1.0, "ignore_eos": False, "min_tokens": 3}),
]  # fmt: skip
_CHATS: list[tuple[list[dict[str, str]], dict[str, Any]]] = [
    (_chat("Hello"), {**_GREEDY}),
    (_chat("Hello"), {"temperature": 1.0, "logprobs": True, "top_logprobs": 5}),
    (_chat(_SYSTEM, "Hello"), {"temperature": 0.8, "top_p": 0.7, "logprobs": True}),
    (_chat(_SYSTEM, "What is a cache?"), {"top_k": 8, "logprobs": True, "top_logprobs": 2}),
    (_chat(_SYSTEM, "What is a cache?", "A store.", "And a block?"), {"min_p": 0.1, "logprobs": True}),
    (_chat(_SYSTEM, "What is a cache?", "A store.", "And a token?"), {"typical_p": 0.6, "n": 2}),
    (_chat("你好！" * 12), {"temperature": 1.1, "logprobs": True, "top_logprobs": 3}),
    (_chat("🙂🙃 " * 8), {"temperature": 1.4, "skip_special_tokens": False, "logprobs": True}),
    (_chat("Name an animal."), {"stop": ["o", "i"], "logprobs": True, "top_logprobs": 1}),
    (_chat("Name a city."), {"stop": ["s", "xyz"], "include_stop_str_in_output": True, "temperature": 1.2, "n": 2}),
    (_chat("Name a colour."), {"stop": ["abcdef", "hello world", "er", "in th"], "temperature": 1.2}),
    (_chat("No vowels, please."), {"bad_words": ["a", "e", "i", "o", "u"], "logprobs": True}),
    (_chat("Say it again."), {"repetition_penalty": 1.5, **_GREEDY, "logprobs": True, "top_logprobs": 2}),
    (_chat("Say it again."), {"presence_penalty": 1.5, "frequency_penalty": 1.0, "temperature": 0.9}),
    (_chat("At length."), {"min_tokens": 20, "ignore_eos": False, "temperature": 1.0, "logprobs": True}),
    (_chat("Biased."), {"logit_bias": _BIASED | {"80": -100}, "temperature": 1.0, "logprobs": True}),
    (_chat("Few."), {"allowed_token_ids": list(range(100, 164)), "temperature": 1.5, "n": 2}),
    (_chat("Tokens. " * 60), {"temperature": 1.0, "top_p": 0.5, "repetition_penalty": 1.1, "logprobs": True}),
]  # fmt: skip


def requests(*, most_tokens: int | None = None, **parameters: Any) -> list[Call]:
    """The fifty, always the same: 18 to 34 tokens a choice, or `most_tokens`. `parameters` go into every body."""
    prompts = [(COMPLETIONS, "prompt", *pair) for pair in _COMPLETIONS]
    calls = []
    for index, (path, name, prompt, own) in enumerate(prompts + [(CHAT, "messages", *pair) for pair in _CHATS]):
        body = {name: prompt, "seed": 1000 + index, "max_tokens": 18 + index % 17, "ignore_eos": True}
        body |= {"return_token_ids": True, **own, **parameters}
        if most_tokens is not None:
            body["max_tokens"] = min(body["max_tokens"], most_tokens)
            body["min_tokens"] = min(body.get("min_tokens", 0), most_tokens)
        calls.append((path, body))
    assert len(calls) == NUM_REQUESTS
    return calls


def mixed_streams(num_streams: int, num_tokens: int, *, first_seed: int = 0) -> list[Call]:
    """Greedy, sampled, two choices, stop strings, log-probabilities in turn, on both endpoints: long enough to die in.

    `num_tokens` a choice at most; of eight one may end sooner, by a stop string.
    """
    words = ["begin", "over", "again", "slowly", "tokens"]
    kinds: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, {"temperature": 0, "logprobs": 2}),
        (COMPLETIONS, {"temperature": 1.0}),
        (CHAT, {"temperature": 0.9, "n": 2, "logprobs": True, "top_logprobs": 1}),
        (COMPLETIONS, {"temperature": 1.0, "stop": ["zqx", "e of th"], "repetition_penalty": 1.1}),
        (CHAT, {"temperature": 0.7, "top_p": 0.9, "stop": ["hereby", "qqq"]}),
        (COMPLETIONS, {"temperature": 1.2, "top_k": 40, "logprobs": 0, "bad_words": ["the"]}),
        (COMPLETIONS, {"temperature": 1.0, "n": 2, "presence_penalty": 0.4, "frequency_penalty": 0.2}),
        (COMPLETIONS, {"temperature": 1.1, "min_p": 0.02, "stop": ["e", "t"], "echo": True, "logprobs": 1}),
    ]
    calls = []
    for seed in range(first_seed, first_seed + num_streams):
        path, own = kinds[seed % len(kinds)]
        prompt: dict[str, Any] = {"messages": _chat(_SYSTEM, " ".join(words[: 1 + seed % 5]))}
        if path == COMPLETIONS:
            prompt = {"prompt": token_ids(1 + seed * 37 % 190, seed % 3)}
        body = {**prompt, "seed": seed, "max_tokens": num_tokens, "ignore_eos": True, "return_token_ids": True, **own}
        calls.append((path, body))
    return calls


def canonical(body: str | dict[str, Any]) -> bytes:
    """What of a response a repetition must give again. A dictionary was read by `exact_json`."""
    answer = exact_json(body) if isinstance(body, str) else dict(body)
    for name in ("id", "created"):
        del answer[name]
    del answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return json.dumps(answer, sort_keys=True, ensure_ascii=False).encode(errors="surrogatepass")


def exact_json(text: str) -> Any:
    """JSON with its numbers as the words that they were."""
    return json.loads(text, parse_float=lambda word: f"number {word}")


def first_choice(answer: bytes) -> Any:
    return json.loads(answer)["choices"][0]


@dataclass
class Folded:
    """A stream: what its chunks add up to, when tokens came, and what came beside them."""

    head: dict[str, Any] = field(default_factory=dict)
    choices: dict[int, dict[str, Any]] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    event_ids: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """Of the chunks that had a choice."""
    num_ends: int = 0
    on_event: Callable[[], None] = lambda: None

    def read(self, lines: Iterable[str]) -> None:
        """Take in server-sent events: data, ids and comments, and nothing else."""
        for line in lines:
            name, _, value = line.partition(": ")
            if name == "id":
                self._check_id(value)
            elif name == "data":
                self._data(value)
                self.on_event()
            else:
                assert not line or line.startswith(":"), line

    @property
    def longest_gap(self) -> float:
        """Seconds between two chunks, at most."""
        return max((later - sooner for sooner, later in zip(self.times, self.times[1:], strict=False)), default=0.0)

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.get("token_ids", ())) for choice in list(self.choices.values()))

    def answer(self) -> bytes:
        """Canonical. Fails where the stream did not end well and once."""
        assert self.error is None, self.error
        assert self.num_ends == 1
        assert self.usage is not None
        assert len(set(self.event_ids)) == len(self.event_ids), "an event came twice"
        choices = [self.choices[index] for index in sorted(self.choices)]
        return canonical({**self.head, "choices": choices, "usage": self.usage})

    def _data(self, data: str) -> None:
        assert self.num_ends == 0, "an event after the end"
        if data == "[DONE]":
            self.num_ends += 1
            return
        chunk = exact_json(data)
        if "error" in chunk:
            assert self.error is None, "two errors"
            self.error = chunk["error"]
            return
        if chunk["choices"]:
            self.times.append(time.monotonic())
        head = {name: chunk[name] for name in ("id", "created", "model", "system_fingerprint")}
        head["object"] = chunk["object"].removesuffix(".chunk")
        if not self.head:
            self.head = head | {"reprise": chunk["reprise"]}
        assert head == {name: self.head[name] for name in head}
        self.usage = chunk.get("usage") or self.usage
        for part in chunk["choices"]:
            self._add(part)

    def _check_id(self, event_id: str) -> None:
        """It must tell how many tokens of each choice there were so far."""
        self.event_ids.append(event_id)
        positions = parse(event_id).positions
        for index, position in enumerate(positions):
            got = self.choices.get(index, {}).get("token_ids", [])
            assert len(got) == position.num_tokens, f"choice {index} is at {position}, and {len(got)} tokens came"

    def _add(self, part: dict[str, Any]) -> None:
        whole = self.choices.get(part["index"])
        if whole is None:
            whole = self.choices[part["index"]] = {"index": part["index"], "logprobs": None, "finish_reason": None}
            whole |= {"stop_reason": None} | ({"text": ""} if "text" in part else {"message": _empty_message()})
        assert whole["finish_reason"] is None, "a part after the choice's end"
        if "text" in part:
            whole["text"] += part["text"]
        else:
            whole["message"]["content"] += part["delta"].get("content", "")
            assert set(part["delta"]) <= {"role", "content"}
        if part.get("logprobs") is not None:
            whole["logprobs"] = _extended(whole["logprobs"], part["logprobs"])
        if "token_ids" in part:
            whole.setdefault("token_ids", []).extend(part["token_ids"])
        whole["finish_reason"] = part["finish_reason"]
        whole["stop_reason"] = part.get("stop_reason")


def _empty_message() -> dict[str, Any]:
    return {"role": "assistant", "content": "", "refusal": None}


def _extended(whole: dict[str, Any] | None, part: dict[str, Any]) -> dict[str, Any]:
    if whole is None:
        return part
    return {name: value if part[name] is None else [*value, *part[name]] for name, value in whole.items()}


def ask(client: httpx.Client, call: Call) -> bytes:
    """The canonical answer to a request, streamed where its body says so."""
    path, body = call
    if body.get("stream"):
        return read_stream(client, call).answer()
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return canonical(response.text)


def read_stream(client: httpx.Client, call: Call, into: Folded | None = None) -> Folded:
    """A stream to its end. `into` may be looked at meanwhile."""
    path, body = call
    folded = Folded() if into is None else into
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", path, json=streamed) as response:
        assert response.status_code == 200, response.read()
        folded.read(response.iter_lines())
    return folded


@dataclass(frozen=True)
class _Awaited:
    condition: Callable[[], bool]
    then: Callable[[], None]
    met: futures.Future[None] = field(default_factory=futures.Future)


class InFlight:
    """Requests that are streamed, each read by a thread of its own, while the block lasts. It ends when they do."""

    def __init__(self, client: httpx.Client, calls: Sequence[Call]) -> None:
        self._lock = threading.Lock()
        self._awaited: _Awaited | None = None
        self.folded = [Folded(on_event=self._look) for _ in calls]
        self._pool = ThreadPoolExecutor(len(calls))
        arguments = zip(calls, self.folded, strict=True)
        self._streams = [self._pool.submit(read_stream, client, call, folded) for call, folded in arguments]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    @property
    def num_running(self) -> int:
        return sum(not stream.done() for stream in self._streams)

    @property
    def num_tokens(self) -> int:
        """Got so far, by all."""
        return sum(folded.num_tokens for folded in self.folded)

    @property
    def longest_gap(self) -> float:
        return max(folded.longest_gap for folded in self.folded)

    def wait(
        self, condition: Callable[[], bool], then: Callable[[], None] = lambda: None, seconds: float = 30.0
    ) -> None:
        """Wait until it holds. Fails where all streams end before, and with what it or `then` raises.

        It is looked at with each event, and `then` is done at once by the reader who finds it so: whoever waits may
        get a turn when the readers, who are many, have read all that there was.
        """
        deadline = time.monotonic() + seconds
        awaited = self._awaited = _Awaited(condition, then)
        self._look()
        try:
            while True:
                num_running = self.num_running
                if awaited.met.done():
                    break
                assert num_running, "the streams ended too early"
                assert time.monotonic() < deadline
                futures.wait([awaited.met], 0.01)
        finally:
            with self._lock:
                self._awaited = None
        awaited.met.result()

    def _look(self) -> None:
        with self._lock:
            awaited = self._awaited
            if awaited is None:
                return
            try:
                if not awaited.condition():
                    return
                awaited.then()
            except Exception as error:  # noqa: BLE001 # whoever waits gets it
                awaited.met.set_exception(error)
            else:
                awaited.met.set_result(None)
            self._awaited = None

    def ends(self) -> list[Folded]:
        """The streams, when all have ended, well or with an error."""
        return [stream.result(120) for stream in self._streams]

    def answers(self) -> list[bytes]:
        """Canonical. Fails where one did not end well."""
        return [folded.answer() for folded in self.ends()]


def one_by_one(client: httpx.Client, calls: Sequence[Call]) -> list[bytes]:
    return [ask(client, call) for call in calls]


def all_at_once(client: httpx.Client, calls: Sequence[Call]) -> list[bytes]:
    """Their answers, in order; all are in flight together."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: ask(client, call), calls))


def differences(found: Sequence[bytes], expected: Sequence[bytes]) -> list[int]:
    """Which of the requests were answered otherwise."""
    return [index for index, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]]


def assert_same(found: Sequence[bytes], expected: Sequence[bytes]) -> None:
    """Fail with the numbers of the requests that differ, and the first pair."""
    different = differences(found, expected)
    assert not different, f"requests {different}; the first:\n{found[different[0]]!r}\n{expected[different[0]]!r}"


@contextmanager
def other_load(client: httpx.Client, num_threads: int = 4) -> Iterator[None]:
    """Requests of all lengths and kinds for as long as the block lasts; each must be answered."""
    stopping = threading.Event()

    def keep_asking(seed: int) -> int:
        generator = random.Random(seed)
        count = 0
        while not stopping.is_set():
            body = {
                "prompt": token_ids(generator.randrange(1, 300), generator.randrange(1, 50)),
                "max_tokens": generator.randrange(1, 40),
                "temperature": generator.choice([0, 0.7, 1.3]),
                "repetition_penalty": generator.choice([1.0, 1.2]),
                "n": generator.choice([1, 1, 3]),
                "logprobs": generator.choice([None, 0, 7]),
            }
            response = client.post(COMPLETIONS, json=body)
            assert response.status_code == 200, response.text
            count += 1
        return count

    with ThreadPoolExecutor(num_threads) as pool:
        loads = [pool.submit(keep_asking, seed) for seed in range(num_threads)]
        try:
            yield
        finally:
            stopping.set()
        assert all(load.result() for load in loads)
