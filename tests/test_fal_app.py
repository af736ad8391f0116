"""The example for fal: loaded by the real `fal` as `fal run` loads it, shipped as it ships, and served by its own server."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from helpers import REPOSITORY, clean_environment

EXAMPLES = REPOSITORY / "examples"

SHIP = """
from fal.api.api import FalServerlessHost, _prepare_partial_func
from fal.utils import load_function_from
from isolate.connections.common import serialize_object

loaded = load_function_from(FalServerlessHost(), "fal_app.py", "Translator")
print(loaded.app_name, len(serialize_object("cloudpickle", _prepare_partial_func(loaded.function.func))) > 0)
"""

SERVE = """
import asyncio, sys
from fal_app import Translator

asyncio.run(Translator(_allow_init=True).serve(port=int(sys.argv[1]), metrics_port=int(sys.argv[2])))
"""


@pytest.fixture(autouse=True)
def _fal() -> None:
    pytest.importorskip("fal", reason="fal is not installed: pip install 'aiokv[dev]'")


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_fal_loads_and_ships_the_app(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHIP], cwd=EXAMPLES, env=clean_environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "translator True\n"), done.stderr


@pytest.mark.slow
@pytest.mark.timeout(60)
async def test_two_runners_compute_each_text_once(tmp_path: Path, unused_tcp_port_factory: Callable[[], int]) -> None:
    environment = {
        **clean_environment(tmp_path),
        "AIOKV_URL": f"sqlite:///{tmp_path}/kv.db",
        "PYTHONPATH": f"{REPOSITORY}:{EXAMPLES}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    ports = [(unused_tcp_port_factory(), unused_tcp_port_factory()) for _ in range(2)]
    runners = [
        subprocess.Popen([sys.executable, "-c", SERVE, *map(str, pair)], env=environment, stderr=subprocess.DEVNULL)
        for pair in ports
    ]
    try:
        async with aiohttp.ClientSession() as session:
            answers = []
            for port, _ in ports:
                url = f"http://127.0.0.1:{port}/"
                deadline = time.monotonic() + 40
                while True:
                    try:
                        async with session.post(url, json={"text": "rain and snow"}) as answer:
                            answers.append((answer.status, await answer.json()))
                        break
                    except aiohttp.ClientConnectorError:
                        assert time.monotonic() < deadline
                        await asyncio.sleep(0.1)
                async with session.post(f"{url}info") as answer:
                    answers.append((answer.status, await answer.json()))
    finally:
        for runner in runners:
            runner.terminate()
        for runner in runners:
            try:
                await asyncio.to_thread(runner.wait, 10)
            except subprocess.TimeoutExpired:
                runner.kill()
                runner.wait()
    translation = answers[0]
    assert translation[0] == 200
    assert translation[1]["text"] == "regn and snø"
    assert answers == [
        translation,
        (200, {"computations": 1, "hits": 0}),
        translation,
        (200, {"computations": 0, "hits": 1}),
    ]
