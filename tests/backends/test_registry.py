"""The table of schemes, and what installed packages add to it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aiokv import AsyncKVStore, ConfigurationError
from aiokv.backends import registry
from aiokv.backends.memory import MemoryBackend
from aiokv.backends.registry import canonical_url, check_url, open_backend, redacted_url

Install = Callable[..., None]

FACTORY = """
from aiokv.backends.memory import MemoryBackend
opened = []
def open_it(url):
    opened.append(url)
    return MemoryBackend()
"""

ROW = """
from aiokv.backends.memory import MemoryBackend
from aiokv.backends.scheme import Scheme
from aiokv.errors import ConfigurationError
opened = []
def check(url, parts):
    if not parts.netloc:
        raise ConfigurationError("tape:// must name a drive")
def open_it(url, options):
    opened.append((url, options.credentials))
    return MemoryBackend()
SCHEME = Scheme(open=open_it, check=check, canonical=lambda url: url.rstrip("/"), takes_credentials=True)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a package of one module into a folder on the path, as pip would, with one entry point."""
    monkeypatch.setattr(registry, "_plugins", {})
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(package: str, scheme: str, source: str, attribute: str = "open_it") -> None:
        module = package.replace("-", "_")
        monkeypatch.delitem(sys.modules, module, raising=False)
        (tmp_path / f"{module}.py").write_text(source)
        folder = tmp_path / f"{module}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[aiokv.backends]\n{scheme} = {module}:{attribute}\n")

    return install


async def test_function_of_an_installed_package_opens_its_scheme(install: Install) -> None:
    install("aiokv-tape", "tape", FACTORY)
    store = AsyncKVStore("db", url="TAPE://Drive/1")
    await store.set("k", "v")
    assert await store.get("k") == "v"
    assert sys.modules["aiokv_tape"].opened == ["tape://Drive/1"]
    assert store.target.url == "tape://Drive/1"
    await store.aclose()


async def test_row_of_an_installed_package_checks_and_canonicalises_and_gets_credentials(install: Install) -> None:
    install("aiokv-tape", "tape", ROW, "SCHEME")
    with pytest.raises(ConfigurationError, match="must name a drive"):
        AsyncKVStore("db", url="tape://")
    store = AsyncKVStore("db", url="tape://drive/", credentials="id:secret")
    assert store.target == AsyncKVStore("db", url="tape://drive", credentials="id:secret").target
    assert store.target != AsyncKVStore("db", url="tape://drive").target
    assert await store.get("k") is None
    assert sys.modules["aiokv_tape"].opened == [("tape://drive", "id:secret")]
    await store.aclose()


def test_package_is_loaded_only_when_its_scheme_is_asked_for(install: Install) -> None:
    install("aiokv-tape", "tape", FACTORY)
    check_url("memory://")
    with pytest.raises(ConfigurationError, match="unknown scheme 'disc'"):
        check_url("disc://")
    assert "aiokv_tape" not in sys.modules
    check_url("tape://")
    assert "aiokv_tape" in sys.modules


def test_package_that_cannot_be_imported_is_named(install: Install) -> None:
    install("aiokv-tape", "tape", "raise ImportError('s3cret')")
    with pytest.raises(ConfigurationError, match=r"the package aiokv-tape, .* cannot be loaded \(ImportError\)") as caught:
        AsyncKVStore("db", url="tape://")
    assert "s3cret" not in str(caught.value)
    assert isinstance(caught.value.__cause__, ImportError)


def test_entry_point_that_is_neither_row_nor_function_is_named(install: Install) -> None:
    install("aiokv-tape", "tape", "thing = 3", "thing")
    with pytest.raises(ConfigurationError, match="the package aiokv-tape adds the scheme 'tape' by an object of type int"):
        check_url("tape://")


@pytest.mark.parametrize(
    ("source", "kind"), [("def open_it(url): raise OSError('s3cret')", "OSError"), ("def open_it(url): return {}", "TypeError")]
)
def test_package_that_cannot_open_its_scheme_is_named(install: Install, source: str, kind: str) -> None:
    install("aiokv-tape", "tape", source)
    with pytest.raises(ConfigurationError, match=rf"the package aiokv-tape cannot open its scheme 'tape' \({kind}\)") as caught:
        open_backend("tape://")
    assert "s3cret" not in str(caught.value)


def test_two_packages_of_one_scheme_are_both_named(install: Install) -> None:
    install("aiokv-tape", "tape", FACTORY)
    install("aiokv-other", "tape", FACTORY)
    with pytest.raises(ConfigurationError, match="the packages aiokv-other and aiokv-tape both add the scheme 'tape'"):
        check_url("tape://")


def test_built_in_scheme_cannot_be_overridden(install: Install) -> None:
    install("aiokv-evil", "memory", FACTORY)
    assert type(open_backend("memory://built-in")) is MemoryBackend
    assert "aiokv_evil" not in sys.modules


def test_plug_in_url_with_a_secret_is_refused_unseen(install: Install) -> None:
    install("aiokv-tape", "tape", FACTORY)
    for url in ("tape://id:s3cret@drive", "tape://drive?password=s3cret"):
        with pytest.raises(ConfigurationError, match="must not h") as caught:
            check_url(url)
        assert "s3cret" not in str(caught.value)


def test_message_of_an_unknown_scheme_says_what_is_known() -> None:
    with pytest.raises(ConfigurationError, match=r"known forms: https://host, .*memory://, or what an installed package adds"):
        check_url("disc://")


@pytest.mark.parametrize(
    ("url", "redacted"),
    [
        ("https://id:s3cret@host/p", "https://***@host/p"),
        ("https://host/p", "https://host/p"),
        ("x://a@s3cret@host", "x://***@host"),
        ("no url", "no url"),
    ],
)
def test_redacted_url_hides_what_stands_before_an_at_sign(url: str, redacted: str) -> None:
    assert redacted_url(url) == redacted


@pytest.mark.parametrize(
    "host", ["evil.com\\.fal.ai", "[::1].fal.ai", "xn--gateway-.alpha.fal.ai", "xn--a.b", "a..b", "a" * 64, "é" * 70, "."]
)
async def test_url_whose_host_cannot_be_used_is_refused_and_named(host: str) -> None:
    with pytest.raises(ConfigurationError, match="names no valid host; known forms") as caught:
        canonical_url(f"https://{host}/prefix")
    assert repr(f"https://{host}")[:-1] in str(caught.value)
    with pytest.raises(ConfigurationError, match="names no valid host"):
        await AsyncKVStore("db", url=f"https://{host}", credentials="id:secret").get("k")
