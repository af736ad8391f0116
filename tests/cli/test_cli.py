"""The command line, run as a person runs it."""

import errno
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import REPOSITORY, clean_environment, served_process

from aiokv import cli


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def aiokv(*arguments: str, home: Path, stdin: bytes = b"", **environment: str) -> tuple[int, bytes, str]:
    done = subprocess.run(
        [sys.executable, "-m", "aiokv", *arguments],
        input=stdin,
        capture_output=True,
        env={**clean_environment(home), **environment},
        cwd=home,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr.decode()


def test_value_set_from_the_shell_is_got_and_deleted(home: Path) -> None:
    url = "sqlite:///kv.db"
    assert aiokv("set", "settings", "theme", "dark 😀", "--ttl", "60", "--url", url, home=home) == (0, b"", "")
    assert aiokv("get", "settings", "theme", home=home, AIOKV_URL=url) == (0, "dark 😀".encode(), "")
    assert aiokv("delete", "settings", "theme", "--url", url, home=home) == (0, b"", "")
    code, out, err = aiokv("get", "settings", "theme", "--url", url, home=home)
    assert (code, out) == (1, b"")
    assert "no key 'theme' in db 'settings'" in err


def test_value_from_standard_input_is_stored_byte_for_byte(home: Path) -> None:
    value = "line\n\0 é\n".encode()
    assert aiokv("set", "db", "k", "--url", "sqlite:///kv.db", home=home, stdin=value)[0] == 0
    assert aiokv("get", "db", "k", "--url", "sqlite:///kv.db", home=home)[1] == value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("set", "db", "k", "v", "--ttl", "59", "--url", "memory://"), "ttl must be from 60"),
        (("get", "a/b", "k", "--url", "memory://"), "db_name 'a/b' contains '/'"),
        (("get", "db", "k", "--url", "ftp://x"), "unknown scheme 'ftp'"),
        (("get", "db", "k"), "AIOKV_URL=sqlite:///kv.db"),
        (("set", "db", "k", "--url", "memory://"), "not UTF-8"),
        (("serve", "--port", "0", "--host", "0.0.0.0"), "binds to loopback only"),
        (("serve", "--port", "0", "--access-file", "absent"), "aiokv access add"),
        (("serve", "--port", "0", "--tls-key", "k.pem"), "--tls-key needs --tls-cert"),
        (("serve", "--port", "0", "--tls-cert", "c.pem"), "c.pem does not exist"),
        (("serve", "--port", "0", "--store", "sqlite:///absent/kv.db"), "absent does not exist; make it first"),
        (("access", "add", "a:b", "--access-file", "f"), "account must be"),
        (("access", "add", "alice"), "pass --access-file F, or set AIOKV_ACCESS_FILE"),
    ],
)
def test_what_cannot_work_fails_with_one_message_and_no_trace(home: Path, arguments: tuple[str, ...], words: str) -> None:
    code, out, err = aiokv(*arguments, home=home, stdin=b"\xff", AIOKV_TEST="1")
    assert (code, out) == (2, b"")
    assert words in err
    assert err.startswith("aiokv: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments", [("get", "db", "k"), ("set", "db", "k", "v"), ("list", "db"), ("ttl", "db", "k"), ("clear", "db", "--yes")]
)
def test_store_that_fails_has_a_status_of_its_own(home: Path, arguments: tuple[str, ...]) -> None:
    code, out, err = aiokv(*arguments, "--url", "http://127.0.0.1:1", home=home)
    assert (code, out) == (3, b"")
    assert "no connection" in err


@pytest.mark.parametrize(
    ("url", "variable"),
    [("http://id:secret-text@localhost", "AIOKV_KEY"), ("redis://:secret-text@localhost", "AIOKV_REDIS_PASSWORD")],
)
def test_secret_in_a_url_on_the_command_line_is_refused_and_not_repeated(home: Path, url: str, variable: str) -> None:
    code, out, err = aiokv("get", "db", "k", "--url", url, home=home)
    assert (code, out) == (2, b"")
    assert f"set {variable} in the environment" in err
    assert "secret-text" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve", "--min-free", "5M"), "unrecognized arguments: --min-free 5M; did you mean --min-free-bytes?"),
        (("get", "db", "k", "--zzz"), "unrecognized arguments: --zzz\n"),
    ],
)
def test_unknown_flags_are_refused_and_the_nearest_is_named(home: Path, arguments: tuple[str, ...], words: str) -> None:
    code, out, err = aiokv(*arguments, home=home)
    assert (code, out) == (2, b"")
    assert words in err


@pytest.mark.parametrize("command", [(), ("access", "add"), *((name,) for name in cli._COMMANDS)])
def test_help_explains_every_command(home: Path, command: tuple[str, ...]) -> None:
    code, out, _ = aiokv(*command, "--help", home=home)
    assert code == 0
    assert len(out) > 200
    assert b"aiokv" in out


@pytest.mark.parametrize(("command", "words"), [("get", "nowhere to write"), ("set", "standard input is closed")])
def test_closed_streams_are_failures_and_not_absence(home: Path, command: str, words: str) -> None:
    url = "sqlite:///kv.db"
    aiokv("set", "db", "k", "v", "--url", url, home=home)
    line = f'exec "{sys.executable}" -m aiokv {command} db k --url {url} <&- >&-'
    done = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, env=clean_environment(home), cwd=home, check=False)
    assert done.returncode == 2
    assert words in done.stderr.decode()


def test_output_that_cannot_be_written_is_a_failure(home: Path) -> None:
    aiokv("set", "db", "k", "v", "--url", "sqlite:///kv.db", home=home)
    line = f'exec "{sys.executable}" -m aiokv get db k --url sqlite:///kv.db >/dev/full'
    done = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, env=clean_environment(home), cwd=home, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith(b"aiokv: standard output: No space left on device; make room")


def test_value_too_large_is_refused_from_standard_input_too(home: Path) -> None:
    code, _, err = aiokv("set", "db", "k", "--url", "memory://", home=home, stdin=b"\xc3\xa9" * 2_000_000)
    assert code == 2
    assert "over the limit" in err


def test_port_that_is_taken_is_named(home: Path) -> None:
    with served_process("--store", "memory://", home=home) as (_, address):
        port = address.rsplit(":", 1)[1]
        code, _, err = aiokv("serve", "--store", "memory://", "--port", port, home=home)
    assert code == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in err


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_server_stops_cleanly_when_asked(home: Path, signal_number: signal.Signals) -> None:
    with served_process("--store", f"sqlite:///{home}/kv.db", home=home) as (process, address):
        assert aiokv("set", "db", "k", "v", home=home, AIOKV_URL=address)[0] == 0
        process.send_signal(signal_number)
        assert process.wait(timeout=10) == 0
        assert process.stderr is not None
        assert process.stderr.read() == "aiokv: stopping, finishing what is under way\n"
    assert aiokv("get", "db", "k", "--url", "sqlite:///kv.db", home=home)[1] == b"v"


@pytest.mark.slow
def test_shared_server_takes_the_key_that_the_command_made(home: Path) -> None:
    code, out, err = aiokv("access", "add", "alice", "--access-file", "access", home=home)
    assert code == 0
    assert "shown once" in err
    key = out.decode().strip()
    with served_process("--store", "memory://", "--access-file", str(home / "access"), home=home) as (_, address):
        assert aiokv("set", "db", "k", "v", home=home, AIOKV_URL=address, AIOKV_KEY=key)[0] == 0
        assert aiokv("get", "db", "k", home=home, AIOKV_URL=address, AIOKV_KEY=key)[1] == b"v"
        code, _, err = aiokv("get", "db", "k", home=home, AIOKV_URL=address, AIOKV_KEY="alice:wrong")
        assert code == 3
        assert "wrong" not in err
        code, _, err = aiokv("get", "db", "k", home=home, AIOKV_URL=address)
        assert "set AIOKV_KEY" in err


def shell(line: str, home: Path, **environment: str) -> tuple[int, str, str]:
    """Run a line of a shell in which `$AIOKV` is the command."""
    done = subprocess.run(
        ["sh", "-c", line],
        capture_output=True,
        text=True,
        check=False,
        cwd=home,
        env={**clean_environment(home), "AIOKV": f"{sys.executable} -m aiokv", "AIOKV_URL": "sqlite:///kv.db", **environment},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("output", "status"), [(">&-", 2), (">/dev/full", 3), ("| true", 3)])
def test_key_that_could_not_be_shown_opens_nothing(home: Path, output: str, status: int) -> None:
    assert shell("$AIOKV access add alice --access-file access", home)[0] == 0
    # The pipe's reader has to be gone first.
    line = f"{{ sleep 0.5; $AIOKV access add bob --access-file access; echo $? >&2; }} {output}"
    _, out, err = shell(line, home)
    assert (out, err.splitlines()[-1]) == ("", str(status))
    assert "bob" not in (home / "access").read_text()
    assert "alice" in (home / "access").read_text()
    assert "Traceback" not in err


def test_full_disk_under_an_access_file_is_no_wrong_usage(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aiokv.server.access_file.edit_private_file", fail)
        assert cli.main(["access", "add", "alice", "--access-file", str(home / "access")]) == 3
    assert "No space left on device" in capsys.readouterr().err


def test_messages_do_not_go_to_standard_output_where_standard_error_is_closed(home: Path) -> None:
    assert shell("$AIOKV get db absent 2>&-", home) == (1, "", "")
    assert shell("$AIOKV get a/b k 2>&-", home) == (2, "", "")


@pytest.mark.parametrize("words", ["SECRET val", "--SECRET", "-- SECRET val"])
def test_words_of_a_value_that_is_not_quoted_are_not_repeated(home: Path, words: str) -> None:
    code, out, err = shell(f"$AIOKV set db k my {words}", home)
    assert (code, out) == (2, "")
    assert "quote a value of several words" in err
    assert "SECRET" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        "get db k --url http:/u:SECRET@h",
        "get db k --url http:u:SECRET@h",
        "get db k --url u:SECRET@h",
        "get db k --url //u:SECRET@h",
        "get db k --url redis://:SEC/SECRET@h",
        "ping --url http:///u:SECRET@h",
        "bench http:/u:SECRET@h",
        "import redis://:SECRET@h --db db",
        "export --db db -o redis://:SECRET@h",
        "check redis://:SECRET@h",
        "backup redis://:SECRET@h",
        "backup copy.db --store http:/u:SECRET@h",
        "redis://:SECRET@h",
    ],
)
def test_credentials_in_a_url_of_odd_form_or_in_place_of_a_file_are_masked(home: Path, arguments: str) -> None:
    code, out, err = shell(f"$AIOKV {arguments}", home)
    assert code in {2, 3}
    assert err
    assert "SECRET" not in out + err
    assert "Traceback" not in err


def test_credentials_in_a_url_of_odd_form_in_the_environment_are_masked(home: Path) -> None:
    for url in ("http:/u:SECRET@h", "u:SECRET@h", "nothing://u:SECRET@h", "://u:SECRET@h"):
        code, _, err = shell("$AIOKV get db k", home, AIOKV_URL=url)
        assert code == 2
        assert "SECRET" not in err


@pytest.mark.parametrize("arguments", ["--version", "--help", "get --help"])
def test_help_and_version_that_cannot_be_written_are_failures(home: Path, arguments: str) -> None:
    code, _, err = shell(f"$AIOKV {arguments} >/dev/full", home)
    assert (code, err.splitlines()[0].split(";")[0]) == (3, "aiokv: standard output: No space left on device")
    assert len(err.splitlines()) == 1


def test_interrupt_while_the_command_line_is_loaded_ends_it_quietly(home: Path) -> None:
    # A module that comes late in the loading, in which Ctrl-C comes.
    code = (
        "import builtins, runpy, sys\n"
        "real = builtins.__import__\n"
        "def interrupted(name, *rest, **named):\n"
        "    if name == 'aiokv.cli':\n"
        "        raise KeyboardInterrupt\n"
        "    return real(name, *rest, **named)\n"
        "builtins.__import__ = interrupted\n"
        "sys.argv = ['aiokv', '--help']\n"
        "runpy.run_module('aiokv', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=home, env=clean_environment(home)
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


STAND_IN = """
import os, signal
if "INTERRUPT" in os.environ:
    os.kill(os.getpid(), signal.SIGINT)
def main():
    print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    return 7
"""


def installed_command(folder: Path, line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of a shell in which `$AIOKV` is the installed command, with a stand-in for the package."""
    (folder / "aiokv").mkdir()
    (folder / "aiokv" / "__init__.py").touch()
    (folder / "aiokv" / "cli.py").write_text(STAND_IN)
    code = "import sys, aiokv_command; assert 'aiokv' not in sys.modules; sys.exit(aiokv_command.main())"
    paths = {"PYTHONPATH": f"{folder}:{REPOSITORY}", "AIOKV": f"{sys.executable} -P -c", "CODE": code}
    return subprocess.run(
        ["sh", "-c", f'{line} $AIOKV "$CODE"'],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**clean_environment(folder), **paths, **environment},
    )


def test_interrupt_while_the_installed_command_is_loaded_ends_it_without_an_exception_inside_an_import(home: Path) -> None:
    done = installed_command(home, "exec", INTERRUPT="1")
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_interrupts_that_are_ignored_stay_so_while_the_installed_command_is_loaded(home: Path) -> None:
    done = installed_command(home, "trap '' INT; exec", INTERRUPT="1")
    assert (done.returncode, done.stdout, done.stderr) == (7, "False\n", "")


def test_installed_command_has_the_usual_interrupts_once_it_is_loaded(home: Path) -> None:
    done = installed_command(home, "exec")
    assert (done.returncode, done.stdout, done.stderr) == (7, "True\n", "")


def test_installed_command_begins_outside_the_package() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"aiokv": "aiokv_command:main"}
