from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reprise.errors import InvalidRequestError, ModelLoadError
from reprise.text.tokenizer import Tokenizer
from support.tiny_tokenizers import byte_level, save_model

PLAIN = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), byte_level())


def load(directory: Path, template: str) -> Tokenizer:
    return Tokenizer.load(str(directory), chat_template=template)


def render(tokenizer: Tokenizer, *messages: dict[str, Any], **options: Any) -> str:
    return tokenizer.render_chat(list(messages), **{"add_generation_prompt": False} | options)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_the_models_own_template(byte_tokenizer: Tokenizer) -> None:
    rendered = render(byte_tokenizer, user(" Hi "), add_generation_prompt=True)
    assert rendered == "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_start_token_appears_once(byte_tokenizer: Tokenizer) -> None:
    token_ids = byte_tokenizer.encode_chat([user("Hi")], add_generation_prompt=True)
    assert token_ids[0] == byte_tokenizer.bos_token_id
    assert byte_tokenizer.bos_token_id not in token_ids[1:]
    rendered = render(byte_tokenizer, user("Hi"), add_generation_prompt=True)
    assert token_ids == byte_tokenizer.encode(rendered, add_special_tokens=False)


def test_text_parts_are_joined_without_a_character_between(directory: Path) -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}, {"type": "refusal", "refusal": "c"}]
    assert render(load(directory, PLAIN), user(parts)) == "[user:a bc]"


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}, {"type": "text", "text": 1}, 7]
)
def test_parts_that_are_no_text_are_refused(directory: Path, part: Any) -> None:
    with pytest.raises(InvalidRequestError, match="parts of type 'text'") as caught:
        render(load(directory, PLAIN), user("a"), user([{"type": "text", "text": "b"}, part]))
    assert caught.value.param == "messages[1].content[1]"


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
_OF_CALLS = "{% for c in m.tool_calls or [] %}({{ c.function.name }}){% endfor %}"


def test_calls_that_a_template_cannot_write_are_refused_and_not_left_out(directory: Path) -> None:
    template = (
        "{% for m in messages %}[{% if m.content is none %}" + _OF_CALLS + "{% else %}{{ '' + m.content }}{% endif %}]"
    )
    tokenizer = load(directory, template + "{% endfor %}")
    with pytest.raises(InvalidRequestError, match="refuses these messages"):
        render(tokenizer, user("1+1?"), {"role": "assistant", "tool_calls": [CALL]})


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}[{{ m.content.strip() }}" + _OF_CALLS + "]{% endfor %}", "[1+1?][(add)]"),
        ("{% for m in messages %}[{{ m['content'] + '' }}" + _OF_CALLS + "]{% endfor %}", "[1+1?][(add)]"),
        (
            "{% for m in messages %}[{% if 'content' in m %}{{ m.content }}{% else %}" + _OF_CALLS + "{% endif %}]"
            "{% endfor %}",
            "[1+1?][(add)]",
        ),
        (PLAIN, "[user:1+1?][assistant:]"),
    ],
    ids=["text", "string", "absent", "no calls at all"],
)
def test_a_message_without_content_is_what_the_template_takes_for_that(
    directory: Path, template: str, expected: str
) -> None:
    tokenizer = load(directory, template)
    for message in (
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
    ):
        assert render(tokenizer, user("1+1?"), message) == expected


def test_developer_is_system_unless_the_template_knows_it(directory: Path) -> None:
    message = {"role": "developer", "content": "x"}
    assert render(load(directory, PLAIN), message) == "[system:x]"
    knowing = "{% if messages[0].role == 'developer' %}known{% endif %}"
    assert render(load(directory, knowing), message) == "known"


def test_template_may_refuse_in_its_own_words(directory: Path) -> None:
    tokenizer = load(directory, "{{ raise_exception('Roles must alternate.') }}")
    with pytest.raises(InvalidRequestError, match=r"refuses these messages: Roles must alternate\.") as caught:
        render(tokenizer, user("x"))
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0].content + 1 }}", "{{ messages[9].content.x }}", "{{ 1 // 0 }}", "{{ messages.__class__.mro() }}"],
)
def test_failing_template_is_the_requests_fault_and_shows_no_text(directory: Path, template: str) -> None:
    with pytest.raises(InvalidRequestError, match="chat template") as caught:
        render(load(directory, template), user("secret words"))
    assert "secret" not in caught.value.message


def test_template_arguments_reach_the_template(directory: Path) -> None:
    tokenizer = load(directory, "{{ enable_thinking }}{{ tools[0].name }}")
    assert render(tokenizer, user("x"), enable_thinking=False, tools=[{"name": "f"}]) == "Falsef"


def test_last_message_can_be_continued(byte_tokenizer: Tokenizer) -> None:
    messages = [user("Hi"), {"role": "assistant", "content": "Hel"}]
    rendered = render(byte_tokenizer, *messages, continue_final_message=True)
    assert rendered == "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHel"


def test_template_that_drops_the_last_message_cannot_continue_it(directory: Path) -> None:
    tokenizer = load(directory, "{{ messages[0].content }}")
    with pytest.raises(InvalidRequestError, match="cannot be continued") as caught:
        render(tokenizer, user("secret"), {"role": "assistant", "content": "secret"}, continue_final_message=True)
    assert "secret" not in caught.value.message


def test_continuing_and_starting_a_message_exclude_each_other(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="set one of them"):
        render(byte_tokenizer, user("x"), add_generation_prompt=True, continue_final_message=True)


def test_no_messages_are_refused(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="at least one message"):
        render(byte_tokenizer)


def test_messages_are_not_changed(byte_tokenizer: Tokenizer) -> None:
    message = {"role": "developer", "content": [{"type": "text", "text": "<s>"}]}
    byte_tokenizer.encode_chat([message], add_generation_prompt=False)
    assert message == {"role": "developer", "content": [{"type": "text", "text": "<s>"}]}


def test_model_without_template_names_the_remedy(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(str(save_model(tmp_path, byte_level(), chat_template=None)))
    assert not tokenizer.has_chat_template
    for call in (tokenizer.render_chat, tokenizer.encode_chat):
        with pytest.raises(InvalidRequestError, match=r"/v1/completions.*--chat-template FILE") as caught:
            call([user("x")], add_generation_prompt=True)
        assert caught.value.param == "messages"


def test_broken_template_is_refused_at_load(directory: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"does not compile: line 1"):
        load(directory, "{% if %}")


def test_endless_template_is_refused_at_load(directory: Path) -> None:
    with pytest.raises(ModelLoadError, match="does not finish"):
        load(directory, "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
