from __future__ import annotations

import sys

import pytest

from reprise.errors import ModelLoadError
from reprise.text import template_trial
from reprise.text.template_trial import try_template


def test_ordinary_template_passes() -> None:
    try_template(
        "{% for m in messages %}{% generation %}{{ m.content | tojson }}{% endgeneration %}{% break %}{% endfor %}"
        "{{ strftime_now('%Y') }}",
        {"bos_token": "<s>"},
    )


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system role') }}", "{{ messages[7].content.upper() }}", "{{ 1 / 0 }}"],
)
def test_template_that_refuses_the_greeting_passes(template: str) -> None:
    try_template(template, {})


def test_endless_template_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelLoadError, match="does not finish within 2 s of CPU time on a greeting"):
        try_template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {})
    monkeypatch.setattr(template_trial, "WALL_SECONDS", 0.2)
    with pytest.raises(ModelLoadError, match="--chat-template FILE"):
        try_template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {})


def test_template_that_fills_the_memory_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="more than 1 GiB of memory"):
        try_template("{{ ('x' * 2000000000) | length }}", {})


def test_syntax_error_names_the_line() -> None:
    with pytest.raises(ModelLoadError, match=r"does not compile: line 2: .*endfor"):
        try_template("\n{% endfor %}", {})


def test_huge_template_is_refused_unread() -> None:
    with pytest.raises(ModelLoadError, match="1,048,577 characters"):
        try_template(" " * (2**20 + 1), {})


def test_no_process_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    try_template("{{ 1 }}", {})
