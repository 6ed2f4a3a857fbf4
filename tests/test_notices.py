"""What an operator is told at start."""

from __future__ import annotations

import logging

import pytest
from pydantic import SecretStr

from reprise.notices import SHORT_KEY, Notice, startup_notices
from reprise.settings import Settings

KEY = "a-long-random-text"


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])  # noqa: S104 # what the test is about
def test_all_addresses_without_a_key_is_warned_of(host: str) -> None:
    (notice,) = startup_notices(Settings(host=host), in_container=False)
    assert notice.level == logging.WARNING
    assert "without an API key" in notice.text
    assert startup_notices(Settings(host=host, api_key=[KEY]), in_container=False) == []


def test_in_a_container_all_addresses_are_told_of_but_not_warned_of() -> None:
    settings = Settings(host="0.0.0.0", port=81)  # noqa: S104 # what the test is about
    (notice,) = startup_notices(settings, in_container=True)
    assert notice == Notice(logging.INFO, notice.text)
    assert "where it is published" in notice.text
    assert "127.0.0.1:81:81" in notice.text
    assert startup_notices(settings.model_copy(update={"api_key": [SecretStr(KEY)]}), in_container=True) == []


def test_no_notice_by_default() -> None:
    for in_container in (False, True):
        assert startup_notices(Settings(), in_container=in_container) == []
        assert startup_notices(Settings(host="localhost"), in_container=in_container) == []


def test_a_draft_model_that_nothing_uses_is_warned_of() -> None:
    (notice,) = startup_notices(Settings(draft_model="small"), in_container=False)
    assert notice.level == logging.WARNING
    assert "without effect" in notice.text
    assert startup_notices(Settings(draft_model="small", speculate="draft"), in_container=False) == []


@pytest.mark.parametrize("in_container", [False, True])
def test_every_notice_is_given(in_container: bool) -> None:  # given by name
    settings = Settings(draft_model="small", host="::")
    assert len(startup_notices(settings, in_container=in_container)) == 2


@pytest.mark.parametrize(("keys", "is_told"), [(["a", KEY], True), ([KEY], False), (["x" * SHORT_KEY], False)])
def test_a_key_that_can_be_guessed_is_warned_of(keys: list[str], *, is_told: bool) -> None:
    notices = startup_notices(Settings(api_key=keys), in_container=False)
    assert [notice.level for notice in notices] == [logging.WARNING] * is_told
    assert not any(key in notice.text for notice in notices for key in keys if len(key) > 1)
