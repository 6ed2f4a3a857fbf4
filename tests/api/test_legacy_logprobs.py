from __future__ import annotations

from reprise.api.legacy_logprobs import LegacyLogprobsWriter, extend
from reprise.protocol.responses import LegacyLogprobs
from reprise.text.vocabulary import Vocabulary
from reprise.types import LogprobEntry, LogprobToken

SPELLED = [b"<s>", b"Hello", b" world", "你".encode()[:2], "你".encode()[2:], b"!"]
VOCABULARY = Vocabulary(SPELLED, [0], exact=True)


def token(token_id: int, logprob: float = -1.0) -> LogprobToken:
    data = SPELLED[token_id]
    return LogprobToken(token_id, data.decode(errors="replace"), data, logprob)


def entry(token_id: int, *top: LogprobToken) -> LogprobEntry:
    return LogprobEntry(token(token_id), list(top))


def test_offsets_are_where_a_tokens_character_begins() -> None:
    arrays = LegacyLogprobsWriter(VOCABULARY).generated([entry(i) for i in (1, 2, 3, 4, 5)])
    assert arrays.text_offset == [0, 5, 11, 11, 12]
    text = "Hello world你!"
    assert [text[offset] for offset in arrays.text_offset] == ["H", " ", "你", "你", "!"]


def test_offsets_go_on_from_piece_to_piece() -> None:
    writer = LegacyLogprobsWriter(VOCABULARY)
    first, second = writer.generated([entry(1)]), writer.generated([entry(2)])
    assert (first.text_offset, second.text_offset) == ([0], [5])


def test_an_echoed_prompt() -> None:
    writer = LegacyLogprobsWriter(VOCABULARY)
    arrays = writer.prompt("Hello world", [1, 2], [None, entry(2, token(5, -0.1))])
    assert arrays.tokens == ["Hello", " world"]
    assert arrays.token_logprobs == [None, -1.0]
    assert arrays.top_logprobs == [None, {"!": -0.1, " world": -1.0}]
    assert arrays.text_offset == [0, 5]
    assert writer.generated([entry(5)]).text_offset == [11]


def test_a_start_token_that_was_added_is_not_in_the_text() -> None:
    writer = LegacyLogprobsWriter(VOCABULARY)
    assert writer.prompt("Hello", [0, 1], [None, entry(1)]).text_offset == [0, 0]
    assert writer.generated([entry(5)]).text_offset == [5]


def test_a_space_that_the_tokenizer_put_before_the_text_is_not_in_it() -> None:
    writer = LegacyLogprobsWriter(Vocabulary([b"<s>", b" The", b" quick", b" brown"], [0], exact=True))
    arrays = writer.prompt("The quick", [0, 1, 2], [None, entry(1), entry(2)])
    assert (arrays.tokens, arrays.text_offset) == (["<s>", " The", " quick"], [0, 0, 3])
    assert writer.generated([entry(2)]).text_offset == [9]


def test_a_tokenizer_that_reads_another_text_puts_offsets_out_by_that_and_no_more() -> None:
    """As of one that reads a letter and its accent as one character: each word behind has its own space."""
    vocabulary = Vocabulary(["café".encode(), b" and", b" tea", b" for", b" two"], [], exact=True)
    arrays = LegacyLogprobsWriter(vocabulary).prompt("cafe\u0301 and tea for two", range(5), [None] * 5)
    assert arrays.text_offset == [0, 4, 8, 12, 16]


def test_what_is_generated_begins_where_the_text_ends() -> None:
    """A tokenizer may read another text than was given, as one that has no capital letters and no accents."""
    writer = LegacyLogprobsWriter(VOCABULARY)
    writer.prompt("Hello  e\u0301", [1], [None])
    assert writer.generated([entry(2), entry(5)]).text_offset == [9, 15]
    assert LegacyLogprobsWriter(VOCABULARY).prompt("", [0], [None]).text_offset == [0]


def test_a_start_token_that_was_written_is_in_the_text() -> None:
    writer = LegacyLogprobsWriter(VOCABULARY)
    assert writer.prompt("<s>Hello", [0, 1], [None, entry(1)]).text_offset == [0, 3]


def test_the_chosen_token_is_among_the_likely_ones() -> None:
    writer = LegacyLogprobsWriter(VOCABULARY)
    assert writer.generated([entry(1)]).top_logprobs == [{"Hello": -1.0}]
    likely = writer.generated([entry(1, token(1), token(2, -2.0))]).top_logprobs
    assert likely == [{"Hello": -1.0, " world": -2.0}]


def test_parts_of_characters_do_not_look_alike() -> None:
    arrays = LegacyLogprobsWriter(VOCABULARY).generated([entry(3, token(3, -1.0), token(4, -3.0))])
    assert arrays.tokens == ["bytes:\\xe4\\xbd"]
    assert arrays.top_logprobs == [{"bytes:\\xe4\\xbd": -1.0, "bytes:\\xa0": -3.0}]


def test_of_tokens_that_look_alike_the_likeliest_counts() -> None:
    likely = LegacyLogprobsWriter(VOCABULARY).generated([entry(5, token(1, -0.5), token(1, -3.0))]).top_logprobs
    assert likely == [{"Hello": -0.5, "!": -1.0}]


def test_extend() -> None:
    one = LegacyLogprobs(["a"], [-1.0], [{"a": -1.0}], [0])
    assert extend(None, one) == one
    assert extend(one, LegacyLogprobs(["b"], [-2.0], [{}], [1])).text_offset == [0, 1]
