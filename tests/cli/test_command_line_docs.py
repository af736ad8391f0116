"""The page on the command line: its program runs, and it leaves out no command."""

import re
import subprocess
import sys
from pathlib import Path

from helpers import REPOSITORY, clean_environment

from aiokv import cli

PAGE = (REPOSITORY / "docs" / "command-line.md").read_text(encoding="utf-8")


def test_programs_of_the_page_run(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", block],
        capture_output=True,
        text=True,
        check=False,
        env=clean_environment(tmp_path),
    )
    assert (done.returncode, done.stdout) == (0, "111 keys begin with user:49\n"), done.stderr


def test_page_names_every_command_and_option() -> None:
    for name in cli._COMMANDS:
        assert f"`{name}" in PAGE
    for name in ("import", "export", "ping", "bench", "top", "list", "clear"):
        action = next(action for action in cli.make_parser(name)._actions if action.choices and name in action.choices)
        assert isinstance(action.choices, dict)
        for option in action.choices[name]._option_string_actions:
            if option.startswith("--") and option not in {"--help", "--url", "--output"}:
                assert option in PAGE, f"{name} {option}"
