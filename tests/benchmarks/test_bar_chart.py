"""The chart: its bars are as long as their values, and it is SVG that a parser accepts."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from benchmarks.bar_chart import PANEL_WIDTH, Panel, bar_chart, short

SVG = "{http://www.w3.org/2000/svg}"


def test_bars_are_as_long_as_their_values_and_ours_stand_out() -> None:
    panels = [Panel("a < b", {"us": 10.0, "them": 40.0, "nobody": None}), Panel("other", {"us": 3.0})]
    root = ET.fromstring(bar_chart({"shape": panels}, emphasised=["us"]))  # noqa: S314 # what we have just made
    bars = root.findall(f"{SVG}rect")
    assert [bar.get("class") for bar in bars] == ["ours", "peer", "peer", "ours"]
    us, them, nobody, _ = (float(bar.get("width", "nan")) for bar in bars)
    assert them == pytest.approx(4 * us, rel=0.01)
    assert nobody == 0.0
    assert [text.text for text in root.findall(f"{SVG}text")][:6] == ["shape", "a < b", "us", "10.0", "them", "40.0"]


def test_panels_stand_in_rows_within_the_picture() -> None:
    longest = {"a label of some length": 1234.0, "b": 1.0}
    panels = [Panel(str(number), longest) for number in range(4)]
    root = ET.fromstring(bar_chart({"one": panels, "two": panels}, emphasised=[]))  # noqa: S314 # as above
    width, height = (float(size) for size in root.get("viewBox", "").split()[2:])
    bars = root.findall(f"{SVG}rect")
    assert len(bars) == 16
    assert len({bar.get("x") for bar in bars}) == 3
    assert max(float(bar.get("y", "nan")) for bar in bars) < height
    assert max(float(bar.get("x", "nan")) + float(bar.get("width", "nan")) for bar in bars) < width
    assert all(float(bar.get("width", "nan")) < PANEL_WIDTH / 2 for bar in bars)


def test_numbers() -> None:
    assert [short(value) for value in (7.26, 99.0, 1234.5)] == ["7.3", "99.0", "1,234"]
