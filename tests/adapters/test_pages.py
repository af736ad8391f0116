"""The programs on the pages about adapters run, each alone, without a warning."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import REPOSITORY, clean_environment

PAGES = ("adapters.md", "fastapi.md", "metrics.md")
# What a program imports, and the package that it needs for that.
NEEDED = {name: name for name in ("aiocache", "cashews", "fastapi", "key_value", "litestar", "prometheus_client")} | {
    "aiokv.adapters.langchain": "langchain_core",
    "aiokv.adapters.py_key_value_store": "key_value",
    "httpx": "httpx",
    "opentelemetry.sdk": "opentelemetry",
}
OUTPUTS = {
    "KVCache": "computed\n{'city': 'Oslo', 'sky': 'rain'}\n",
    "adapters.cashews": "computed\n['Oslo', 'rain']\n",
    "KVLitestarStore": "rain\n",
    "KVByteStore": "[b'\\x00\\x01', b'text', None]\n['a']\n",
    "KVKeyValueStore": "({'scopes': ['read']}, TTL)\n['token-1']\n",
    "from_key_value": "3 °C, rain\n",
    "JSONResponse": "hello\n{'city': 'oslo', 'sky': 'rain'}\n",
    "cached_route": (
        "computed\n{'city': 'oslo', 'sky': 'rain'} "
        "{'age': '0', 'cache-control': 'max-age=60', 'vary': 'accept-language'}\n304 2\n"
    ),
    "PrometheusMetrics": None,
    "OpenTelemetryObserver": "['set weather', 'get weather']\n",
}
TEXTS = [(REPOSITORY / "docs" / page).read_text(encoding="utf-8") for page in PAGES]
# Without those for pytest.
BLOCKS = [
    block
    for text in TEXTS
    for block in re.findall(r"```python[^\n]*\n(.*?)```", text, re.DOTALL)
    if "\nasync def test_" not in block
]


def test_each_program_is_looked_at() -> None:
    assert len(BLOCKS) == len(OUTPUTS)
    assert all(sum(name in block for block in BLOCKS) == 1 for name in OUTPUTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTPUTS)
def test_program_prints_what_it_should(tmp_path: Path, name: str) -> None:
    (block,) = (block for block in BLOCKS if name in block)
    for name_imported, package in NEEDED.items():
        if re.search(rf"^(from|import) {re.escape(name_imported)}\b", block, re.MULTILINE) and find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'aiokv[dev]'")
    environment = {
        **clean_environment(tmp_path),
        "AIOKV_URL": f"sqlite:///{tmp_path}/kv.db",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", block], env=environment, capture_output=True, text=True, check=False
    )
    # On a busy machine asyncio's debug mode logs steps that took long.
    errors = [line for line in done.stderr.splitlines() if not re.match(r"Executing <.*> took [\d.]+ seconds$", line)]
    assert (done.returncode, errors) == (0, [])
    output = OUTPUTS[name]
    if output is None:
        assert 'outcome="near_hit"} 2.0' in done.stdout
    else:
        assert re.fullmatch(re.escape(output).replace("TTL", r"(29\.\d+|30\.0)"), done.stdout)
