"""Messages to the text that a model was taught to read, by the model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2

from reprise.errors import InvalidRequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PYTHON_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What an expression of a template can raise over data that it did not expect."""
_CALLED = "find_the_content"


class ChatTemplate:
    """A chat template, rendered in transformers' sandbox."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        self._tokenizer = tokenizer
        self.source = source
        self._knows_developer = "developer" in source

    def normalize(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages as templates expect them.

        Content is a string: text parts are joined without a character between them. Where there is none it is what
        the template takes for that. The role `developer` is `system` for a template that does not mention it. Raises
        InvalidRequestError for parts that are no text.
        """
        if not messages:
            raise InvalidRequestError("messages must hold at least one message.", param="messages")
        return [self._normalize_one(index, message) for index, message in enumerate(messages)]

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        template_kwargs: Mapping[str, Any],
    ) -> str:
        """Render normalised messages. Raises InvalidRequestError with the template's own words where it refuses."""
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message goes on with the last message, add_generation_prompt starts a new one: "
                "set one of them.",
                param="continue_final_message",
            )
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **template_kwargs,
            )
        except jinja2.TemplateError as error:
            raise InvalidRequestError(
                f"The model's chat template refuses these messages: {error.message or type(error).__name__}",
                param="messages",
            ) from error
        except _PYTHON_ERRORS as error:
            if continue_final_message:
                raise InvalidRequestError(
                    "The last message cannot be continued: it must have text, and the model's chat template must "
                    "keep that text as it is.",
                    param="messages",
                ) from error
            raise InvalidRequestError(
                f"The model's chat template cannot render these messages ({type(error).__name__}).",
                param="messages",
            ) from error
        return str(rendered)

    @cached_property
    def _no_content(self) -> dict[str, Any]:
        """What a message that calls tools and says nothing has of `content`, so that the calls are written.

        None at all, as transformers has it, or an empty text for templates that take it for granted. One that writes
        calls with neither gets none, and may refuse: better than an answer to messages without the calls.
        """
        call = {"id": "a1b2c3d4e", "type": "function", "function": {"name": _CALLED, "arguments": {"a": "b"}}}
        forms: tuple[dict[str, Any], ...] = ({}, {"content": ""})
        for form in forms:
            messages = [{"role": "user", "content": "x"}, {"role": "assistant", **form, "tool_calls": [call]}]
            try:
                text = self.render(
                    messages, add_generation_prompt=False, continue_final_message=False, template_kwargs={}
                )
            except InvalidRequestError:
                continue
            if _CALLED in text:
                return form
        return {}

    def _normalize_one(self, index: int, message: Mapping[str, Any]) -> dict[str, Any]:
        normalized = dict(message)
        if normalized.get("role") == "developer" and not self._knows_developer:
            normalized["role"] = "system"
        content = normalized.pop("content", None)
        if content is None:
            normalized |= self._no_content
        else:
            normalized["content"] = content
        if isinstance(content, list | tuple):
            normalized["content"] = "".join(_part_text(index, n, part) for n, part in enumerate(content))
        return normalized


def _part_text(index: int, part_index: int, part: Any) -> str:
    text = part if isinstance(part, str) else None
    if isinstance(part, Mapping) and part.get("type", "text") in {"text", "refusal"}:
        text = part.get(part.get("type", "text"))
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise InvalidRequestError(
            f"messages[{index}].content[{part_index}] is a part of type {kind!r}; this model reads parts of type "
            "'text' with a string 'text'.",
            param=f"messages[{index}].content[{part_index}]",
        )
    return text
