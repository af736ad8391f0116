"""`aiokv top`: what a server of `aiokv serve` does now, by the figures of its `/metrics`."""

import argparse
import asyncio
import itertools
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import orjson

from aiokv import clock
from aiokv.backends.registry import canonical_url, preload
from aiokv.cli.histogram import format_seconds
from aiokv.cli.live import Row, Screen
from aiokv.cli.terminal import binary_output
from aiokv.errors import AuthenticationError, ConfigurationError, ConnectError, ResponseError

if TYPE_CHECKING:
    from aiohttp import ClientSession

_OK, _REFUSED = 200, {401, 403}
_TIMEOUT_SECONDS = 5.0
_MAX_METRICS_BYTES = 4 * 1024 * 1024
_KEY_VARIABLES = ("AIOKV_METRICS_KEY", "AIOKV_KEY")
_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_SHARES = {"p50": 0.5, "p99": 0.99}
_COLUMNS = ("figure", "now")

_EPILOG = """\
examples: aiokv top http://127.0.0.1:8787
          aiokv top --once --json | jq .hit_ratio

Rates are those between two readings, a second apart unless --interval says otherwise. Where the server has an access file, the
key is that of an operator (`aiokv access add NAME --operator`), in the environment's AIOKV_METRICS_KEY, else AIOKV_KEY. The
figures are those of the whole server: they name no account and no namespace. Ctrl-C ends it.
"""

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def add_top(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `top`.

    Args:
        parser: That of the command.
    """
    parser.epilog = _EPILOG
    parser.add_argument(
        "url", metavar="URL", nargs="?", default=os.environ.get("AIOKV_URL"), help="the server's address (default: AIOKV_URL)"
    )
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between readings (default: 1)")
    parser.add_argument("--once", action="store_true", help="show the figures of one interval, and end")
    parser.add_argument("--json", action="store_true", help="write a JSON object a line to standard output")
    parser.set_defaults(run=_top)


def _top(options: argparse.Namespace) -> int:
    if not (options.url or "").startswith(("http://", "https://")):
        raise ValueError("top needs the address of a server of `aiokv serve`, such as http://127.0.0.1:8787 (or set AIOKV_URL)")
    if not options.interval > 0:
        raise ValueError("--interval must be more than 0 seconds")
    url = canonical_url(options.url)
    # Before the loop runs, which it would hold up.
    preload(url)
    asyncio.run(_watch(url, _authorization(url), options))
    return 0


async def _watch(url: str, headers: dict[str, str], options: argparse.Namespace) -> None:
    from aiohttp import ClientSession, ClientTimeout  # noqa: PLC0415 (see above)

    output = binary_output()
    async with ClientSession(timeout=ClientTimeout(_TIMEOUT_SECONDS), headers=headers) as session:
        before, taken = await _read(session, url), clock.monotonic()
        with Screen(url, _COLUMNS) as screen:
            for _ in itertools.count():
                await asyncio.sleep(options.interval)
                try:
                    after, now = await _read(session, url), clock.monotonic()
                except ConnectError as error:
                    if options.once:
                        raise
                    screen.show([("server", str(error))], str(error))
                    continue
                figures = summarize(before, after, now - taken)
                before, taken = after, now
                if options.json:
                    output.write(orjson.dumps(figures) + b"\n")
                    output.flush()
                elif options.once:
                    output.write("".join(f"{name:<16} {text}\n" for name, text in _rows(figures)).encode())
                    output.flush()
                else:
                    rows = _rows(figures)
                    screen.show(rows, ", ".join(f"{name} {text}" for name, text in rows))
                if options.once:
                    return


def _authorization(url: str) -> dict[str, str]:
    from yarl import URL  # noqa: PLC0415 (comes with aiohttp)

    from aiokv.backends.http.credentials import choose_credentials, is_fal_host  # noqa: PLC0415 (likewise)

    if is_fal_host(URL(url).host):
        raise ConfigurationError("fal's service shows no figures; top is for servers of `aiokv serve`")
    key = next((key.strip() for name in _KEY_VARIABLES if (key := os.environ.get(name))), None)
    # It refuses to send a key in the clear to another machine.
    choose_credentials(URL(url), key)
    return {} if key is None else {"Authorization": f"Key {key}"}


async def _read(session: "ClientSession", url: str) -> Samples:
    """Read the figures of a server.

    Raises:
        AioKVError: There are none.
    """
    import aiohttp  # noqa: PLC0415 (likewise)

    try:
        async with session.get(f"{url}/metrics", allow_redirects=False) as response:
            status = response.status
            text = (await response.content.read(_MAX_METRICS_BYTES)).decode("utf-8", "replace") if status == _OK else ""
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        # Not chained: aiohttp's error may hold the request with its key.
        reason = type(error).__name__ if isinstance(error, aiohttp.ClientResponseError) else str(error) or type(error).__name__
    else:
        return _parse(status, text, url)
    raise ConnectError(f"no figures from {url}/metrics: {reason}; try `aiokv ping --url {url}`")


def _parse(status: int, text: str, url: str) -> Samples:
    if status in _REFUSED:
        raise AuthenticationError(
            f"{url}/metrics wants the key of an operator: make one with `aiokv access add NAME --operator`, and set "
            f"{_KEY_VARIABLES[0]} to it",
            status=status,
        )
    samples = parse_metrics(text)
    if status != _OK or not any(name == "aiokv_connections" for name, _ in samples):
        raise ResponseError(f"{url}/metrics is not that of a server of `aiokv serve`", status=status)
    return samples


def parse_metrics(text: str) -> Samples:
    """Read Prometheus' text format, as far as `aiokv serve` uses it.

    Args:
        text: What `/metrics` answered.

    Returns:
        The number of each sample, by its name and labels.
    """
    samples = {}
    for line in text.splitlines():
        found = None if line.startswith("#") else _SAMPLE.match(line)
        if found is not None:
            try:
                samples[found[1], frozenset(_LABEL.findall(found[2] or ""))] = float(found[3])
            except ValueError:
                continue
    return samples


def summarize(before: Samples, after: Samples, seconds: float) -> dict[str, Any]:
    """Return what a server did between two readings.

    Args:
        before: The first one.
        after: The second one; where a counter is less than before, the server has begun anew.
        seconds: The time between them.

    Returns:
        Rates a second, ratios, gauges and times in seconds; all of them fit JSON.
    """

    def rate(name: str, verb: str | None = None, status: str | None = None) -> float:
        return _total(before, after, name, verb, status) / seconds

    def gauge(name: str) -> float | None:
        return after.get((name, frozenset()))

    hits, misses = rate("aiokv_get_hits_total"), rate("aiokv_get_misses_total")
    verbs = sorted({dict(labels)["verb"] for name, labels in after if name == "aiokv_requests_total"})
    return {
        "seconds": seconds,
        "requests": rate("aiokv_requests_total"),
        "verbs": {verb: rate("aiokv_requests_total", verb) for verb in verbs},
        "batch_keys": rate("aiokv_batch_keys_total"),
        "hit_ratio": hits / (hits + misses) if hits + misses else None,
        "latency": {verb: _latency(before, after, verb) for verb in ("get", "set")},
        "received_bytes": rate("aiokv_received_bytes_total"),
        "sent_bytes": rate("aiokv_sent_bytes_total"),
        "errors": rate("aiokv_requests_total", status="5"),
        "refusals": rate("aiokv_refusals_total"),
        "connections": gauge("aiokv_connections"),
        "watches": gauge("aiokv_watches"),
        "workers": gauge("aiokv_workers"),
        "entries": gauge("aiokv_entries"),
        "value_bytes": gauge("aiokv_value_bytes"),
        "disk_free_bytes": gauge("aiokv_disk_free_bytes"),
    }


def _total(before: Samples, after: Samples, name: str, verb: str | None, status: str | None) -> float:
    """Return how much counters of a name have grown, those of a verb or of statuses that begin so."""
    grown = 0.0
    for (sample, labels), count in after.items():
        if sample == name:
            of = dict(labels)
            if verb in {None, of.get("verb")} and of.get("status", "").startswith(status or ""):
                old = before.get((sample, labels), 0.0)
                grown += count - old if count >= old else count
    return grown


def _latency(before: Samples, after: Samples, verb: str) -> dict[str, float | None]:
    """Return percentiles of a verb's answers: the upper bound of the bucket that each is in."""
    buckets = []
    for (name, labels), count in after.items():
        of = dict(labels)
        if name == "aiokv_request_seconds_bucket" and of.get("verb") == verb:
            old = before.get((name, labels), 0.0)
            buckets.append((float(of["le"]), count - old if count >= old else count))
    buckets.sort()
    total = buckets[-1][1] if buckets else 0.0
    return {
        share: next((bound for bound, count in buckets if count >= total * part), None) if total else None
        for share, part in _SHARES.items()
    }


def _rows(figures: Mapping[str, Any]) -> list[Row]:
    ratio = figures["hit_ratio"]
    rows: list[Row] = [
        ("requests", f"{figures['requests']:,.0f}/s"),
        *((verb, f"{rate:,.0f}/s") for verb, rate in figures["verbs"].items() if rate or verb in {"get", "set"}),
        ("keys in batches", f"{figures['batch_keys']:,.0f}/s"),
        ("hit ratio", "-" if ratio is None else f"{ratio:.1%}"),
    ]
    for verb, shares in figures["latency"].items():
        rows.append(
            (f"{verb} p50, p99", ", ".join(f"< {format_seconds(seconds)}" if seconds else "-" for seconds in shares.values()))
        )
    rows += [
        ("in, out", f"{_size(figures['received_bytes'])}/s, {_size(figures['sent_bytes'])}/s"),
        ("errors", f"{figures['errors']:,.0f}/s"),
        ("refusals", f"{figures['refusals']:,.0f}/s"),
    ]
    for name in ("connections", "watches", "workers", "entries"):
        if figures[name] is not None:
            rows.append((name, f"{figures[name]:,.0f}"))
    for name, title in (("value_bytes", "values"), ("disk_free_bytes", "disk free")):
        if figures[name] is not None:
            rows.append((title, _size(figures[name])))
    return rows


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
