"""Draw the pictures of the documents, as SVG: `python docs/pictures/draw.py` writes them beside this file.

Colours follow the reader's colour scheme, and letters are those of the reader's system.
"""

from collections.abc import Callable
from html import escape
from pathlib import Path

_STYLE = """
text { font: 14px system-ui, sans-serif; fill: #24323a; }
.small { font-size: 12px; fill: #5a6b74; }
.strong { font-weight: 600; }
.line { stroke: #5a6b74; stroke-width: 1.5; fill: none; }
.thin { stroke: #9db0b8; stroke-width: 1; stroke-dasharray: 3 3; fill: none; }
.head { fill: #5a6b74; }
.fresh { fill: #b7e0d2; } .early { fill: #dcefb0; } .stale { fill: #fbe3a6; } .error { fill: #f6c9b0; } .gone { fill: #e3e8ea; }
.floor { fill: #e6f1f1; stroke: #8fb8b6; } .waist { fill: #cfe9e4; stroke: #2f8f85; stroke-width: 2; }
@media (prefers-color-scheme: dark) {
text { fill: #dfe7ea; }
.small { fill: #a9b7be; }
.line { stroke: #a9b7be; } .thin { stroke: #63747d; } .head { fill: #a9b7be; }
.fresh { fill: #1d5b4a; } .early { fill: #4b5c1c; } .stale { fill: #6a5315; } .error { fill: #70402a; } .gone { fill: #39454c; }
.floor { fill: #223338; stroke: #47696b; } .waist { fill: #1c4a47; stroke: #4fb3a8; }
}
"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    """Return a line of words; `anchor` is start, middle or end."""
    chosen = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{chosen}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """Return a rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" class="{kind}"/>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "line", *, arrow: bool = False) -> str:
    """Return a line, with or without a head at its end."""
    marker = ' marker-end="url(#head)"' if arrow else ""
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}"{marker}/>'


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    """Return a whole picture; `title` is what a screen reader says."""
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto-start-reverse">'
        '<path d="M0 0 8 4 0 8z" class="head"/></marker>'
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        f"<defs>{head}</defs>",
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def timeline() -> str:
    """Draw the life of a cached result."""
    left, end, stale, error, right, top, tall = 150.0, 420.0, 560.0, 700.0, 790.0, 86.0, 44.0
    early = end - 80
    parts = [
        box(20, top, left - 20, tall, "gone"),
        box(left, top, early - left, tall, "fresh"),
        box(early, top, end - early, tall, "early"),
        box(end, top, stale - end, tall, "stale"),
        box(stale, top, error - stale, tall, "error"),
        box(error, top, right - error, tall, "gone"),
    ]
    for middle, name in (
        ((20 + left) / 2, "computing"),
        ((left + early) / 2, "fresh"),
        ((early + end) / 2, "early"),
        ((end + stale) / 2, "stale"),
        ((stale + error) / 2, "for errors"),
        ((error + right) / 2, "expired"),
    ):
        parts.append(text(middle, top + 27, name, "strong"))
    for middle, first, second in (
        ((20 + left) / 2, "callers wait", "for one another's"),
        ((left + early) / 2, "served", "from the store"),
        ((early + end) / 2, "served; one", "caller refreshes"),
        ((end + stale) / 2, "served at once, new", "in the background"),
        ((stale + error) / 2, "computed; served", "if that fails"),
        ((error + right) / 2, "computed", ""),
    ):
        parts += [text(middle, top + tall + 20, first, "small"), text(middle, top + tall + 36, second, "small")]
    # Both stale times are counted from the end of freshness.
    for y, x1, x2, name in (
        (62, left, end, "ttl"),
        (62, end, stale, "stale_while_revalidate"),
        (32, end, error, "stale_if_error"),
    ):
        parts += [
            line(x1 + 3, y, x2 - 3, y, arrow=True),
            text((x1 + x2) / 2, y - 8, name, "small"),
            line(x1, y - 4, x1, top, "thin"),
            line(x2, y - 4, x2, top, "thin"),
        ]
    parts += [
        line(20, top + tall + 54, right, top + tall + 54, arrow=True),
        text(right, top + tall + 72, "time", "small", "end"),
    ]
    return picture(810, 214, "The life of a cached result: computing, fresh, early, stale, for errors, expired", parts)


def house() -> str:
    """Draw the floors of the package, the waist among them."""
    floors = [
        ("floor", "for whom", "cli/ · testing/ · adapters/ · otel.py", "command line, tests, other projects"),
        ("floor", "what for", "caching/ · server/", "kv_cached and its kin; the service from inside"),
        (
            "floor",
            "store",
            "store.py · pooling.py · default_store.py",
            "checks, batches, claims, watches, connections",
        ),
        (
            "waist",
            "the waist",
            "Backend: get · set · delete · aclose",
            "whatever holds values has these four, or more",
        ),
        (
            "floor",
            "where",
            "backends/: registry · memory · sqlite · redis/ · http/",
            "a row in the registry for each URL scheme",
        ),
        (
            "floor",
            "ground",
            "wire.py · limits.py · telemetry.py · errors.py",
            "names, sizes, events, errors: for all floors",
        ),
    ]
    parts: list[str] = []
    for number, (kind, name, modules, purpose) in enumerate(floors):
        y = 16 + 62 * number
        parts += [
            box(110, y, 560, 52, kind),
            text(98, y + 31, name, "small", "end"),
            text(390, y + 23, modules, "strong"),
            text(390, y + 41, purpose, "small"),
        ]
    parts += [line(700, 28, 700, 366, arrow=True), text(710, 190, "imports", "small", "start")]
    parts.append(text(710, 206, "point down", "small", "start"))
    return picture(800, 394, "The floors of aiokv; imports point down", parts)


def journey() -> str:
    """Draw the way of one cached call."""
    stops = [
        ("caller", 70),
        ("kv_cached", 225),
        ("flight", 380),
        ("store access", 560),
        ("Backend", 715),
    ]
    parts: list[str] = []
    for name, x in stops:
        parts += [box(x - 60, 14, 120, 32, "floor"), text(x, 35, name, "strong"), line(x, 46, x, 412, "thin")]
    at = dict(stops)
    steps: list[tuple[str, str, str]] = [
        ("caller", "kv_cached", "arguments"),
        ("kv_cached", "flight", "key, if not near"),
        ("flight", "store access", "read, unless joined"),
        ("store access", "Backend", "get, if it is well"),
        ("Backend", "store access", "text or None"),
        ("store access", "flight", "entry: decide"),
        ("flight", "flight", "compute, if need be"),
        ("flight", "store access", "commit, if still good"),
        ("store access", "Backend", "set, in order"),
        ("flight", "caller", "a copy of the result for each caller"),
    ]
    for number, (start, end, words) in enumerate(steps):
        y = 78 + 35 * number
        x1, x2 = float(at[start]), float(at[end])
        if start == end:
            parts += [
                f'<path d="M{x1:g} {y - 8:g} h26 v16 h-22" class="line" marker-end="url(#head)"/>',
                text(x1 + 34, y + 5, words, "small", "start"),
            ]
        else:
            step = 4 if x2 > x1 else -4
            parts += [line(x1 + step, y, x2 - step, y, arrow=True), text((x1 + x2) / 2, y - 6, words, "small")]
    return picture(785, 424, "The way of one cached call", parts)


def icon() -> str:
    """Draw the icon of the site: a key's bow and bit."""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><g fill="none" stroke="#009688" stroke-width="4">'
        '<circle cx="10" cy="16" r="6"/><path d="M16 16h14M24 16v7"/></g></svg>\n'
    )


PICTURES: dict[str, Callable[[], str]] = {
    "timeline.svg": timeline,
    "house.svg": house,
    "journey.svg": journey,
    "icon.svg": icon,
}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        Path(__file__).with_name(name).write_text(draw(), encoding="utf-8")
