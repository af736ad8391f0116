"""The code blocks of the documents, and how they are run."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from helpers import REPOSITORY, clean_environment

PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md")
    for path in REPOSITORY.glob(pattern)
    if not {".venv", "site"} & set(path.relative_to(REPOSITORY).parts)
)
# The others of this environment take longer to load than the documents' tests take to run.
PYTEST_PLUGINS = ("-p", "pytest_asyncio.plugin", "-p", "pytest_aiokv")
_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>no-run: [^>]+|prints|background|notebook) -->\n+)?"
    r"(?P<indent> *)```(?P<language>[a-z]*)(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
_TITLE = re.compile(r' title="([\w./-]+)"')
_SNIPPET = re.compile(r'^--8<-- "([^"]+)"\n', re.MULTILINE)
_MARK = "that-was-the-output"


@dataclass(frozen=True)
class Block:
    """A block of code in a document.

    Args:
        page: The document's path in the repository.
        line: The line of its fence, from 1.
        language: The word behind the fence.
        info: What stands behind that word.
        title: The file that it is to be written to, or "".
        mark: What the comment in front of it says: `no-run: <reason>`, `prints`, `background`, `notebook`, or "".
        text: The code.
    """

    page: str
    line: int
    language: str
    info: str
    title: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_run(self) -> bool:
        """Whether nothing says that it cannot be run."""
        return not self.mark.startswith("no-run")

    @property
    def holds_tests(self) -> bool:
        """Whether it is for pytest."""
        return re.search(r"^(async )?def test_|^    (async )?def test_|^class Test", self.text, re.MULTILINE) is not None


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a document, in their order."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for found in _FENCE.finditer(text):
        lines = [line.removeprefix(found["indent"]) for line in found["text"].splitlines(keepends=True)]
        title = _TITLE.search(found["info"])
        code = _SNIPPET.sub(lambda name: (REPOSITORY / name[1]).read_text(encoding="utf-8"), "".join(lines))
        line = text.count("\n", 0, found.start("language")) + 1
        name = str(page.relative_to(REPOSITORY))
        blocks.append(Block(name, line, found["language"], found["info"], title[1] if title else "", found["mark"] or "", code))
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def printed_by(block: Block) -> str | None:
    """Return what a document says that a block prints, or None."""
    position = BLOCKS.index(block) + 1
    following = BLOCKS[position] if position < len(BLOCKS) else None
    return following.text if following and following.page == block.page and following.mark == "prints" else None


def matches(expected: str, output: str) -> bool:
    """Compare an output with what a document shows, where `...` stands for anything."""
    pattern = ".*?".join(re.escape(part) for part in expected.strip().split("..."))
    return re.fullmatch(pattern, output.strip(), re.DOTALL) is not None


class Programs:
    """A process that has the packages loaded, and runs each program in a fork of itself."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-X", "dev", "-W", "error", str(Path(__file__).with_name("document_programs.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def run(self, text: str, folder: Path, mark: str = "") -> tuple[str, str]:
        """Run a program in a folder.

        Args:
            text: The program.
            folder: The folder; the program is written there as `block.py`.
            mark: `notebook` where it may await outside of functions.

        Returns:
            What it printed, and what it wrote to standard error, with its exit status where that is not 0.
        """
        path = folder / "block.py"
        path.write_text(text, encoding="utf-8")
        environment = {
            **clean_environment(folder),
            "AIOKV_URL": f"sqlite:///{folder}/kv.db",
            "PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)]),
        }
        request = {"path": str(path), "folder": str(folder), "is_notebook": mark == "notebook", "environment": environment}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        output, errors = ((folder / name).read_text(encoding="utf-8") for name in ("out", "err"))
        # On a busy machine asyncio's debug mode logs steps that took long.
        errors = re.sub(r"^Executing <.*> took [\d.]+ seconds\n", "", errors, flags=re.MULTILINE)
        return output, errors + (f"exit status {status}" if status else "")


def programs() -> Iterator[Programs]:
    """Start the process for programs, and end it behind the last test."""
    with closing(Programs()) as started:
        yield started


def commands_of(block: Block) -> list[tuple[str, str | None]]:
    """Return the commands of a block for a shell, each with the output that it shows; None where it shows none."""
    if block.language in {"bash", "sh"}:
        return [(block.text, None)]
    commands: list[tuple[str, str | None]] = []
    for chunk in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        lines = chunk.splitlines()
        # A command goes on behind a backslash at its line's end.
        size = 1 + next(index for index, line in enumerate(lines) if not line.endswith("\\"))
        commands.append(("\n".join(lines[:size]), "\n".join(lines[size:])))
    return commands


def without_installs(command: str) -> str:
    """Leave out the lines of a command that install packages, or make what takes long."""
    return "\n".join(line for line in command.splitlines() if not re.match(r"(python\S* -m )?(pip|pipx|uv) |make ", line))


# Commands of documents run on the machine of whoever runs the tests: only these do, and only in the folder of the test.
_HARMLESS = {
    "aiokv",
    "python",
    "pytest",
    "export",
    "cat",
    "echo",
    "printf",
    "curl",
    "sleep",
    "sed",
    "head",
    "grep",
    "wc",
    "sort",
}
_SHELL_SIGNS = {"|", "||", "&", "&&", ";", "(", ")", "\n"}


def harmful_word(command: str) -> str | None:
    """Return what a command for a shell runs, writes or reads beyond its folder, or None."""
    if "$(" in command or "`" in command:
        return "a command within a command"
    for line in command.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        is_first = True
        for word in words:
            if word in _SHELL_SIGNS:
                is_first = True
            elif word.startswith(("/", "~")) and word != "/dev/null":
                return word
            elif is_first and not re.match(r"\w+=", word):
                if word not in _HARMLESS:
                    return word
                is_first = False
    return None


def run_session(blocks: list[Block], folder: Path, port: int) -> list[tuple[Block, str, str, str]]:
    """Run all blocks for a shell of one document in one shell; write its files before.

    Args:
        blocks: The blocks, in their order.
        folder: An empty folder.
        port: A free port, in place of 8787.

    Returns:
        Each command that did what the document does not show: its block, the command, what is shown, what was seen.
    """
    programs_folder = folder / ".bin"
    programs_folder.mkdir()
    for name, words in {"python": [], "aiokv": ["-m", "aiokv"], "pytest": ["-m", "pytest", *PYTEST_PLUGINS]}.items():
        program = programs_folder / name
        program.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, *words])} "$@"\n')
        program.chmod(0o755)
    script, expected = _script_of(blocks)
    with subprocess.Popen(
        ["bash", "-c", script.replace("8787", str(port))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        start_new_session=True,
        env={
            **clean_environment(folder),
            "PATH": f"{programs_folder}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONDONTWRITEBYTECODE": "1",
            "AIOKV_SERVE_PORT": str(port),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "COLUMNS": "100",
        },
    ) as shell:
        try:
            printed, _ = shell.communicate(timeout=50)
        except subprocess.TimeoutExpired as late:
            printed = (late.output or b"").decode()
        finally:
            # What it left in the background, too.
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
    parts = re.split(rf"\n?{_MARK} (\d+)\n", printed.replace(str(port), "8787"))
    outputs = list(zip(parts[::2], parts[1::2], strict=False))
    outputs += [(parts[-1], "not run")] * (len(expected) - len(outputs))
    return [
        (block, command, shown or "", f"{output.strip()} [status {status}]")
        for (block, command, shown), (output, status) in zip(expected, outputs, strict=True)
        if not (status == "0" if shown is None else matches(shown, output) and status != "not run")
    ]


def _script_of(blocks: list[Block]) -> tuple[str, list[tuple[Block, str, str | None]]]:
    """Return the script of a document, and the commands whose outputs it marks, with the outputs that are shown."""
    script: list[str] = []
    expected: list[tuple[Block, str, str | None]] = []
    for block in blocks:
        if block.title:
            script.append(f"mkdir -p $(dirname {block.title}); cat > {block.title} <<'end-of-file'\n{block.text}end-of-file")
        if block.language not in {"bash", "sh", "console"} or not block.is_run:
            continue
        for command, shown in commands_of(block):
            runnable = without_installs(command)
            harm = harmful_word(runnable)
            assert harm is None, f"{block}: tests do not run {harm!r}; put <!-- no-run: reason --> in front of the block"
            if block.mark == "background":
                script.append(f"{{\n{runnable.strip()}\n}} > .background 2>&1 &")
                script.append("for _ in $(seq 200); do grep -q ' at http' .background && break; sleep 0.05; done")
            elif runnable.strip():
                script += [runnable, f"printf '\\n{_MARK} %s\\n' $?"]
                expected.append((block, command, shown))
    return "\n".join(script), expected
