"""The commands of docs/protocol.md do what the page shows, and its numbers are those of the code."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import REPOSITORY, clean_environment, served_process

from aiokv.backends.capabilities import MAX_BATCH_KEYS, MAX_CLAIM_SECONDS, MIN_CLAIM_SECONDS
from aiokv.backends.watching import HEARTBEAT_SECONDS
from aiokv.batch_wire import MAX_BATCH_BODY_BYTES
from aiokv.extension_wire import EXTENSIONS_HEADER

PAGE = (REPOSITORY / "docs" / "protocol.md").read_text(encoding="utf-8")
EXAMPLES = [
    (command.strip(), expected)
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
]


@pytest.mark.slow
def test_commands_print_what_the_page_shows(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    assert len(EXAMPLES) == 10
    with served_process("--store", "memory://", home=tmp_path) as (_, address):
        environment = {**clean_environment(tmp_path), "URL": address}
        for command, expected in EXAMPLES:
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=False)
            # curl ends an answer without a line end.
            assert done.stdout.rstrip("\n") == expected.rstrip("\n"), command


def test_numbers_of_the_page_are_those_of_the_code() -> None:
    assert PAGE.count(f"{MAX_BATCH_BODY_BYTES:,} bytes") == 2
    assert f"1 to {MAX_BATCH_KEYS:,} keys" in PAGE
    assert f"({MIN_CLAIM_SECONDS:.0f} to {MAX_CLAIM_SECONDS:,.0f}," in PAGE
    assert f"every {HEARTBEAT_SECONDS:.0f} seconds" in PAGE
    assert f"{EXTENSIONS_HEADER}: batch, scan, claims, renew, watch" in PAGE
