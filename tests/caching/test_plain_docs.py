"""The code in the page about plain functions runs, alone and without a warning."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, clean_environment

BLOCKS = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "plain-functions.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_of_the_page_runs(number: int, tmp_path: Path) -> None:
    environment = {**clean_environment(tmp_path), "AIOKV_URL": f"sqlite:///{tmp_path}/kv.db"}
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", BLOCKS[number]],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
