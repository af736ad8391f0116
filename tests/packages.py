"""Build the wheel and the sdist, and try them as a user would: in fresh environments, for each interpreter and each extra.

Run by `make packages`. Each line that it prints is one installation that was used; it ends with status 1 where one failed.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]

BASE = """
import asyncio, aiokv
async def main():
    async with aiokv.AsyncKVStore("db", url="memory://") as store:
        await store.set("k", "v")
        assert await store.get("k") == "v"
asyncio.run(main())
"""

# What each extra is there for, used once without any other.
USES = {
    "aiocache": "import aiokv.adapters.aiocache",
    "all": "import aiokv.server, aiokv.otel",
    "cashews": "import aiokv.adapters.cashews",
    "cli": "import rich, shtab",
    "crypto": "import aiokv; aiokv.Encrypted(b'k' * 32)",
    "fastapi": "import fastapi, aiokv.adapters.fastapi",
    "http-cache": "import aiokv.adapters.aiohttp_client, aiokv.adapters.hishel",
    "langchain": "import aiokv.adapters.langchain",
    "litestar": "import aiokv.adapters.litestar",
    "otel": "import aiokv.otel",
    "pandas": "import pandas, pyarrow, zstandard",
    "prometheus": "import aiokv.adapters.prometheus",
    "py-key-value": "import aiokv.adapters.py_key_value, aiokv.adapters.py_key_value_store",
    "pydantic": "import aiokv, pydantic",
    "redis": "import aiokv; aiokv.AsyncKVStore('db', url='redis://127.0.0.1')",
    "server": "import aiokv.server",
    "speed": "import uvloop",
    "zstd": "import aiokv; aiokv.Zstd()",
}
# Tests to run with the newest release of what an extra names, where `dev` has an older one, and what else they need.
TESTS = {
    "fastapi": (
        ["tests/adapters/test_fastapi.py", "tests/adapters/test_asgi_trust.py"],
        ["uvicorn", "hypothesis", "pytest", "pytest-asyncio", "pytest-timeout"],
    )
}
# These are for the project's own work; `make test`, `make docs` and `make bench` install them.
OWN = {"bench", "dev", "docs", "suites", "test"}
# Modules beside the package.
BESIDE = {"aiokv_command.py", "pytest_aiokv.py"}


def build(folder: Path) -> tuple[Path, Path]:
    """Build both; the wheel comes from the sdist."""
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(REPOSITORY)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stdout)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def check_contents(wheel: Path, sdist: Path) -> None:
    """Hold what the two contain against the sources."""
    sources = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "aiokv").rglob("*.py")} | BESIDE
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert sources <= names, sources - names
    assert "aiokv/py.typed" in names
    ours = ("aiokv/", *BESIDE, f"aiokv-{PROJECT['version']}.dist-info/")
    strangers = {name for name in names if not name.startswith(ours)}
    assert not strangers, strangers
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"aiokv", "tests", "docs", "README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml"} <= tops, tops
    assert not {".venv", ".git", "__pycache__"} & tops


def try_installation(python: str, requirement: str, use: str, extra: str = "") -> str | None:
    """Install into a fresh environment, use it there and run the extra's tests; return what went wrong."""
    with tempfile.TemporaryDirectory() as home:
        its_python, its_aiokv = f"{home}/venv/bin/python", f"{home}/venv/bin/aiokv"
        steps = [
            [python, "-m", "venv", f"{home}/venv"],
            [its_python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement],
            [its_python, "-X", "dev", "-c", BASE],
            [its_python, "-c", use],
            [its_aiokv, "--help"],
            [its_aiokv, "--version"],
            [its_python, "-m", "pip", "check"],
        ]
        if extra in TESTS:
            tests, tools = TESTS[extra]
            steps += [
                [its_python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *tools],
                [its_python, "-m", "pytest", "--quiet", *(str(REPOSITORY / test) for test in tests)],
            ]
        for step in steps:
            done = subprocess.run(step, cwd=home, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                return f"{' '.join(step[1:5])}: {(done.stderr or done.stdout)[-2_000:]}"
            if step[-1] == "--version" and done.stdout.strip() != f"aiokv {PROJECT['version']}":
                return f"the version is {done.stdout!r}"
    return None


def installations(wheel: Path, sdist: Path, pythons: list[str]) -> Iterator[tuple[str, ...]]:
    """Give each installation to try: its name, its interpreter, what to install, how it is used, and its extra."""
    for python in pythons:
        yield f"wheel, {version_of(python)}", python, str(wheel), "import aiokv"
    yield f"sdist, {version_of(pythons[0])}", pythons[0], str(sdist), "import aiokv"
    for extra, use in sorted(USES.items()):
        yield f"wheel[{extra}], {version_of(pythons[0])}", pythons[0], f"{wheel}[{extra}]", use, extra


def version_of(python: str) -> str:
    return subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    """Build, install and use."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pythons", nargs="*", help="further interpreters (default: the one that runs this)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="put the wheel and the sdist there")
    options = parser.parse_args()
    extras = set(PROJECT["optional-dependencies"])
    if unknown := (extras - OWN) ^ set(USES):
        print(f"an extra without a use here, or a use without an extra: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        wheel, sdist = build(Path(folder))
        check_contents(wheel, sdist)
        tried = list(installations(wheel, sdist, [sys.executable, *options.pythons]))
        failed = 0
        with ThreadPoolExecutor(2) as pool:
            outcomes = pool.map(lambda one: try_installation(*one[1:]), tried)
            for number, ((name, *_), problem) in enumerate(zip(tried, outcomes, strict=True), 1):
                print(f"[{number}/{len(tried)}] {name}: {problem or 'works'}", flush=True)
                failed += problem is not None
        if options.keep is not None:
            options.keep.mkdir(parents=True, exist_ok=True)
            for path in (wheel, sdist):
                shutil.copy2(path, options.keep)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
