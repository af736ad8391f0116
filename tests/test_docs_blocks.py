"""Every code block of the documents runs, and prints what they show; what cannot run is listed here."""

import contextlib
import json
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import (
    BLOCKS,
    PAGES,
    PYTEST_PLUGINS,
    Block,
    Programs,
    blocks_of,
    harmful_word,
    matches,
    printed_by,
    programs,
    run_session,
)
from helpers import REPOSITORY, clean_environment

PYTHON = [block for block in BLOCKS if block.language == "python" and block.is_run]
SHELL_PAGES = sorted({block.page for block in BLOCKS if block.language in {"bash", "sh", "console"} and block.is_run})
# By page: what needs a service, a secret or a machine that tests have not, and the pages whose commands another test runs.
NOT_RUN = {
    "CONTRIBUTING.md": 1,
    "docs/accounts.md": 1,
    "docs/adapters.md": 1,
    "docs/getting-started.md": 1,
    "docs/recipes.md": 1,
    "docs/scale.md": 1,
    "docs/service.md": 4,
    "examples/deploy/README.md": 2,
    "examples/plugin/README.md": 2,
    "examples/testing/README.md": 1,
}
RUN_BY_ANOTHER_TEST = {"docs/command-line.md", "docs/protocol.md"}
LANGUAGES = {"", "bash", "console", "html", "ini", "json", "nginx", "promql", "python", "sh", "text", "toml", "yaml"}


def run_pytest(folder: Path, *arguments: str) -> str:
    """Run pytest as its user does, with warnings as errors; return what it says."""
    options = ["-q", "-W", "error", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto"]
    options += ["-o", "asyncio_default_fixture_loop_scope=function", *PYTEST_PLUGINS]
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-m", "pytest", *options, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
        env={**clean_environment(folder), "PYTHONPATH": str(REPOSITORY), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def started_programs() -> Iterator[Programs]:
    yield from programs()


@pytest.mark.parametrize("block", [block for block in PYTHON if not block.holds_tests], ids=str)
def test_program_of_the_documents_runs(block: Block, started_programs: Programs, tmp_path: Path) -> None:
    output, errors = started_programs.run(block.text, tmp_path, block.mark)
    assert errors == ""
    expected = printed_by(block)
    assert expected is None or matches(expected, output), output


def test_first_code_of_the_readme_prints_what_its_comments_say(started_programs: Programs, tmp_path: Path) -> None:
    output, _ = started_programs.run(blocks_of(REPOSITORY / "README.md")[0].text, tmp_path)
    assert output == "3 °C, rain\n{'oslo': '3 °C, rain', 'bergen': None}\n"


@pytest.mark.slow
def test_tests_of_the_documents_pass(tmp_path: Path) -> None:
    blocks = [block for block in PYTHON if block.holds_tests]
    for number, block in enumerate(blocks):
        (tmp_path / f"test_block_{number}.py").write_text(block.text, encoding="utf-8")
        for other in blocks_of(REPOSITORY / block.page):
            if other.title.endswith(".py"):
                (tmp_path / other.title).write_text(other.text, encoding="utf-8")
    output = run_pytest(tmp_path, *(f"test_block_{number}.py" for number in range(len(blocks))))
    assert re.search(r"^\d+ passed", output, re.MULTILINE), output


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("page", [page for page in SHELL_PAGES if page not in RUN_BY_ANOTHER_TEST])
def test_commands_of_the_documents_print_what_they_show(page: str, tmp_path: Path) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    assert run_session(blocks_of(REPOSITORY / page), tmp_path, port) == []


def test_data_of_the_documents_can_be_read() -> None:
    for block in BLOCKS:
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "toml":
            tomllib.loads(block.text)


def test_blocks_that_do_not_run_are_these() -> None:
    found: dict[str, int] = {}
    for block in BLOCKS:
        if not block.is_run:
            found[block.page] = found.get(block.page, 0) + 1
    assert found == NOT_RUN


def test_every_block_says_its_language_and_nothing_that_a_site_cannot_show() -> None:
    odd = [str(block) for block in BLOCKS if not re.fullmatch(r'( title="[\w./-]+")?', block.info)]
    assert odd == []
    assert {block.language for block in BLOCKS} <= LANGUAGES


def test_every_fence_of_every_page_is_a_block() -> None:
    for page in PAGES:
        fences = re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(blocks_of(page)), page


def test_extras_that_the_documents_install_exist() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for page in PAGES:
        for extras in re.findall(r"aiokv\[([\w,-]+)\]", page.read_text(encoding="utf-8")):
            assert set(extras.split(",")) <= project["optional-dependencies"].keys(), (page, extras)


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("aiokv get weather oslo | grep rain > out 2>/dev/null", None),
        ("export AIOKV_URL=sqlite:///kv.db  # a file", None),
        ("KEY=a:b curl -s http://127.0.0.1:8787/readyz && echo 'a; rm b'", None),
        ("echo a; rm -rf b", "rm"),
        ("aiokv get weather oslo \\\n  && useradd eve", "useradd"),
        ("echo a > /etc/aiokv", "/etc/aiokv"),
        ("cat ~/.ssh/id", "~/.ssh/id"),
        ("sudo -u eve aiokv serve", "sudo"),
        ("A=1 sudo aiokv serve", "sudo"),
        ('echo "$(rm b)"', "a command within a command"),
        ("echo `rm b`", "a command within a command"),
    ],
)
def test_command_of_a_document_is_run_where_it_stays_in_its_folder(command: str, word: str | None) -> None:
    assert harmful_word(command) == word
