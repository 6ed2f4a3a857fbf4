from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reprise.errors import GenerationError
from reprise.generation.output_processor import OutputProcessor
from reprise.ipc.messages import SequenceOutput
from reprise.text.tokenizer import Tokenizer
from reprise.types import (
    ChoiceDelta,
    FinishReason,
    GenerationRequest,
    LogprobEntry,
    SamplingParams,
    StopStrings,
    TokenLogprobs,
)
from support.tiny_tokenizers import byte_level, save_model, word_piece

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(str(save_model(tmp_path_factory.mktemp("model"), byte_level())))


@pytest.fixture(scope="module")
def inexact_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(str(save_model(tmp_path_factory.mktemp("model"), word_piece())))


def make_request(
    *stop: str, include: bool = False, skip: bool = True, logprobs: bool = True, min_tokens: int = 0
) -> GenerationRequest:
    return GenerationRequest(
        request_id="r",
        prompt_token_ids=[1],
        sampling=SamplingParams(seed=0, max_tokens=100, min_tokens=min_tokens, num_logprobs=1 if logprobs else None),
        stop=StopStrings(stop, include_in_output=include),
        skip_special_tokens=skip,
    )


@dataclass
class Answer:
    """The fold of a choice's deltas."""

    deltas: list[ChoiceDelta]
    processor: OutputProcessor

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for delta in self.deltas for token_id in delta.token_ids]

    @property
    def entries(self) -> list[LogprobEntry]:
        return [entry for delta in self.deltas for entry in delta.logprobs or []]

    @property
    def spelled(self) -> bytes:
        return b"".join(entry.token.data for entry in self.entries)

    @property
    def finish(self) -> tuple[FinishReason | None, str | int | None]:
        return self.deltas[-1].finish_reason, self.deltas[-1].stop_reason


def play(
    tokenizer: Tokenizer,
    request: GenerationRequest,
    groups: list[list[int]],
    finish: FinishReason | None = None,
    stop_token_id: int | None = None,
) -> Answer:
    """Push the ids group by group, the last with the engine's finish reason."""
    processor = OutputProcessor(3, request, tokenizer)
    deltas, position = [], 0
    for n, group in enumerate(groups):
        last = n == len(groups) - 1
        output = SequenceOutput(
            sequence_id=7,
            position=position,
            token_ids=group,
            logprobs=[TokenLogprobs(i, -0.5, [(i, -0.5)]) for i in group],
            finish_reason=finish if last else None,
            stop_token_id=stop_token_id if last else None,
        )
        position += len(group)
        if (delta := processor.push(output)) is not None:
            deltas.append(delta)
        if processor.finished:
            break
    return Answer(deltas, processor)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def singly(token_ids: list[int]) -> list[list[int]]:
    return [[token_id] for token_id in token_ids]


def test_deltas_fold_to_the_text(tokenizer: Tokenizer) -> None:
    text = "Hello, 你好 👩🏽‍🚀!"
    answer = play(tokenizer, make_request(), singly(ids(tokenizer, text)), LENGTH)
    assert answer.text == text
    assert answer.token_ids == ids(tokenizer, text) == answer.processor.output_token_ids
    assert answer.spelled == text.encode()
    assert answer.finish == (LENGTH, None)
    assert {delta.index for delta in answer.deltas} == {3}
    assert answer.processor.finished


def test_logprobs_come_with_the_text_they_spell(tokenizer: Tokenizer) -> None:
    answer = play(tokenizer, make_request("STOP"), singly(ids(tokenizer, "a\U0001f984 STOB")), LENGTH)
    released = spelled = b""
    for delta in answer.deltas:
        released += delta.text.encode()
        spelled += b"".join(entry.token.data for entry in delta.logprobs or [])
        assert released.startswith(spelled)
    assert released == spelled
    first = answer.deltas[1]
    assert (first.text, first.logprobs, len(first.token_ids)) == ("", [], 1)


def test_logprobs_wait_no_longer_than_their_text(tokenizer: Tokenizer) -> None:
    answer = play(tokenizer, make_request("STOP"), singly(ids(tokenizer, "The lazy 狗 dog")), LENGTH)
    characters = 0
    for delta in answer.deltas:
        entries = b"".join(entry.token.data for entry in delta.logprobs or [])
        assert entries == delta.text.encode()
        characters += len(delta.text)
    assert characters == len("The lazy 狗 dog")


def test_token_text_shows_part_of_a_character_as_replaced(tokenizer: Tokenizer) -> None:
    answer = play(tokenizer, make_request(), singly(ids(tokenizer, "\U0001f984")), LENGTH)
    assert len(answer.entries) > 1
    assert all("\ufffd" in entry.token.text for entry in answer.entries)
    assert answer.entries[0].top == [answer.entries[0].token]
    assert answer.entries[0].token.logprob == -0.5


def test_no_logprobs_unless_asked(tokenizer: Tokenizer) -> None:
    answer = play(tokenizer, make_request(logprobs=False), singly(ids(tokenizer, "ab")), LENGTH)
    assert {delta.logprobs for delta in answer.deltas} == {None}


def test_stop_string_across_tokens_never_shows(tokenizer: Tokenizer) -> None:
    token_ids = ids(tokenizer, "The answer\nUser: x")
    answer = play(tokenizer, make_request("\nUser:"), singly(token_ids))
    assert answer.text == "The answer"
    assert answer.finish == (STOP, "\nUser:")
    assert answer.processor.finished
    assert answer.spelled == b"The answer"
    assert len(answer.token_ids) < len(token_ids)


def test_ids_are_reported_while_their_text_is_held_back(tokenizer: Tokenizer) -> None:
    token_ids = ids(tokenizer, "STO!")
    answer = play(tokenizer, make_request("STOP"), singly(token_ids), LENGTH)
    assert [delta.token_ids for delta in answer.deltas] == singly(token_ids)
    assert [delta.text for delta in answer.deltas] == ["", "", "", "STO!"]


def test_token_that_the_cut_goes_through_is_kept(tokenizer: Tokenizer) -> None:
    token_ids = ids(tokenizer, "The lazy dog")
    answer = play(tokenizer, make_request("y dog"), singly(token_ids))
    assert answer.text == "The laz"
    assert answer.spelled.startswith(b"The laz")
    assert b" dog" not in answer.spelled
    whole = play(tokenizer, make_request("The"), singly(token_ids))
    assert (whole.text, whole.entries) == ("", [])


def test_included_stop_string_is_text_and_logprobs(tokenizer: Tokenizer) -> None:
    answer = play(tokenizer, make_request("dog", include=True), singly(ids(tokenizer, "The dog runs")))
    assert answer.text == "The dog"
    assert answer.spelled == b"The dog"


@pytest.mark.parametrize("include", [False, True])
def test_models_end_token_spells_nothing(tokenizer: Tokenizer, include: bool) -> None:
    end = tokenizer.end_token_ids[0]
    request = make_request(include=include, skip=False)
    answer = play(tokenizer, request, singly([*ids(tokenizer, "Hi"), end]), STOP)
    assert answer.text == "Hi"
    assert answer.spelled == b"Hi"
    assert answer.token_ids[-1] == end
    assert answer.finish == (STOP, None)


@pytest.mark.parametrize(("include", "text"), [(False, "Hi"), (True, "Hi!")])
def test_stop_token_spells_itself_only_where_asked(tokenizer: Tokenizer, include: bool, text: str) -> None:
    token_ids = ids(tokenizer, "Hi!")
    answer = play(tokenizer, make_request(include=include), singly(token_ids), STOP, token_ids[-1])
    assert answer.text == text
    assert answer.spelled == text.encode()
    assert answer.finish == (STOP, token_ids[-1])
    assert answer.token_ids == token_ids


def test_skipped_special_token_has_a_name_but_no_bytes(tokenizer: Tokenizer) -> None:
    start = tokenizer.bos_token_id
    assert start is not None
    token_ids = [*ids(tokenizer, "a"), start, *ids(tokenizer, "b")]
    skipped = play(tokenizer, make_request(), singly(token_ids), LENGTH)
    assert (skipped.text, skipped.spelled) == ("ab", b"ab")
    assert skipped.entries[1].token.text == "<s>"
    shown = play(tokenizer, make_request(skip=False), singly(token_ids), LENGTH)
    assert (shown.text, shown.spelled) == ("a<s>b", b"a<s>b")


def test_held_text_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    token_ids = ids(tokenizer, "a STO")
    for finish, extra in ((LENGTH, []), (STOP, [tokenizer.end_token_ids[0]])):
        answer = play(tokenizer, make_request("STOP"), singly([*token_ids, *extra]), finish)
        assert answer.text == "a STO"
        assert answer.spelled == b"a STO"
        assert answer.finish == (finish, None)


def test_unfinished_character_is_replaced_at_the_end(tokenizer: Tokenizer) -> None:
    answer = play(tokenizer, make_request(), singly(ids(tokenizer, "\U0001f984")[:-1]), LENGTH)
    assert answer.text == "\ufffd"
    assert answer.spelled == "\U0001f984".encode()[: len(answer.spelled)]
    assert answer.spelled


def test_stop_string_on_the_last_allowed_token_is_a_stop(tokenizer: Tokenizer) -> None:
    answer = play(tokenizer, make_request("dog"), singly(ids(tokenizer, "The dog")), LENGTH)
    assert answer.finish == (STOP, "dog")


def test_stop_string_that_the_flush_completes_is_a_stop(tokenizer: Tokenizer) -> None:
    answer = play(tokenizer, make_request("a\ufffd"), singly(ids(tokenizer, "xa\U0001f984")[:-1]), LENGTH)
    assert answer.text == "x"
    assert answer.finish == (STOP, "a\ufffd")


def test_stop_string_beats_a_stop_token_after_it(tokenizer: Tokenizer) -> None:
    token_ids = [*ids(tokenizer, "The dog"), tokenizer.end_token_ids[0]]
    answer = play(tokenizer, make_request("dog"), [token_ids], STOP)
    assert answer.finish == (STOP, "dog")
    assert answer.token_ids == token_ids[:-1]


def test_stop_strings_do_not_count_before_min_tokens(tokenizer: Tokenizer) -> None:
    token_ids = ids(tokenizer, "a,a,a,a")
    answer = play(tokenizer, make_request(",", min_tokens=3), singly(token_ids))
    assert answer.text == "a,a"
    assert len(answer.token_ids) == 4
    exactly = play(tokenizer, make_request(",", min_tokens=4), singly(token_ids))
    assert len(exactly.token_ids) == 4
    beyond = play(tokenizer, make_request(",", min_tokens=5), singly(token_ids))
    assert beyond.text == "a,a,a"


def test_nothing_follows_the_finish(tokenizer: Tokenizer) -> None:
    token_ids = ids(tokenizer, "a,b")
    answer = play(tokenizer, make_request(","), singly(token_ids))
    late = SequenceOutput(sequence_id=7, position=2, token_ids=token_ids[2:], finish_reason=LENGTH)
    assert answer.processor.push(late) is None
    assert answer.processor.output_token_ids == token_ids[:2]


def test_prompt_logprobs_are_told_once(tokenizer: Tokenizer) -> None:
    start = tokenizer.bos_token_id
    assert start is not None
    processor = OutputProcessor(0, make_request(), tokenizer)
    prompt = [None, TokenLogprobs(start, -1.0, [(start, -1.0)])]
    first = processor.push(SequenceOutput(sequence_id=1, position=0, prompt_logprobs=prompt))
    assert first is not None
    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    entry = first.prompt_logprobs[1]
    assert entry is not None
    assert (entry.token.text, entry.token.data, entry.token.logprob) == ("<s>", b"<s>", -1.0)
    # after a restart the engine computes them again
    token_ids = ids(tokenizer, "a")
    again = processor.push(
        SequenceOutput(sequence_id=1, position=0, token_ids=token_ids, prompt_logprobs=prompt, finish_reason=LENGTH)
    )
    assert again is not None
    assert again.prompt_logprobs is None


def test_scoring_a_prompt_generates_nothing(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(0, make_request(), tokenizer)
    delta = processor.push(
        SequenceOutput(sequence_id=1, position=0, prompt_logprobs=[None], finish_reason=LENGTH, num_cached_tokens=2)
    )
    assert delta is not None
    assert (delta.text, delta.token_ids, delta.logprobs, delta.prompt_logprobs) == ("", [], [], [None])
    assert (delta.finish_reason, delta.num_cached_tokens) == (LENGTH, 2)


def test_cached_tokens_are_those_of_the_first_output(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(0, make_request(), tokenizer)
    (token_id,) = ids(tokenizer, "a")
    counts = []
    for position, num_cached_tokens in enumerate((16, 48, 0)):
        delta = processor.push(
            SequenceOutput(
                sequence_id=1,
                position=position,
                token_ids=[token_id],
                logprobs=[TokenLogprobs(token_id, 0.0)],
                num_cached_tokens=num_cached_tokens,
            )
        )
        assert delta is not None
        counts.append(delta.num_cached_tokens)
    assert counts == [16, 16, 16]


def test_output_without_news_gives_no_delta(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(0, make_request(), tokenizer)
    assert processor.push(SequenceOutput(sequence_id=1, position=0)) is None
    assert not processor.finished


def test_error_is_raised_once(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(0, make_request(), tokenizer)
    failed = SequenceOutput(
        sequence_id=1,
        position=0,
        finish_reason=FinishReason.ERROR,
        error_code="numerical_error",
        error_message="not a number",
    )
    with pytest.raises(GenerationError, match="not a number") as caught:
        processor.push(failed)
    assert caught.value.code == "numerical_error"
    assert processor.finished
    assert processor.push(failed) is None


def test_abort_finishes_silently(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(0, make_request(), tokenizer)
    assert processor.push(SequenceOutput(sequence_id=1, position=0, finish_reason=FinishReason.ABORT)) is None
    assert processor.finished


@pytest.mark.parametrize("position", [0, 2])
def test_lost_or_doubled_tokens_are_an_error(tokenizer: Tokenizer, position: int) -> None:
    processor = OutputProcessor(0, make_request(logprobs=False), tokenizer)
    processor.push(SequenceOutput(sequence_id=1, position=0, token_ids=[9]))
    with pytest.raises(GenerationError, match=f"position {position}, not at 1"):
        processor.push(SequenceOutput(sequence_id=1, position=position, token_ids=[9]))


def group(token_ids: list[int], places: list[int]) -> list[list[int]]:
    edges = sorted({0, len(token_ids), *(place % (len(token_ids) + 1) for place in places)})
    return [token_ids[a:b] for a, b in pairwise(edges)]


def summary(answer: Answer) -> tuple[Any, ...]:
    return answer.text, answer.token_ids, answer.entries, answer.finish


FRAGMENTS = ["a", ",", "\n", "你", "\U0001f984", "STOP", "ST", " dog"]


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_grouping_of_tokens_changes_nothing(tokenizer: Tokenizer, data: st.DataObject) -> None:
    spelled = [token_id for fragment in FRAGMENTS for token_id in ids(tokenizer, fragment)]
    special = sorted(tokenizer.vocabulary.special_token_ids)
    token_ids = data.draw(st.lists(st.sampled_from([*spelled, *special]), min_size=1, max_size=20))
    stops = data.draw(st.lists(st.sampled_from(["STOP", "OP", "a,", "\ufffd", "你", " d"]), max_size=3, unique=True))
    request = make_request(
        *stops,
        include=data.draw(st.booleans()),
        skip=data.draw(st.booleans()),
        min_tokens=data.draw(st.integers(0, 4)),
    )
    finish = data.draw(st.sampled_from([LENGTH, STOP]))
    stop_token_id = data.draw(st.sampled_from([None, token_ids[-1]])) if finish is STOP else None
    places = data.draw(st.lists(st.integers(0, 20), max_size=6))
    one = play(tokenizer, request, [token_ids], finish, stop_token_id)
    other = play(tokenizer, request, group(token_ids, places), finish, stop_token_id)
    assert summary(one) == summary(other)
    assert one.finish[0] is not None
    if isinstance(one.finish[1], str):
        assert one.spelled.decode(errors="replace").startswith(one.text) or "\ufffd" in one.text
    else:
        assert one.spelled.decode(errors="replace") == one.text


def test_inexact_vocabularies_stream_too(inexact_tokenizer: Tokenizer) -> None:
    token_ids = ids(inexact_tokenizer, "the lazy dog!")
    answer = play(inexact_tokenizer, make_request("!"), singly(token_ids))
    assert answer.text == "the lazy dog"
    assert answer.finish == (STOP, "!")
    assert [entry.token.token_id for entry in answer.entries] == token_ids[:-1]
