from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reprise.api import json_bounds
from reprise.api.json_bounds import check_structure, count_structure
from reprise.errors import InvalidRequestError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab\\"[]{}:,', max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('a\\":{', max_size=4), inner, max_size=4),
    max_leaves=20,
)


def counted(value: Any) -> tuple[int, int]:
    """Containers and members, found by walking."""
    if not isinstance(value, dict | list):
        return 0, 0
    below = [counted(item) for item in (value.values() if isinstance(value, dict) else value)]
    members = len(value) if isinstance(value, dict) else 0
    return 1 + sum(found[0] for found in below), members + sum(found[1] for found in below)


@given(json_values, st.integers(1, 9))
def test_the_count_is_the_documents_whatever_the_pieces(value: Any, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_bounds, "_PIECE", size)
        assert count_structure(json.dumps(value).encode()) == counted(value)


def test_brackets_in_text_do_not_count() -> None:
    check_structure(json.dumps({"prompt": "[{:" * 100_000 + '"]'}).encode())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": [[5]] * 40_000}, "prompt"),
        ({"messages": [{}] * 40_000, "n": 1}, "messages"),
        ([[]] * 40_000, None),
        ({f"x{number}": 1 for number in range(70_000)}, None),
    ],
)
def test_too_much_structure(body: Any, param: str | None) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_structure(json.dumps(body).encode())
    assert (refused.value.param, refused.value.code) == (param, "too_many_values")
