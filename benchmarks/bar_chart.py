"""Draw grouped bars as SVG, legible on light and dark pages, with nothing but the standard library."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BAR_HEIGHT = 13
BAR_GAP = 3
PANEL_WIDTH = 300
CHARACTER_WIDTH = 6.1
VALUE_WIDTH = 48
PANELS_IN_ROW = 3
MARGIN = 16

STYLE = """
  text { font-family: system-ui, sans-serif; font-size: 11px; fill: #24292f }
  .title { font-weight: 600 }
  .head { font-size: 14px; font-weight: 600 }
  .ours { fill: #0a7d5a }
  .peer { fill: #9aa4ae }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .ours { fill: #2fbf8f }
    .peer { fill: #6e7681 }
  }
"""


@dataclass(frozen=True)
class Panel:
    """Bars on a scale of their own: a value for each label, longer is better; None is drawn as a dash."""

    title: str
    values: Mapping[str, float | None]


def bar_chart(groups: Mapping[str, Sequence[Panel]], *, emphasised: Sequence[str]) -> str:
    """SVG of groups of panels, three beside each other. Bars of `emphasised` labels have a colour of their own."""
    parts: list[str] = []
    top = float(MARGIN)
    width = 2 * MARGIN + PANELS_IN_ROW * PANEL_WIDTH
    for heading, panels in groups.items():
        parts.append(_text(MARGIN, top + 14, heading, "head"))
        top += 30
        for first in range(0, len(panels), PANELS_IN_ROW):
            row = panels[first : first + PANELS_IN_ROW]
            for column, panel in enumerate(row):
                parts += _panel(panel, MARGIN + column * PANEL_WIDTH, top, emphasised)
            top += 24 + max(len(panel.values) for panel in row) * (BAR_HEIGHT + BAR_GAP) + 10
    height = top + MARGIN
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}" role="img">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


def _panel(panel: Panel, left: float, top: float, emphasised: Sequence[str]) -> list[str]:
    parts = [_text(left, top + 11, panel.title, "title")]
    longest = max((value for value in panel.values.values() if value is not None), default=0.0)
    label_width = CHARACTER_WIDTH * max(map(len, panel.values), default=0)
    room = PANEL_WIDTH - label_width - VALUE_WIDTH
    for index, (label, value) in enumerate(panel.values.items()):
        y = top + 20 + index * (BAR_HEIGHT + BAR_GAP)
        parts.append(_text(left, y + 10, label))
        length = room * value / longest if value is not None and longest > 0 else 0.0
        kind = "ours" if label in emphasised else "peer"
        bar = (
            f'<rect class="{kind}" x="{left + label_width:.1f}" y="{y:g}" width="{length:.1f}" height="{BAR_HEIGHT}"/>'
        )
        parts += [bar, _text(left + label_width + length + 4, y + 10, "–" if value is None else short(value))]
    return parts


def short(value: float) -> str:
    """Three digits, or all of a larger number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f'<text{attribute} x="{x:.1f}" y="{y:.1f}">{html.escape(text)}</text>'
