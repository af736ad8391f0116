"""What is said where the packages of the server are not installed."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import clean_environment

HINT = "needs packages that are not installed (httptools): pip install 'aiokv[server]'"


def run_without(package: str, script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in which a package cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules[{package!r}] = None; {script}"],
        capture_output=True,
        text=True,
        cwd=folder,
        env=clean_environment(folder),
        check=False,
    )


@pytest.mark.parametrize("package", ["httptools", "jwt", "prometheus_client"])
def test_command_names_the_command_that_adds_them(package: str, tmp_path: Path) -> None:
    done = run_without(package, "from aiokv.cli import main; sys.exit(main(['serve', '--port', '0']))", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"aiokv: aiokv serve {HINT.replace('httptools', package)}\n"


def test_help_needs_none_of_them(tmp_path: Path) -> None:
    done = run_without("httptools", "from aiokv.cli import main; main(['serve', '--help'])", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--max-connections" in done.stdout


def test_fixture_names_the_command_that_adds_them(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(kv_server):\n    pass\n")
    done = run_without("httptools", "import pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider']))", tmp_path)
    assert done.returncode == 1
    assert f"the fixture kv_server {HINT}" in done.stdout


def test_tools_that_need_no_server_work_and_the_other_names_the_command(tmp_path: Path) -> None:
    script = """
from aiokv.testing import FaultProxy, Reply
try:
    from aiokv.testing import ScriptedService
except Exception as error:
    print(error)
"""
    done = run_without("httptools", f"exec({script!r})", tmp_path)
    assert done.stdout == f"aiokv.testing.ScriptedService {HINT}\n"
