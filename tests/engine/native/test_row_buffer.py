"""Rows that are used again, and those that are too many to keep."""

from __future__ import annotations

from reprise.engine.native.row_buffer import MAX_KEPT_ROWS, RowBuffer


def test_as_many_rows_as_before_are_the_very_same_tensor() -> None:
    buffer = RowBuffer(3)
    four = buffer.rows(4)
    assert four.shape == (4, 3)
    assert buffer.rows(4) is four
    assert buffer.rows(2).data_ptr() == four.data_ptr()
    assert buffer.rows(2).shape == (2, 3)
    assert buffer.rows(4).data_ptr() == four.data_ptr()


def test_too_many_rows_are_not_kept() -> None:
    buffer = RowBuffer(3)
    few = buffer.rows(2)
    many = buffer.rows(MAX_KEPT_ROWS + 1)
    assert many.shape == (MAX_KEPT_ROWS + 1, 3)
    assert buffer.rows(MAX_KEPT_ROWS + 1) is not many
    assert buffer.rows(2) is few
