"""The site of the documents: built without a warning, whole, and read without fetching anything from elsewhere."""

import contextlib
import functools
import http.server
import importlib.util
import re
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import chromium
import pytest
from helpers import REPOSITORY, clean_environment

PICTURES = REPOSITORY / "docs" / "pictures"
# Those of benchmarks are drawn from their figures; test_benchmark_results.py holds them against these.
DRAWN = sorted(path.name for path in PICTURES.glob("*.svg") if not path.name.startswith("bench-"))
# What a page loads by itself; a link is followed by its reader.
LOADING = {"src", "srcset", "data", "poster", "background"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("material") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs-material is not installed: pip install 'aiokv[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=REPOSITORY,
        env={**clean_environment(folder), "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    # With `--quiet`, warnings would not count.
    assert (done.returncode, re.findall("WARNING.*", done.stderr)) == (0, [])
    return folder


class Loads(HTMLParser):
    """The addresses that a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.addresses += [value for name, value in given.items() if name in LOADING]
        if tag == "link" and given.get("rel") not in {"canonical", "prev", "next"}:
            self.addresses.append(given.get("href", ""))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_site_is_built_strictly_and_has_every_page(site: Path) -> None:
    written = {path.relative_to(REPOSITORY / "docs").with_suffix(".html") for path in (REPOSITORY / "docs").glob("**/*.md")}
    assert {path for path in written if not (site / path).exists()} == set()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_pages_and_styles_load_nothing_from_elsewhere(site: Path) -> None:
    loads = Loads()
    for path in site.glob("**/*.html"):
        loads.feed(path.read_text(encoding="utf-8"))
    for path in site.glob("**/*.css"):
        found = re.findall(r"url\(([^)]+)\)|@import ([^;]+)", path.read_text(encoding="utf-8"))
        loads.addresses += [url or imported for url, imported in found]
    assert [address for address in loads.addresses if re.match(r"""["']?(https?:)?//""", address)] == []


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_no_snippet_and_no_mark_is_left_in_a_page(site: Path) -> None:
    for path in site.glob("**/*.html"):
        assert "--8&lt;--" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("name", DRAWN)
def test_picture_is_what_its_code_draws(name: str) -> None:
    drawings: dict[str, Callable[[], str]] = runpy.run_path(str(PICTURES / "draw.py"))["PICTURES"]
    assert (PICTURES / name).read_text(encoding="utf-8") == drawings[name]()


def test_every_drawing_is_a_file() -> None:
    drawings = runpy.run_path(str(PICTURES / "draw.py"))["PICTURES"]
    assert set(drawings) == set(DRAWN)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A handler that writes no log."""

    def log_message(self, *_: object) -> None:
        """Write nothing."""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on a free port; yield the address."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(chromium.PROGRAM is None, reason="Chromium is not installed: apt-get install chromium")
@pytest.mark.parametrize("scheme", ["default", "slate"], ids=["light", "dark"])
async def test_pages_fit_a_phone_and_a_desktop_and_ask_nobody_else(site: Path, tmp_path: Path, scheme: str) -> None:
    with served(site) as address, chromium.running_chromium(tmp_path / "profile") as devtools:
        async with chromium.opened_page(devtools) as page:
            for name in ("index.html", "caching.html", "service.html", "reference/store.html"):
                for width in (390, 1280):
                    await page.show_as(width, dark=scheme == "slate")
                    await page.call("Page.navigate", url=f"{address}/{name}")
                    await page.wait_for("document.readyState == 'complete' && !!document.querySelector('h1')")
                    assert await page.evaluate("document.body.dataset.mdColorScheme") == scheme
                    # Wide tables and code scroll by themselves; the page does not.
                    assert await page.evaluate("document.documentElement.scrollWidth") <= width
            assert [url for url in page.requested() if not url.startswith((address, "data:", "blob:", "about:"))] == []
            assert page.complaints() == []


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(chromium.PROGRAM is None, reason="Chromium is not installed: apt-get install chromium")
async def test_search_finds_an_option(site: Path, tmp_path: Path) -> None:
    with served(site) as address, chromium.running_chromium(tmp_path / "profile") as devtools:
        async with chromium.opened_page(devtools) as page:
            await page.call("Page.navigate", url=f"{address}/index.html?q=stale_if_error")
            found = await page.wait_for("[...document.querySelectorAll('.md-search-result__link')].map(link => link.href)")
            assert any("caching-options.html" in link for link in found), found
