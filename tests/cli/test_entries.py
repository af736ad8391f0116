"""`aiokv ttl`, `list` and `clear`, and values from standard input, as a person calls them."""

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import clean_environment

from aiokv import AsyncKVStore, cli, clock
from aiokv.cli.terminal import printable

URL = "sqlite:///kv.db"


def run(*arguments: str, folder: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aiokv", *arguments, "--url", URL],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=clean_environment(folder),
    )


async def fill(folder: Path, *keys: str) -> None:
    async with AsyncKVStore("db", url=f"sqlite:///{folder}/kv.db") as store:
        await store.set_many(dict.fromkeys(keys, "héllo"), 100)


def test_hyphen_stands_for_standard_input(tmp_path: Path) -> None:
    assert run("set", "db", "k", "-", folder=tmp_path, stdin="piped").returncode == 0
    assert run("get", "db", "k", folder=tmp_path).stdout == "piped"


async def test_ttl_is_that_of_the_key_and_not_of_one_that_begins_with_it(tmp_path: Path) -> None:
    await fill(tmp_path, "key", "key2")
    done = run("ttl", "db", "key", folder=tmp_path)
    assert done.returncode == 0
    assert 60 < int(done.stdout) <= 100
    absent = run("ttl", "db", "ke", folder=tmp_path)
    assert (absent.returncode, absent.stdout) == (1, "")
    assert "no key 'ke'" in absent.stderr


async def test_listing_shows_each_key_on_a_line_and_obeys_none(tmp_path: Path) -> None:
    await fill(tmp_path, "a", "b\n\x1b[2J", "back\\slash", "other")
    done = run("list", "db", "b", folder=tmp_path)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [(key, size) for key, _, size in rows] == [("b\\n\\x1b[2J", "6"), ("back\\\\slash", "6")]
    assert all(0 < int(left) <= 100 for _, left, _ in rows)
    lines = [json.loads(line) for line in run("list", "db", "--json", folder=tmp_path).stdout.splitlines()]
    assert {line["key"] for line in lines} == {"a", "b\n\x1b[2J", "back\\slash", "other"}
    assert {line["bytes"] for line in lines} == {6}


async def test_clear_deletes_what_begins_with_the_prefix_and_asks_before(tmp_path: Path) -> None:
    await fill(tmp_path, "user:1", "user:2", "page")
    refused = run("clear", "db", folder=tmp_path, stdin="y\n")
    assert refused.returncode == 2
    assert "add --yes" in refused.stderr
    done = run("clear", "db", "user:", "--yes", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "aiokv: deleted 2 entries\n")
    assert run("list", "db", folder=tmp_path).stdout.startswith("page\t")


@pytest.mark.parametrize(("answer", "left"), [(b"n\n", "page\t"), (b"y\n", "")])
def test_clear_on_a_terminal_does_as_it_is_answered(tmp_path: Path, answer: bytes, left: str) -> None:
    asyncio.run(fill(tmp_path, "page"))
    ours, theirs = pty.openpty()
    try:
        os.write(ours, answer)
        done = subprocess.run(
            [sys.executable, "-m", "aiokv", "clear", "db", "--url", URL],
            stdin=theirs,
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**clean_environment(tmp_path), "TERM": "xterm"},
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0
    assert "Delete 1 entry of db? [y/N]" in done.stderr
    assert run("list", "db", folder=tmp_path).stdout.startswith(left)
    assert bool(run("list", "db", folder=tmp_path).stdout) == bool(left)


def test_interrupt_at_the_question_of_clear_ends_it_at_once(tmp_path: Path) -> None:
    asyncio.run(fill(tmp_path, "page"))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "aiokv", "clear", "db", "--url", URL],
        stdin=theirs,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={**clean_environment(tmp_path), "TERM": "xterm"},
    )
    assert process.stderr is not None
    try:
        assert process.stderr.read(10) == b"Delete 1 e"
        # The question is written before the answer is waited for.
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
        assert b"Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        os.close(ours)
        os.close(theirs)
    assert run("list", "db", folder=tmp_path).stdout.startswith("page\t")


def test_text_for_a_terminal_is_one_line() -> None:
    assert printable("é 😀 x") == "é 😀 x"
    assert printable("a\u2028b\u202ec\td") == "a\\u2028b\\u202ec\\td"


def test_store_that_cannot_list_is_wrong_usage_and_others_are_named(tmp_path: Path) -> None:
    code = (
        "import sys; from aiokv import cli; from aiokv.backends import registry;"
        "from aiokv.backends.scheme import Scheme\n"
        "class Plain:\n"
        "    async def get(self, db_name, key): ...\n"
        "    async def set(self, db_name, key, value, ttl_seconds): ...\n"
        "    async def delete(self, db_name, key): ...\n"
        "    async def aclose(self): ...\n"
        "registry._SCHEMES['plain'] = Scheme(open=lambda url, _: Plain())\n"
        "sys.exit(cli.main(['list', 'db', '--url', 'plain://x']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=clean_environment(tmp_path)
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot list its keys; stores at sqlite:///" in done.stderr


def test_seconds_left_are_rounded_up_and_an_export_names_none_that_is_too_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    began = clock.now()
    monkeypatch.setattr(clock, "now", lambda: began)
    url, out = ("--url", "memory://left"), tmp_path / "out"
    assert cli.main(["set", "db", "k", "v", "--ttl", "100", *url]) == 0
    for passed, left, exported in ((15.5, "85\n", 85), (95.0, "5\n", 60)):
        monkeypatch.setattr(clock, "now", lambda: began + passed)  # noqa: B023 (called in this round)
        assert cli.main(["ttl", "db", "k", *url]) == 0
        assert capsys.readouterr().out == left
        assert cli.main(["export", "--db", "db", "-o", str(out), *url]) == 0
        assert json.loads(out.read_text()) == {"key": "k", "value": "v", "ttl": exported}
    monkeypatch.setattr(clock, "now", lambda: began + 101)
    assert cli.main(["ttl", "db", "k", *url]) == 1
    assert cli.main(["export", "--db", "db", "-o", str(out), *url]) == 0
    assert out.read_bytes() == b""
