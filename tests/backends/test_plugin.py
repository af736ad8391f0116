"""The example of a plug-in: once installed, its scheme is known and its backend keeps the contract."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import REPOSITORY, clean_environment

PLUGIN = REPOSITORY / "examples" / "plugin"


def install(target: Path) -> None:
    """Put the package where pip would, with what it writes: no build backend need be there."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))
    for name in project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]:
        shutil.copy(PLUGIN / name, target)
    metadata = project["project"]
    info = target / f"{metadata['name'].replace('-', '_')}-{metadata['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {metadata['name']}\nVersion: {metadata['version']}\n")
    lines = [
        line
        for group, entries in metadata["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))


def run(arguments: list[str], folder: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    environment = {**clean_environment(folder), "PYTHONPATH": os.pathsep.join(map(str, (*paths, REPOSITORY)))}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_installed_plugin_keeps_the_contract(tmp_path: Path) -> None:
    target, project = tmp_path / "installed", tmp_path / "project"
    target.mkdir()
    install(target)
    shutil.copytree(PLUGIN, project, ignore=shutil.ignore_patterns("aiokv_jsonfile.py", "__pycache__", ".*"))
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider"], project, target)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 90


def test_installed_plugin_is_known_to_the_command_line(tmp_path: Path) -> None:
    target, home = tmp_path / "installed", tmp_path / "home"
    target.mkdir()
    home.mkdir()
    install(target)
    url = ["--url", f"jsonfile:///{home}/kv.json"]
    assert run(["-m", "aiokv", "set", *url, "weather", "oslo", "rain"], home, target).returncode == 0
    assert run(["-m", "aiokv", "get", *url, "weather", "oslo"], home, target).stdout.strip() == "rain"
    unknown = run(["-m", "aiokv", "get", *url, "weather", "oslo"], home)
    assert (unknown.returncode != 0, "unknown scheme 'jsonfile'" in unknown.stderr) == (True, True)
