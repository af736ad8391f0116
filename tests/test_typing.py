"""The public types, as type checkers see them."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

pytest.importorskip("mypy", reason="mypy is not installed: pip install 'aiokv[dev]'")
pytest.importorskip("pyright", reason="pyright is not installed: pip install 'aiokv[dev]'")

TODAY = ["tests/typing/cached.py", "tests/typing/unusual.py"]
NEWER = ["tests/typing/newer.py"]
MYPY = ["mypy", "--strict", "--warn-unused-ignores", "--no-incremental"]
# Mypy reads the syntax of the interpreter that it runs on.
reads_newer = pytest.mark.skipif(sys.version_info < (3, 12), reason="type parameters came with Python 3.12")


@pytest.mark.parametrize(
    "checker",
    [
        pytest.param([*MYPY, *TODAY], id="mypy"),
        pytest.param([*MYPY, "--python-version", "3.12", *NEWER], id="mypy-3.12", marks=reads_newer),
        pytest.param(["pyright", *TODAY], id="pyright"),
        pytest.param(["pyright", "--pythonversion", "3.12", *NEWER], id="pyright-3.12"),
    ],
)
@pytest.mark.slow
@pytest.mark.timeout(60)
def test_assertions_about_types_hold(checker: list[str]) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name(checker[0])), *checker[1:]],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
