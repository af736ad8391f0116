"""`/status`: what the page says without scripts, what its script makes of it, and how a browser shows it."""

import base64
import hashlib
import re
from collections.abc import AsyncGenerator, Generator
from html.parser import HTMLParser

import chromium
import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer
from helpers import FakeClock

from aiokv import clock as process_clock
from aiokv.backends.base import Gauges
from aiokv.server.statistics import DELETE, GET, OTHER, REASONS, ROW_BYTES, SET, TOKEN, VERBS, Statistics, retire
from aiokv.server.status_page import CONTENT_SECURITY_POLICY, figures, page

in_a_browser = pytest.mark.skipif(chromium.PROGRAM is None, reason="needs Chromium: apt-get install chromium")

GAUGES = Gauges(
    entries=1_234_567,
    value_bytes=1_200_000_000,
    expired=3,
    commits=100,
    committed_writes=437,
    wal_bytes=4_194_304,
    disk_free_bytes=182_000_000_000,
    failures=2,
)
# Twenty of the page's periods in the time of one.
HURRY = "const later = setTimeout; window.setTimeout = (call, wait) => later(call, wait / 20);"
# Source: WCAG 2.1, relative luminance and contrast ratio.
CONTRAST = """(selector) => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[0-9.]+/g).map((part) => {
      const share = part / 255;
      return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const element = document.querySelector(selector);
  let ground = element;
  while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
  const shades = [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor].map(luminance);
  return (Math.max(...shades) + 0.05) / (Math.min(...shades) + 0.05);
}"""


class _Texts(HTMLParser):
    """The text of each element that shows a figure, and what else matters of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: dict[str, str] = {}
        self.attributes: list[tuple[str, str, str | None]] = []
        self.hidden_figures: set[str] = set()
        self.inline: dict[str, str] = {}
        self._tag = self._path = ""
        self._hides = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self._tag, self._path = tag, named.get("data-path") or ""
        if "data-nonzero" in named:
            self._hides = "hidden" in named
        if self._path:
            self.figures[self._path] = ""
            if self._hides:
                self.hidden_figures.add(self._path)

    def handle_endtag(self, tag: str) -> None:
        self._tag = self._path = ""
        if tag == "div":
            self._hides = False

    def handle_data(self, data: str) -> None:
        if self._path:
            self.figures[self._path] += data
        if self._tag in {"style", "script"}:
            self.inline[self._tag] = self.inline.get(self._tag, "") + data


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock(1_700_000_000.0)
    monkeypatch.setattr(process_clock, "now", clock)
    return clock


@pytest.fixture
def busy(clock: FakeClock) -> Statistics:
    """Return the statistics of a worker that has run for 100 seconds."""
    statistics = Statistics()
    clock.advance(100)
    for _ in range(900):
        statistics.record(GET, 200, 0.000_2, 0, 1_000)
    for _ in range(100):
        statistics.record(GET, 404, 0.02, 0, 50)
    statistics.record(SET, 200, 0.003, 5_000, 11)
    statistics.record(SET, 507, 0.003, 5_000, 60)
    statistics.record(TOKEN, 401, 1.5, 2, 60)
    statistics.refused("quota")
    statistics.wrong_key()
    statistics.opened()
    return statistics


def texts(statistics: Statistics, gauges: Gauges | None = GAUGES, problem: str | None = None) -> _Texts:
    return _Texts(page(statistics, gauges, "1.2.3", problem).decode())


def test_the_page_is_whole_without_scripts(busy: Statistics) -> None:
    shown = texts(busy).figures
    expected = {
        "version": "1.2.3",
        "state": "Ready",
        "time": "2023-11-14 22:15:00 UTC",
        "up": "1 min",
        "window.name": "since the start",
        "window.requests": "10",
        "window.hit_ratio": "90.0 %",
        "window.verbs.get.rate": "10",
        "window.verbs.set.rate": "< 0.1",
        "window.verbs.delete.p50": "–",
        "verbs.get.requests": "1,000",
        "verbs.get.refused": "0",
        "verbs.set.failed": "1",
        "verbs.token.refused": "1",
        "connections": "1",
        "bytes_in": "10.0 kB",
        "bytes_out": "905 kB",
        "store.entries": "1,234,567",
        "store.value_bytes": "1.2 GB",
        "store.wal_bytes": "4.2 MB",
        "store.disk_free_bytes": "182 GB",
        "store.failures": "2",
        "window.writes_per_commit": "4.4",
        "refusals.quota": "1",
        "wrong_keys": "1",
    }
    assert {path: shown[path] for path in expected} == expected
    assert all(text for path, text in shown.items() if path != "problem")


def test_the_percentiles_are_those_of_the_requests(busy: Statistics) -> None:
    verbs = orjson.loads(figures(busy, None, "1"))["window"]["verbs"]
    assert verbs["get"]["p50"] == pytest.approx(0.000_2, rel=0.1)
    assert verbs["get"]["p99"] == pytest.approx(0.02, rel=0.1)
    assert verbs["token"]["p90"] == pytest.approx(1.5, rel=0.1)


def test_reasons_and_statuses_that_never_came_are_hidden(busy: Statistics) -> None:
    hidden = texts(busy).hidden_figures
    assert {f"refusals.{reason}" for reason in REASONS} - hidden == {"refusals.quota"}
    assert {f"statuses.{status}" for status in ("200", "404", "401", "507", "500", "5xx")} & hidden == {
        "statuses.500",
        "statuses.5xx",
    }


def test_a_new_server_shows_an_honest_nothing(clock: FakeClock) -> None:
    shown = texts(Statistics(), None).figures
    assert (shown["requests"], shown["window.requests"], shown["window.hit_ratio"]) == ("0", "–", "–")
    assert (shown["store.entries"], shown["window.writes_per_commit"], shown["up"]) == ("–", "–", "0 s")
    assert clock.now == 1_700_000_000.0


def test_a_problem_stands_on_the_page_and_in_the_figures(busy: Statistics) -> None:
    shown = texts(busy, problem="the disk is full").figures
    assert (shown["state"], shown["problem"]) == ("Not ready", "the disk is full")
    assert orjson.loads(figures(busy, None, "1", "the disk is full"))["problem"] == "the disk is full"


def test_the_server_stops_once_all_its_workers_do() -> None:
    rows = bytearray(2 * ROW_BYTES)
    one, other = Statistics(rows, 0), Statistics(rows, 1)
    one.drain()
    assert texts(other).figures["state"] == "Ready"
    other.drain()
    assert texts(other).figures["state"] == "Stopping"
    assert [worker["state"] for worker in orjson.loads(figures(one, None, "1"))["workers"]] == ["Stopping", "Stopping"]


def test_a_worker_that_ended_is_shown_as_such(clock: FakeClock) -> None:
    rows = bytearray(2 * ROW_BYTES)
    Statistics(rows, 1).record(GET, 200, 0.001, 0, 1)
    one = Statistics(rows, 0)
    retire(rows, 1)
    clock.advance(5)
    [_, ended] = orjson.loads(figures(one, None, "1"))["workers"]
    assert ended == {
        "worker": 1,
        "pid": None,
        "state": "Ended",
        "up": None,
        "starts": 1,
        "requests": 1,
        "connections": 0,
    }
    assert "Ended" in page(one, None, "1").decode()


def test_texts_from_elsewhere_are_no_markup(busy: Statistics) -> None:
    text = page(busy, GAUGES, "<b>1</b>", "<script>alert(1)</script> & 'more'").decode()
    assert "<b>" not in text
    assert "<script>alert" not in text
    shown = _Texts(text).figures
    assert (shown["version"], shown["problem"]) == ("<b>1</b>", "<script>alert(1)</script> & 'more'")


def test_the_policy_allows_the_pages_own_style_and_script_alone(busy: Statistics) -> None:
    shown = texts(busy)
    assert set(shown.inline) == {"style", "script"}
    for tag, text in shown.inline.items():
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in CONTENT_SECURITY_POLICY
    assert CONTENT_SECURITY_POLICY.startswith("default-src 'none';")
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert "\n" not in CONTENT_SECURITY_POLICY


def test_nothing_leads_elsewhere_and_no_attribute_holds_style_or_script(busy: Statistics) -> None:
    shown = texts(busy)
    assert not [name for _, name, _ in shown.attributes if name.startswith("on") or name in {"style", "src", "action"}]
    assert [value for _, name, value in shown.attributes if name == "href"] == ["data:,"]
    assert not re.search(r"https?:|//[a-z]|url\(|@import", "".join(shown.inline.values()).replace("\n  //", ""))


@pytest.fixture(scope="module")
def devtools(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    with chromium.running_chromium(tmp_path_factory.mktemp("profile")) as address:
        yield address


class Served:
    """A server of the page over statistics that a test changes."""

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics
        self.gauges: Gauges | None = GAUGES
        self.problem: str | None = None
        self.fails = False
        self.address = ""

    async def answer(self, request: web.BaseRequest) -> web.Response:
        if self.fails:
            return web.Response(status=503)
        write, kind = {"/status": (page, "text/html"), "/status.json": (figures, "application/json")}[request.path]
        body = write(self.statistics, self.gauges, "1.2.3", self.problem)
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Security-Policy": CONTENT_SECURITY_POLICY}
        return web.Response(body=body, headers=headers)


@pytest.fixture
async def served(busy: Statistics) -> AsyncGenerator[Served]:
    served = Served(busy)
    async with RawTestServer(served.answer) as server:
        served.address = str(server.make_url("/status"))
        yield served


@pytest.fixture
async def browser(devtools: str, served: Served) -> AsyncGenerator[chromium.Page]:
    async with chromium.opened_page(devtools) as opened:
        await opened.call("Page.addScriptToEvaluateOnNewDocument", source=HURRY)
        await opened.call("Page.navigate", url=served.address)
        await opened.wait_for(f"location.pathname === '/status' && document.readyState === 'complete' && {text_of('version')}")
        yield opened


def text_of(path: str) -> str:
    return f"document.querySelector('[data-path=\"{path}\"]').textContent"


@in_a_browser
@pytest.mark.slow
async def test_address_with_credentials_gets_its_figures(devtools: str, served: Served, busy: Statistics) -> None:
    async with chromium.opened_page(devtools) as opened:
        await opened.call("Page.addScriptToEvaluateOnNewDocument", source=HURRY)
        await opened.call("Page.navigate", url=served.address.replace("http://", "http://id:secret@"))
        await opened.wait_for(f"location.pathname === '/status' && document.readyState === 'complete' && {text_of('version')}")
        before = await opened.evaluate(text_of("requests"))
        busy.record(GET, 200, 0.04, 0, 500)
        await opened.wait_for(text_of("requests"), lambda text: text != before)
        assert await opened.evaluate("document.body.classList.contains('stale')") is False


@in_a_browser
@pytest.mark.slow
async def test_the_script_shows_rates_of_the_last_minute(
    browser: chromium.Page, served: Served, clock: FakeClock, busy: Statistics
) -> None:
    for _ in range(4):
        before = int((await browser.evaluate(text_of("requests"))).replace(",", ""))
        clock.advance(2)
        for _ in range(300):
            busy.record(GET, 200, 0.04, 0, 500)
        await browser.wait_for(text_of("requests"), lambda text, before=before: int(text.replace(",", "")) > before)
    assert await browser.evaluate(text_of("window.name")) in {"over the last 6 s", "over the last 8 s"}
    assert await browser.evaluate(text_of("window.requests")) == "150"
    assert await browser.evaluate(text_of("window.verbs.get.rate")) == "150"
    assert await browser.evaluate(text_of("window.bytes_out")) == "75.0 kB"
    assert await browser.evaluate(text_of("window.hit_ratio")) == "100.0 %"
    assert await browser.evaluate(text_of("window.verbs.get.p50")) in {"38 ms", "39 ms", "40 ms"}
    assert await browser.evaluate(text_of("verbs.get.requests")) == "2,200"
    line = await browser.evaluate("document.querySelector('[data-line=requests] .stroke').getAttribute('d')")
    assert re.fullmatch(r"M[0-9.]+ [0-9.]+(L[0-9.]+ [0-9.]+){2,}", line)
    assert browser.complaints() == []
    assert set(browser.requested()) <= {served.address, f"{served.address}.json", "data:,"}


@in_a_browser
@pytest.mark.slow
async def test_the_script_writes_figures_as_the_server_does(browser: chromium.Page, served: Served, clock: FakeClock) -> None:
    read = "Object.fromEntries([...document.querySelectorAll('[data-path]')].map((e) => [e.dataset.path, e.textContent]))"
    sizes = (0, 7, 999, 1_000, 123_456, 99_960_000, 5 * 10**11, 7 * 10**15)
    for step, size in enumerate(sizes):
        statistics = served.statistics
        clock.advance(10.0**step)
        for seconds in (3e-6, 0.000_95, 0.009_4, 0.73, 12.0):
            statistics.record(step % len(VERBS), 200 if step % 2 else 503, seconds / (step + 1), size, size)
        served.gauges = Gauges(size, size, expired=size, commits=step, committed_writes=7 * step, wal_bytes=size)
        served.problem = None if step % 3 else "a < b & c"
        expected = texts(statistics, served.gauges, served.problem).figures
        await browser.wait_for(read, lambda shown, expected=expected: shown["time"] == expected["time"])
        # The first reading after a step shows a difference; the clock then stands still, and the next one has none.
        shown = await browser.wait_for(read, lambda shown: shown["window.name"] == "since the start")
        assert shown == expected


@in_a_browser
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1280])
async def test_the_page_fits_its_window_and_can_be_read(browser: chromium.Page, width: int, *, dark: bool) -> None:
    await browser.show_as(width, dark=dark)
    assert await browser.evaluate("innerWidth") == width
    assert await browser.evaluate("document.documentElement.scrollWidth") <= width
    clipped = await browser.evaluate(
        "[...document.querySelectorAll('[data-path], td, th, dt, h2')]"
        ".filter((e) => e.scrollWidth > e.clientWidth + 1 && e.clientWidth).map((e) => e.outerHTML)"
    )
    assert clipped == []
    for selector in (".big", "dt", ".note", "tbody th", "td", "h2", "#state", ".quiet"):
        assert await browser.evaluate(f"({CONTRAST})({selector!r})") >= 4.5, selector
    ground = await browser.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(int(part) for part in re.findall(r"\d+", ground)) < 3 * 128) == dark
    assert browser.complaints() == []


@in_a_browser
@pytest.mark.slow
async def test_a_server_that_falls_silent_is_said_to_be(browser: chromium.Page, served: Served, clock: FakeClock) -> None:
    served.fails = True
    assert await browser.wait_for(text_of("problem"), lambda text: "old" in text) == (
        "The figures below are old: the server answers 503."
    )
    assert await browser.evaluate("!document.getElementById('problem').hidden")
    assert await browser.evaluate(text_of("state")) == "No answer"
    clock.advance(2)
    served.fails = False
    await browser.wait_for(text_of("state"), lambda text: text == "Ready")
    assert await browser.evaluate("document.getElementById('problem').hidden")


@in_a_browser
@pytest.mark.slow
async def test_new_workers_and_first_refusals_appear(browser: chromium.Page, served: Served, clock: FakeClock) -> None:
    rows = bytearray(3 * ROW_BYTES)
    served.statistics = Statistics(rows, 0)
    none = "[...document.querySelectorAll('[data-none]')].map((element) => element.checkVisibility())"
    await browser.wait_for(none, lambda shown: shown == [True, True])
    Statistics(rows, 1).record(OTHER, 200, 0.001, 0, 1)
    served.statistics.refused("rate")
    served.statistics.record(DELETE, 200, 0.001, 0, 1)
    clock.advance(2)
    read = "[...document.getElementById('workers').rows].map((row) => [...row.cells].map((cell) => cell.textContent))"
    shown: list[list[str]] = await browser.wait_for(read, lambda rows: len(rows) == 2)
    assert [[row[0], row[2], row[5]] for row in shown] == [["0", "Serving", "1"], ["1", "Serving", "1"]]
    visible = (
        "[...document.querySelectorAll('[data-path^=refusals]')].filter((e) => e.checkVisibility()).map((e) => e.dataset.path)"
    )
    assert await browser.evaluate(visible) == ["refusals.rate"]
    assert await browser.evaluate(none) == [False, False]
