"""The throughput of all systems as a bar chart, in SVG, on a logarithmic axis; for light and dark backgrounds."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from measure import ratios
from peers.in_process import BareQueue

if TYPE_CHECKING:
    from section import Figure, Section

WIDTH, LEFT, RIGHT = 980, 290, 170  # pixels: all of it, and what names and numbers need beside the bars
ROW, BAR, TOP, BOTTOM = 24, 15, 64, 56
OURS = "workerd"
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f } .small { font-size: 11px; fill: #57606a }
.title { font-size: 16px; font-weight: 600 } .ours { font-weight: 600 }
.durable { fill: #2da44e } .memory { fill: #6e9fdb } line { stroke: #8c959f; stroke-opacity: .4 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .small { fill: #9da7b1 } }
"""


def draw(section: Section, machine: dict[str, str]) -> str:
    """The SVG document: medians of the empty jobs, the fastest first, with their ratio to a bare multiprocessing.Queue."""
    figures = [figure for figure in section.figures if figure.what == "empty"]
    figures.sort(key=lambda figure: -figure.spread.median)
    base = next(figure.rounds for figure in figures if figure.system == BareQueue.name)
    least = math.floor(math.log10(min(figure.spread.median for figure in figures)))
    most = math.ceil(math.log10(max(figure.spread.median for figure in figures)))
    height = TOP + ROW * len(figures) + BOTTOM

    def x(value: float) -> float:
        return LEFT + (math.log10(value) - least) / (most - least) * (WIDTH - LEFT - RIGHT)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        f"<title>Jobs per second</title><style>{STYLE}</style>",
        f'<text class="title" x="16" y="24">Jobs per second</text>{legend()}',
    ]
    for power in range(least, most + 1):
        at = x(10.0**power)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 6}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text class="small" x="{at:.1f}" y="{TOP - 10}" text-anchor="middle">{10**power:,}</text>')
    for number, figure in enumerate(figures):
        parts.append(row(figure, TOP + ROW * number, x(figure.spread.median), ratios(figure.rounds, base).median))
    about = (
        f"{machine['processor']}, {machine['system']}, {machine['date']}. Medians of {len(figures[0].rounds)} rounds."
    )
    parts.append(
        caption(
            "Empty jobs, 2 workers, one client. Logarithmic axis; x: times a bare multiprocessing.Queue.", height - 32
        )
    )
    parts.append(caption(about, height - 14))
    return "\n".join([*parts, "</svg>", ""])


def legend() -> str:
    """Which colour is which."""
    return (
        f'<rect class="durable" x="{LEFT}" y="13" width="12" height="12"/>'
        f'<text x="{LEFT + 18}" y="24">durable: survives the loss of power</text>'
        f'<rect class="memory" x="{LEFT + 270}" y="13" width="12" height="12"/><text x="{LEFT + 288}" y="24">not</text>'
    )


def row(figure: Figure, y: int, end: float, ratio: float) -> str:
    """One system."""
    name = 'class="ours" ' if figure.system.startswith(OURS) else ""
    kind = "durable" if "durable" in figure.system else "memory"
    number = f"{figure.spread.median:,.0f}  ({ratio:.3g} x)"
    return (
        f'<text {name}x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(figure.system)}</text>'
        f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{max(1.0, end - LEFT):.1f}" height="{BAR}" rx="2"/>'
        f'<text {name}x="{end + 6:.1f}" y="{y + 12}">{number}</text>'
    )


def caption(text: str, y: int) -> str:
    """A line below the chart."""
    return f'<text class="small" x="16" y="{y}">{escape(text)}</text>'
