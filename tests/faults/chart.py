"""The figures of a soak as small charts below each other, in SVG; for light and dark backgrounds."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from faults.soak import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from faults.soak import Series

WIDTH, LEFT, RIGHT = 900, 230, 90  # pixels: all of it, and what names and numbers need beside the lines
ROW, TOP, BOTTOM = 70, 48, 44
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f } .small { font-size: 11px; fill: #57606a }
.title { font-size: 16px; font-weight: 600 } .grows { fill: #cf222e }
polyline { fill: none; stroke: #2da44e; stroke-width: 1.5 } line { stroke: #8c959f; stroke-opacity: .5 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .small { fill: #9da7b1 } }
"""


def draw(series: Sequence[Series], about: str) -> str:
    """The SVG document. Each line begins at nought, so that what looks flat is flat."""
    height = TOP + ROW * len(series) + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        f"<title>Soak</title><style>{STYLE}</style>",
        '<text class="title" x="16" y="24">A steady load, over time</text>',
    ]
    longest = max((each.times[-1] for each in series), default=0) or 1.0
    for number, each in enumerate(series):
        parts.append(panel(each, TOP + ROW * number, longest))
    minutes = f"{longest / 60:.0f} min" if longest >= 120 else f"{longest:.0f} s"
    bottom = height - BOTTOM + 12
    warm = LEFT + max((each.warm_up() for each in series), default=0.0) / longest * (WIDTH - LEFT - RIGHT)
    parts += [
        f'<text class="small" x="{LEFT}" y="{bottom}">0</text>',
        f'<text class="small" x="{WIDTH - RIGHT}" y="{bottom}" text-anchor="end">{minutes}</text>',
        f'<line x1="{warm:.1f}" x2="{warm:.1f}" y1="{TOP}" y2="{height - BOTTOM}" stroke-dasharray="3 3"/>',
        f'<text class="small" x="16" y="{height - 10}">{escape(about)} Judged from the dashed line on.</text>',
    ]
    return "\n".join([*parts, "</svg>", ""])


def panel(series: Series, y: int, longest: float) -> str:
    """One figure."""
    most = max(series.values) * 1.1 or 1.0
    floor = y + ROW - 14
    points = " ".join(
        f"{LEFT + at / longest * (WIDTH - LEFT - RIGHT):.1f},{floor - value / most * (ROW - 20):.1f}"
        for at, value in zip(series.times, series.values, strict=True)
    )
    verdict = "flat" if series.flat else "grows"
    return (
        f'<text x="{LEFT - 12}" y="{floor - 12}" text-anchor="end">{escape(series.name)}</text>'
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/><polyline points="{points}"/>'
        f'<text x="{WIDTH - RIGHT + 8}" y="{floor - 18}">{shown(series.values[-1], series.unit)}</text>'
        f'<text class="small {verdict}" x="{WIDTH - RIGHT + 8}" y="{floor - 4}">{verdict}</text>'
    )
