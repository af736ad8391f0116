"""Bars as SVG, from the tables of the measuring scripts; readable on light and on dark pages."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 760
LABELS = 270
BAR = 16
GAP = 6
# What is not ours; all other bars are coloured.
PEERS = (
    *("a dict", "aiocache", "async-lru", "bare aiohttp", "by hand", "cachebox", "cashews", "empty", "floor", "granian"),
    *("httpx", "import aiohttp", "nginx", "one commit", "py-key-value", "redis-py", "requests", "tenacity", "the official"),
    *("uvicorn", "webdis", "fal", "hishel", "aiohttp-client-cache", "SQLite", "plain aiohttp"),
)
# Numbers from here on are shown without decimals.
NO_DECIMALS = 1_000
# Past this ratio of the longest bar to the shortest, the scale is logarithmic.
MAX_LINEAR_RATIO = 40


def draw_bars(title: str, tables: Sequence[Mapping[str, Any]]) -> str:
    """Draw one column of each table.

    Args:
        title: What the picture is of.
        tables: Each with `title`, `columns` and `rows`, as `harness.note_table` notes them.

    Returns:
        The SVG.
    """
    parts: list[str] = []
    top = 34
    for table in tables:
        drawn = table["drawn"]
        rows = [(name, values[drawn]) for name, values in table["rows"].items() if values[drawn] is not None]
        is_log, lengths = _lengths([value for _, value in rows])
        scale = ", logarithmic" if is_log else ""
        parts.append(_text(0, top, f"{table['title']}: {table['columns'][drawn]}{scale}", "h"))
        top += 12
        for (name, value), length in zip(rows, lengths, strict=True):
            kind = "p" if any(peer in name for peer in PEERS) else "o"
            parts.append(_text(LABELS - 8, top + BAR - 4, name, "n"))
            parts.append(f'<rect class="{kind}" x="{LABELS}" y="{top}" width="{length:.1f}" height="{BAR}"/>')
            parts.append(_text(LABELS + length + 6, top + BAR - 4, number(value), "v"))
            top += BAR + GAP
        top += 22
    style = (
        "text{font:12px sans-serif;fill:#888}.t{font-size:15px;font-weight:bold}.h{font-weight:bold}.n{text-anchor:end}"
        ".o{fill:#4c9be8}.p{fill:#9a9a9a}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" role="img">'
    parts = [head, f"<title>{html.escape(title)}</title><style>{style}</style>", _text(0, 14, title, "t"), *parts, "</svg>"]
    return "\n".join(parts) + "\n"


def number(value: float | None) -> str:
    """Write a figure so that its size is seen at once."""
    if value is None:
        return "-"
    if value == int(value) or abs(value) >= NO_DECIMALS:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _lengths(values: Sequence[float]) -> tuple[bool, list[float]]:
    """Return whether the scale is logarithmic, and the length of each bar."""
    room = WIDTH - LABELS - 80
    positive = [value for value in values if value > 0]
    if not positive:
        return False, [0.0 for _ in values]
    low, high = min(positive), max(positive)
    if high / low <= MAX_LINEAR_RATIO:
        return False, [room * max(value, 0.0) / high for value in values]
    # The shortest bar is still seen.
    first = math.log10(low) - 0.3
    return True, [room * (math.log10(value) - first) / (math.log10(high) - first) if value > 0 else 0.0 for value in values]


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{html.escape(text)}</text>'
