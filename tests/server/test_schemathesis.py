"""Requests made up from `/openapi.json`: the document says what the server does, and nothing breaks it.

The suite sends a few hundred. More than 5,000, in some minutes:

    AIOKV_EXAMPLES=1200 python -m pytest tests/server/test_schemathesis.py --timeout 1800
"""

import asyncio
import os
import re
import sys
from pathlib import Path

import orjson
import pytest
from helpers import clean_environment, served_process
from server_clients import connected, head

from aiokv.server.access_file import add_key

EXAMPLES = int(os.environ.get("AIOKV_EXAMPLES", "8"))


# That a cursor is one of this store's cannot be said in a schema; and a namespace that was cleared can still be listed.
CONFIGURATION = """
[[operations]]
include-name = "GET /keys/{db_name}"
checks.positive_data_acceptance.enabled = false
checks.use_after_free.enabled = false

[[operations]]
include-name = "DELETE /keys/{db_name}"
checks.positive_data_acceptance.enabled = false
"""


async def checked(home: Path, address: str, *arguments: str) -> str:
    """Run schemathesis; return what it printed."""
    command = ("-m", "schemathesis.cli", "run", f"{address}/openapi.json", "--max-examples", str(EXAMPLES), "--no-color")
    (home / "schemathesis.toml").write_text(CONFIGURATION)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        # A watch has no end.
        *("--seed", "1", "--generation-database", "none", "--exclude-path-regex", "^/watch/", *arguments),
        cwd=home,
        env=clean_environment(home),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    printed = (await process.communicate())[0].decode()
    assert process.returncode == 0, printed
    return printed


async def token_of(address: str, key: str) -> str:
    async with connected(address) as client:
        answer = await client.ask(head("POST", "/storage/auth/token", f"Authorization: Key {key}", "Content-Length: 0"))
    return str(orjson.loads(answer.body)["token"])


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("has_accounts", [False, True])
async def test_server_and_its_description_agree(tmp_path: Path, *, has_accounts: bool) -> None:
    pytest.importorskip("schemathesis", reason="pip install schemathesis")
    arguments, credentials, key = ["--store", f"sqlite:///{tmp_path}/kv.db"], [], ""
    if has_accounts:
        key = add_key(tmp_path / "access", "alice")
        arguments += ["--access-file", str(tmp_path / "access")]
    with served_process(*arguments, home=tmp_path) as (process, address):
        if has_accounts:
            credentials = ["--header", f"Authorization: Bearer {await token_of(address, key)}"]
        printed = await checked(tmp_path, address, *credentials)
        sent = re.search(r"(\d+) generated", printed)
        assert sent is not None
        assert int(sent[1]) > 5 * EXAMPLES
        async with connected(address) as client:
            assert (await client.ask(head("GET", "/readyz"))).status == 200
        process.terminate()
        assert process.stderr is not None
        log = process.stderr.read()
        assert "Traceback" not in log
        assert "internal error" not in log
