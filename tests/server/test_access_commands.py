"""`aiokv access`: what its commands print, and what they do to the file, also when they fail or run at once."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import clean_environment

from aiokv.cli import main
from aiokv.errors import ConfigurationError
from aiokv.server import AccessFile, add_key
from aiokv.server.access_file import change_limits, read_access_file, revoke_keys

HASH = "0123456789abcdef" * 4
OTHER_HASH = "fedcba9876543210" * 4
SIGNING_LINE = f"!signing-key {'0' * 64}"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "access"
    monkeypatch.setenv("AIOKV_ACCESS_FILE", str(path))
    return path


def digest(key: str) -> str:
    return hashlib.sha256(key.strip().partition(":")[2].encode()).hexdigest()


def write(path: Path, *lines: str) -> str:
    text = "".join(f"{line}\n" for line in (SIGNING_LINE, *lines))
    path.write_text(text)
    path.chmod(0o600)
    return text


def test_add_prints_the_key_alone_on_standard_output_and_its_short_id_beside(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["access", "add", "alice"]) == 0
    key, told = capsys.readouterr()
    assert re.fullmatch(r"alice:[A-Za-z0-9_-]{43}\n", key)
    assert AccessFile(path).issue_token(f"Key {key.strip()}") is not None
    assert digest(key)[:8] in told
    assert key.strip().partition(":")[2] not in told


def test_add_writes_flags_and_patterns(path: Path) -> None:
    assert main(["access", "add", "alice", "--read-only", "--db", "cache-*", "--db", "my db", "--operator"]) == 0
    assert re.search(r"^alice:sha256:[0-9a-f]{64} read-only operator db=cache-\*,my%20db$", path.read_text(), re.MULTILINE)
    (key,) = read_access_file(path).keys()["alice"]
    assert (key.read_only, key.operator, key.db_patterns) == (True, True, ("cache-*", "my db"))


def test_list_shows_accounts_limits_and_keys_and_no_whole_hash(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(
        path,
        f"alice:sha256:{HASH}",
        "@limits gone max-entries=none",
        f"bob:sha256:{HASH} operator",
        f"alice:sha256:{OTHER_HASH} read-only db=cache-*,config",
        "@limits alice max-bytes=2G requests-per-second=0.50",
    )
    assert main(["access", "list"]) == 0
    out, told = capsys.readouterr()
    assert out.splitlines() == [
        "alice  max-bytes=2000000000 requests-per-second=0.5",
        "  01234567  everything",
        "  fedcba98  read-only db=cache-*,config",
        "gone  max-entries=none",
        "  no key",
        "bob  limits of the server's defaults",
        "  01234567  operator",
    ]
    assert told == ""


def test_list_of_a_file_without_keys_says_how_to_make_one(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(path)
    assert main(["access", "list"]) == 0
    assert capsys.readouterr() == ("", f"aiokv: access file {path} has no key; make one with `aiokv access add <account>`\n")


def test_list_leaves_the_file_as_it_is(path: Path) -> None:
    write(path, f"alice:sha256:{HASH}")
    path.chmod(0o644)
    before = path.stat()
    assert main(["access", "list"]) == 0
    assert path.stat().st_mode == before.st_mode
    assert path.stat().st_ino == before.st_ino


def test_revoke_removes_all_keys_of_one_account_and_keeps_the_rest(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        f"alice:sha256:{HASH}",
        "# about alice",
        f"bob:sha256:{HASH}",
        f"alice:sha256:{OTHER_HASH}",
        "@limits alice max-bytes=1",
    ]
    write(path, *lines)
    assert main(["access", "revoke", "alice"]) == 0
    assert path.read_text().splitlines() == [SIGNING_LINE, lines[1], lines[2], lines[4]]
    told = capsys.readouterr().err
    assert "01234567, fedcba98" in told
    assert "tokens" in told
    assert "stored stays" in told


@pytest.mark.parametrize("short_id", ["0123", "01234567", HASH])
def test_revoke_of_one_key_keeps_the_other(path: Path, short_id: str) -> None:
    write(path, f"alice:sha256:{HASH} read-only", f"alice:sha256:{OTHER_HASH}", f"bob:sha256:{HASH}")
    assert main(["access", "revoke", "alice", "--key", short_id]) == 0
    assert path.read_text().splitlines()[1:] == [f"alice:sha256:{OTHER_HASH}", f"bob:sha256:{HASH}"]


def test_short_id_of_two_keys_revokes_neither(path: Path) -> None:
    text = write(path, f"alice:sha256:{HASH}", f"alice:sha256:{HASH[:-1]}0")
    with pytest.raises(ConfigurationError, match="several keys"):
        revoke_keys(path, "alice", HASH[:8])
    assert path.read_text() == text


def test_revoked_key_and_its_tokens_are_refused_by_a_running_server(path: Path) -> None:
    key, other = add_key(path, "alice"), add_key(path, "alice")
    access = AccessFile(path)
    tokens = [access.issue_token(f"Key {each}") for each in (key, other)]
    assert main(["access", "revoke", "alice", "--key", digest(key)[:8]]) == 0
    access.reload()
    permits = [access.permit_of_token(f"Bearer {token.token}") for token in tokens if token is not None]
    assert [permit is not None for permit in permits] == [False, True]
    assert access.issue_token(f"Key {key}") is None


def test_limit_changes_what_is_named_and_keeps_the_rest(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(path, f"alice:sha256:{HASH}")
    limit = ["access", "limit", "alice"]
    assert main([*limit, "--requests-per-second", "2.5", "--max-bytes", "10k"]) == 0
    assert path.read_text().splitlines()[-1] == "@limits alice requests-per-second=2.5 max-bytes=10000"
    told = capsys.readouterr().err
    assert "limits of alice: requests-per-second=2.5 max-bytes=10000." in told
    assert "tokens already issued" in told
    assert main([*limit, "--max-entries", "1M", "--max-bytes", "none"]) == 0
    assert path.read_text().splitlines()[-1] == "@limits alice requests-per-second=2.5 max-bytes=none max-entries=1000000"
    assert main([*limit, "--max-entries", "default", "--max-bytes", "default", "--requests-per-second", "default"]) == 0
    assert path.read_text().splitlines() == [SIGNING_LINE, f"alice:sha256:{HASH}"]
    assert "defaults" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("7", 7),
        ("2k", 2_000),
        ("2K", 2_000),
        ("3M", 3_000_000),
        ("4g", 4 * 10**9),
        ("64MiB", 2**26),
        ("2GB", 2 * 10**9),
        ("1.5G", 1_500_000_000),
    ],
)
def test_numbers_of_bytes_take_a_suffix(path: Path, text: str, number: int) -> None:
    write(path, f"alice:sha256:{HASH}")
    assert change_limits(path, "alice", {"max-bytes": text}).given == {"max-bytes": number}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("add", "a/b"), "account must be 1 to 64"),
        (("add", "alice", "--db", "a/b"), "a pattern of namespaces"),
        (("add", "alice", "--db", ""), "a pattern of namespaces"),
        (("revoke", "bob"), "no key of account 'bob'; `aiokv access list`"),
        (("revoke", "alice", "--key", "ffff"), "no key of account 'alice' and short id ffff"),
        (("revoke", "alice", "--key", "012"), "4 or more"),
        (("revoke", "alice", "--key", ""), "4 or more"),
        (("revoke", "alice", "--key", "ABCDEF"), "4 or more"),
        (("limit", "bob", "--max-bytes", "1"), "no account 'bob'; `aiokv access list`"),
        (("limit", "alice"), "no limit is named"),
        (("limit", "alice", "--max-bytes", "1.5"), "max-bytes must be a size (such as 64MiB"),
        (("limit", "alice", "--max-entries", "-1"), "max-entries"),
        (("limit", "alice", "--max-bytes", "1_000"), "max-bytes must be"),
        (("limit", "alice", "--requests-per-second", "0"), "requests-per-second must be a number above 0"),
    ],
)
def test_what_cannot_work_is_said_and_leaves_the_file(
    path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    text = write(path, f"alice:sha256:{HASH}")
    try:
        code = main(["access", *arguments])
    except SystemExit as refused:
        code = int(str(refused.code))
    out, told = capsys.readouterr()
    assert (code, out) == (2, "")
    assert words in told
    assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("arguments", [("list",), ("revoke", "alice"), ("limit", "alice", "--max-bytes", "1")])
def test_absent_file_is_named_and_not_made(path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    assert main(["access", *arguments]) == 2
    told = capsys.readouterr().err
    assert str(path) in told
    assert "make it with `aiokv access add <account>`" in told
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("value", [None, ""])
def test_command_without_a_file_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str | None
) -> None:
    monkeypatch.delenv("AIOKV_ACCESS_FILE", raising=False)
    if value is not None:
        monkeypatch.setenv("AIOKV_ACCESS_FILE", value)
    assert main(["access", "list"]) == 2
    told = capsys.readouterr().err
    assert "--access-file" in told
    assert "AIOKV_ACCESS_FILE" in told


def test_option_goes_before_the_environment(path: Path, tmp_path: Path) -> None:
    assert main(["access", "add", "alice", "--access-file", str(tmp_path / "other")]) == 0
    assert not path.exists()
    assert (tmp_path / "other").exists()


@pytest.mark.parametrize("command", ["add", "list", "revoke", "limit"])
def test_help_of_every_command_names_the_environment(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["access", command, "--help"])
    assert "AIOKV_ACCESS_FILE" in capsys.readouterr().out


@pytest.mark.slow
def test_command_names_a_bad_account_without_a_trace(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "aiokv", "access", "add", "a/b", "--access-file", str(path)],
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
        env=clean_environment(path.parent),
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("aiokv: account must be")
    assert not path.exists()


@pytest.mark.slow
def test_key_that_cannot_be_shown_is_a_failure(path: Path) -> None:
    line = f'exec "{sys.executable}" -m aiokv access add alice --access-file "{path}" >/dev/full'
    done = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, env=clean_environment(path.parent), check=False)
    message = "standard output: No space left on device; make room there, or write to another disk, and run the command again"
    revoked = "the key could not be shown, so it was revoked at once"
    assert (done.returncode, done.stderr.decode()) == (3, f"aiokv: {revoked}\naiokv: {message}\n")
