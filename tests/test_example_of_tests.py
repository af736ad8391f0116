"""The sample project of tests, installed and run as its reader would."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import REPOSITORY, clean_environment

PROJECT = REPOSITORY / "examples" / "testing"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_installed_project_passes_its_tests(tmp_path: Path) -> None:
    installed, copy, home = tmp_path / "installed", tmp_path / "project", tmp_path / "home"
    installed.mkdir()
    home.mkdir()
    # What pip would put there, without asking an index for its build backend.
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    for name in project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]:
        shutil.copy(PROJECT / name, installed)
    shutil.copytree(PROJECT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "pyproject.toml", copy)
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=copy,
        env={**clean_environment(home), "PYTHONPATH": os.pathsep.join([str(installed), str(REPOSITORY)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert passed is not None, done.stdout
    assert int(passed[1]) > 60
