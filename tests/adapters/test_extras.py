"""An adapter without the package that it adapts to says how to get it, and no other module needs that package."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import clean_environment

MISSING = {
    "aiocache": ("aiocache", "aiokv.adapters.aiocache"),
    "cashews": ("cashews", "aiokv.adapters.cashews"),
    "langchain": ("langchain_core", "aiokv.adapters.langchain"),
    "litestar": ("litestar", "aiokv.adapters.litestar"),
    "prometheus": ("prometheus_client", "aiokv.adapters.prometheus"),
    "py-key-value": ("key_value", "aiokv.adapters.py_key_value_store"),
}


def run(code: str, home: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean_environment(home), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("extra", MISSING)
def test_adapter_without_its_package_names_the_extra(tmp_path: Path, extra: str) -> None:
    package, module = MISSING[extra]
    code = f"import sys; sys.modules[{package!r}] = None\ntry: import {module}\nexcept ImportError as error: print(error)"
    assert run(code, tmp_path).strip().endswith(f"pip install 'aiokv[{extra}]'")


def test_cached_route_without_fastapi_names_the_extra(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["fastapi"] = None
from aiokv.adapters.fastapi import ResponseCache, cached_route
ResponseCache(print)
try: cached_route()
except ImportError as error: print(error)
"""
    assert run(code, tmp_path).strip().endswith("pip install 'aiokv[fastapi]'")


def test_package_alone_loads_none_of_them(tmp_path: Path) -> None:
    packages = ["aiocache", "cashews", "fastapi", "key_value", "langchain_core", "litestar", "prometheus_client"]
    code = f"import sys, aiokv; aiokv.kv_cached; print([name for name in {packages} if name in sys.modules])"
    assert run(code, tmp_path) == "[]\n"
