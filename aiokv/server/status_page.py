"""`/status`: the figures of a server as one page for a person, and `/status.json`, which the page reads every two seconds.

The page is whole without scripts and loads nothing from elsewhere. An element that shows a figure names its path in
`/status.json` and its format, so that the page's script (`status_page.js`) shows new figures in the same way.
"""

import base64
import hashlib
import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from typing import Any, Final

import orjson

from aiokv.backends.base import Gauges
from aiokv.server.figures import read
from aiokv.server.statistics import REASONS, STATUSES, VERBS, Statistics

_STYLE = files("aiokv.server").joinpath("status_page.css").read_text("utf-8")
_SCRIPT = files("aiokv.server").joinpath("status_page.js").read_text("utf-8")


def _source(text: str) -> str:
    """Return the source expression that allows one inline text and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


CONTENT_SECURITY_POLICY: Final = (
    f"default-src 'none'; style-src {_source(_STYLE)}; script-src {_source(_SCRIPT)}; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The header `Content-Security-Policy` of the page: its own style and script, and figures of its own origin."""


def figures(statistics: Statistics, gauges: Gauges | None, version: str, problem: str | None = None) -> bytes:
    """Write the figures for programs.

    Args:
        statistics: The counters of this worker, whose backend's counts are published with them.
        gauges: The present figures of the backend; None where it has none.
        version: The version of the server.
        problem: Why the server is not ready, or None.

    Returns:
        JSON in UTF-8: counts since the start, and under `window` the rates and percentiles over that time.
    """
    return orjson.dumps(read(statistics, gauges, version, problem))


def page(statistics: Statistics, gauges: Gauges | None, version: str, problem: str | None = None) -> bytes:
    """Write the page.

    Args:
        statistics: As for `figures`.
        gauges: As for `figures`.
        version: As for `figures`.
        problem: As for `figures`.

    Returns:
        HTML in UTF-8. Send it with `CONTENT_SECURITY_POLICY`.
    """
    return _render(read(statistics, gauges, version, problem)).encode()


def _fixed(value: float, digits: int) -> str:
    """Return a number rounded as the script rounds: half a digit goes up."""
    return f"{math.floor(value * 10**digits + 0.5) / 10**digits:,.{digits}f}"


def _count(value: float) -> str:
    return _fixed(value, 0)


def _rate(value: float) -> str:
    if 0 < value < 0.1:  # noqa: PLR2004 (what one digit cannot show)
        return "< 0.1"
    return _fixed(value, 1 if 0 < value < 10 else 0)  # noqa: PLR2004 (one digit)


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1_000 or unit == "TB":  # noqa: PLR2004 (the next unit)
            break
        value /= 1_000
    return f"{_fixed(value, 0 if unit == 'B' or value >= 100 else 1)} {unit}"  # noqa: PLR2004 (three digits)


def _seconds(value: float) -> str:
    if value < 1e-3:  # noqa: PLR2004 (the next unit)
        return f"{_fixed(value * 1e6, 0)} \u00b5s"
    if value < 1:
        return f"{_fixed(value * 1e3, 1 if value < 1e-2 else 0)} ms"  # noqa: PLR2004 (two digits)
    return f"{_fixed(value, 1)} s"


def _percent(value: float) -> str:
    return f"{_fixed(value * 100, 1)} %"


def _span(value: float) -> str:
    minutes, hours = int(value // 60), int(value // 3_600)
    if not minutes:
        return f"{int(value)} s"
    if not hours:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"  # noqa: PLR2004 (two days)


def _moment(value: float) -> str:
    return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


_FORMATS: Mapping[str, Callable[[Any], str]] = {
    "text": str,
    "count": _count,
    "rate": _rate,
    "bytes": _bytes,
    "seconds": _seconds,
    "percent": _percent,
    "span": _span,
    "moment": _moment,
}
_WORKER_COLUMNS = {
    "worker": ("Worker", "text"),
    "pid": ("Process", "text"),
    "state": ("State", "text"),
    "up": ("Up", "span"),
    "starts": ("Starts", "count"),
    "requests": ("Requests", "count"),
    "connections": ("Open", "count"),
}
_STATUS_NAMES = {
    "200": "done",
    "400": "malformed",
    "401": "unknown credentials",
    "403": "not allowed",
    "404": "absent",
    "405": "wrong method",
    "408": "too slow",
    "413": "too large",
    "415": "encoded body",
    "429": "too many",
    "431": "head too large",
    "499": "client left",
    "500": "internal error",
    "501": "not implemented",
    "503": "unavailable",
    "505": "other HTTP version",
    "507": "no room",
}


def _show(value: object, form: str) -> str:
    return "\u2013" if value is None else escape(_FORMATS[form](value))


def _look_up(reading: Mapping[str, Any], path: str) -> Any:
    value: Any = reading
    for name in path.split("."):
        value = None if value is None else value[name]
    return value


class _Renderer:
    """The parts of the page over one reading."""

    def __init__(self, reading: Mapping[str, Any]) -> None:
        self._reading = reading

    def figure(self, path: str, form: str, tag: str = "span", attributes: str = "") -> str:
        text = _show(_look_up(self._reading, path), form)
        return f'<{tag} data-path="{path}" data-form="{form}"{attributes}>{text}</{tag}>'

    def tile(self, title: str, figure: tuple[str, str], note: str, line: str) -> str:
        return (
            f'<section class="tile"><h2>{title}</h2>{self.figure(*figure, tag="p", attributes=" class=big")}'
            f'<svg class="line" data-line="{line}" viewBox="0 0 120 32" preserveAspectRatio="none" aria-hidden="true">'
            f'<path class="area"/><path class="stroke" d="M0 31H120"/></svg><p class="note">{note}</p></section>'
        )

    def rows(self, names: Mapping[str, tuple[str, str]]) -> str:
        """Return lines of a name and a figure."""
        return "".join(f"<div><dt>{name}</dt>{self.figure(path, form, 'dd')}</div>" for path, (name, form) in names.items())

    def counts(self, parent: str, names: Mapping[str, str]) -> str:
        """Return lines like `rows`, those with a count of 0 hidden, and one that stands for none."""
        counts = self._reading[parent]
        lines = "".join(
            f"<div data-nonzero{'' if counts[name] else ' hidden'}><dt>{text}</dt>"
            f"{self.figure(f'{parent}.{name}', 'count', 'dd')}</div>"
            for name, text in names.items()
        )
        return f"{lines}<div data-none{' hidden' if any(counts.values()) else ''}><dt>None so far</dt></div>"

    def requests(self) -> str:
        columns = {
            "window.verbs.{}.rate": ("per second", "rate"),
            "verbs.{}.requests": ("in all", "count"),
            "verbs.{}.refused": ("refused", "count"),
            "verbs.{}.failed": ("failed", "count"),
            "window.verbs.{}.p50": ("p50", "seconds"),
            "window.verbs.{}.p90": ("p90", "seconds"),
            "window.verbs.{}.p99": ("p99", "seconds"),
        }
        head = "".join(f'<th scope="col">{name}</th>' for name, _ in columns.values())
        body = "".join(
            f'<tr><th scope="row">{verb}</th>'
            + "".join(
                self.figure(path.format(verb), form, "td", f' data-label="{name}"') for path, (name, form) in columns.items()
            )
            + "</tr>"
            for verb in VERBS
        )
        return f'<table><thead><tr><th scope="col">Verb</th>{head}</tr></thead><tbody>{body}</tbody></table>'

    def workers(self) -> str:
        head = "".join(f'<th scope="col">{name}</th>' for name, _ in _WORKER_COLUMNS.values())
        body = "".join(
            "<tr>"
            + "".join(
                f'<td data-label="{name}" data-name="{key}" data-form="{form}">{_show(worker[key], form)}</td>'
                for key, (name, form) in _WORKER_COLUMNS.items()
            )
            + "</tr>"
            for worker in self._reading["workers"]
        )
        return f'<table><thead><tr>{head}</tr></thead><tbody id="workers">{body}</tbody></table>'


def _render(reading: Mapping[str, Any]) -> str:
    part = _Renderer(reading)
    status_names = {status: f"{status} {_STATUS_NAMES.get(status, '')}".strip() for status in STATUSES}
    tiles = (
        part.tile(
            "Requests / s",
            ("window.requests", "rate"),
            f"{part.figure('requests', 'count')} in all",
            "requests",
        ),
        part.tile(
            "Hit ratio",
            ("window.hit_ratio", "percent"),
            f"{part.figure('misses', 'count')} misses in all",
            "hit_ratio",
        ),
        part.tile(
            "Get p99",
            ("window.verbs.get.p99", "seconds"),
            f"p50 {part.figure('window.verbs.get.p50', 'seconds')}",
            "p99",
        ),
        part.tile(
            "Connections",
            ("connections", "count"),
            f"{part.figure('accepted', 'count')} accepted in all",
            "connections",
        ),
    )
    store = {
        "store.entries": ("Entries", "count"),
        "store.value_bytes": ("Values", "bytes"),
        "store.wal_bytes": ("Write-ahead log", "bytes"),
        "store.disk_free_bytes": ("Free disk", "bytes"),
        "window.writes_per_commit": ("Writes per commit", "rate"),
        "store.expired": ("Expired and swept", "count"),
        "store.failures": ("Failures of the store", "count"),
    }
    traffic = {
        "window.bytes_in": ("Received / s", "bytes"),
        "window.bytes_out": ("Sent / s", "bytes"),
        "bytes_in": ("Received in all", "bytes"),
        "bytes_out": ("Sent in all", "bytes"),
        "wrong_keys": ("Unknown keys offered", "count"),
        "dropped_lines": ("Log lines dropped", "count"),
    }
    state = str(reading["state"])
    problem = reading["problem"]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>aiokv: status</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f'<meta name="robots" content="noindex"><link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>'
        f"<header><h1>aiokv {part.figure('version', 'text', attributes=' class=version')}</h1>"
        f'<p id="state" data-state="{escape(state)}"><span class="dot"></span>{part.figure("state", "text")}</p>'
        f'<p class="quiet">up {part.figure("up", "span")}</p><p class="quiet moment">{part.figure("time", "moment")}</p>'
        f'</header><p id="problem"{"" if problem else " hidden"}>{part.figure("problem", "text")}</p>'
        f'<main><div class="tiles">{"".join(tiles)}</div>'
        f'<section class="wide requests"><h2>Requests <small>rates and percentiles {part.figure("window.name", "text")}'
        f"</small></h2>{part.requests()}</section>"
        f'<div class="cards"><section><h2>Store</h2><dl>{part.rows(store)}</dl></section>'
        f"<section><h2>Traffic</h2><dl>{part.rows(traffic)}</dl></section>"
        f"<section><h2>Refusals</h2><dl>{part.counts('refusals', {reason: reason.replace('_', ' ') for reason in REASONS})}"
        "</dl></section>"
        f"<section><h2>Answers</h2><dl>{part.counts('statuses', status_names)}</dl></section></div>"
        f'<section class="wide workers"><h2>Workers</h2>{part.workers()}</section></main>'
        f"<script>{_SCRIPT}</script></body></html>\n"
    )
