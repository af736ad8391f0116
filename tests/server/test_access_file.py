"""The access file on the disk: private, written whole or not at all, also by several commands at once."""

import base64
import errno
import fcntl
import hashlib
import os
import re
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import FakeClock, clean_environment

from aiokv.cli import main
from aiokv.errors import ConfigurationError
from aiokv.server import AccessFile, add_key
from aiokv.server.access_file import change_limits, read_access_file, revoke_keys

HASH = "0123456789abcdef" * 4
SIGNING_LINE = f"!signing-key {'0' * 64}"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "access"
    monkeypatch.setenv("AIOKV_ACCESS_FILE", str(path))
    return path


def digest(key: str) -> str:
    return hashlib.sha256(key.partition(":")[2].encode()).hexdigest()


def account_of_key(access: AccessFile, authorization: str) -> str | None:
    """Exchange a key for a token, and return the account of the token."""
    issued = access.issue_token(authorization)
    permit = None if issued is None else access.permit_of_token(f"Bearer {issued.token}")
    return None if permit is None else permit.account


def write(path: Path, *lines: str) -> str:
    text = "".join(f"{line}\n" for line in (SIGNING_LINE, *lines))
    path.write_text(text)
    path.chmod(0o600)
    return text


def test_new_access_file_is_private_and_holds_no_secret(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    umask = os.umask(0)
    try:
        key = add_key(path, "alice")
    finally:
        os.umask(umask)
    account, _, secret = key.partition(":")
    assert (account, len(base64.urlsafe_b64decode(secret + "="))) == ("alice", 32)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret not in path.read_text()
    assert f"\nalice:sha256:{digest(key)}\n" in path.read_text()
    assert list(path.parent.iterdir()) == [path]
    assert capfd.readouterr() == ("", "")


def test_two_access_files_sign_with_different_keys(tmp_path: Path) -> None:
    for name in ("one", "two"):
        add_key(tmp_path / name, "alice")
    assert read_access_file(tmp_path / "one").signing_key != read_access_file(tmp_path / "two").signing_key


@pytest.mark.parametrize("account", ["", "a/b", "a:b", "a b", "é", "a\n", "a" * 65])
def test_bad_account_is_refused_and_no_file_made(path: Path, account: str) -> None:
    with pytest.raises(ConfigurationError, match="1 to 64 letters"):
        add_key(path, account)
    assert not path.exists()


def test_access_file_in_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere"):
        add_key(tmp_path / "nowhere" / "access", "alice")


def test_keys_added_at_once_all_stand_in_the_file(path: Path, clock: FakeClock) -> None:
    keys: list[str] = []
    start = threading.Barrier(8)

    def add(number: int) -> None:
        start.wait()
        keys.append(add_key(path, f"account-{number % 4}"))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    access = AccessFile(path, clock)
    assert len(keys) == 8
    assert [account_of_key(access, f"Key {key}") for key in keys] == [key.partition(":")[0] for key in keys]
    assert list(path.parent.iterdir()) == [path]


def test_key_is_added_to_a_file_whose_last_line_has_no_end(path: Path, clock: FakeClock) -> None:
    key = add_key(path, "alice")
    path.write_text(path.read_text().rstrip("\n"))
    second = add_key(path, "bob")
    access = AccessFile(path, clock)
    assert account_of_key(access, f"Key {key}") == "alice"
    assert account_of_key(access, f"Key {second}") == "bob"


def test_key_is_not_added_to_a_file_of_another_kind(path: Path) -> None:
    path.write_text("something else\n")
    with pytest.raises(ConfigurationError, match="line 1"):
        add_key(path, "alice")
    assert path.read_text() == "something else\n"


def test_edits_keep_comments_and_order_and_name_the_new_version(path: Path) -> None:
    path.write_text(
        "# aiokv access file, version 1. Keep it private.\n# One key a line\n\n"
        f"{SIGNING_LINE}\n  # alice's laptop: caf\xe9\nalice:sha256:{HASH}\n# the end",
        encoding="utf-8",
    )
    path.chmod(0o600)
    add_key(path, "bob", read_only=True)
    change_limits(path, "alice", {"max-bytes": "1"})
    change_limits(path, "bob", {"max-bytes": "2"})
    change_limits(path, "alice", {"max-bytes": "3"})
    revoke_keys(path, "bob")
    assert path.read_text(encoding="utf-8") == (
        "# aiokv access file, version 2. Keep it private.\n# One key a line\n\n"
        f"{SIGNING_LINE}\n  # alice's laptop: caf\xe9\nalice:sha256:{HASH}\n# the end\n"
        "@limits alice max-bytes=3\n@limits bob max-bytes=2\n"
    )


@pytest.mark.parametrize(("mode", "kept"), [(0o644, 0o600), (0o660, 0o600), (0o400, 0o400), (0o600, 0o600), (0o755, 0o600)])
@pytest.mark.parametrize(
    "arguments", [("add", "bob"), ("revoke", "alice"), ("limit", "alice", "--max-bytes", "1")], ids=lambda words: words[0]
)
def test_every_command_that_writes_takes_the_rights_of_others_away(
    path: Path, caplog: pytest.LogCaptureFixture, arguments: tuple[str, ...], mode: int, kept: int
) -> None:
    write(path, f"alice:sha256:{HASH}")
    path.chmod(mode)
    assert main(["access", *arguments]) == 0
    assert stat.S_IMODE(path.stat().st_mode) == kept
    assert ("open to others" in caplog.text) == bool(mode & 0o077)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_owner_and_group_stay(path: Path) -> None:
    write(path, f"alice:sha256:{HASH}")
    os.chown(path, 12_345, 23_456)
    add_key(path, "bob")
    status = path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (12_345, 23_456, 0o600)


@pytest.mark.parametrize("same_owner", [True, False])
def test_file_that_would_change_its_owner_is_not_written(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, same_owner: bool
) -> None:
    text = write(path, f"alice:sha256:{HASH}")
    real = os.fstat

    def of_others(descriptor: int) -> os.stat_result:
        status = list(real(descriptor))
        status[4 if not same_owner else 5] += 1
        return os.stat_result(status)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr("aiokv.server.private_file.os.path.samestat", lambda *_: True)
    monkeypatch.setattr("aiokv.server.private_file.os.fstat", of_others)
    monkeypatch.setattr("aiokv.server.private_file.os.fchown", refuse)
    if same_owner:
        # Another group has no rights to a private file.
        add_key(path, "bob")
        return
    with pytest.raises(ConfigurationError, match="run this as that user"):
        add_key(path, "bob")
    assert path.read_text() == text


def test_link_stays_a_link_to_the_new_file(path: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "access"
    path.symlink_to(target)
    add_key(path, "alice")
    add_key(target, "bob")
    assert path.is_symlink()
    assert read_access_file(path).accounts() == ("alice", "bob")
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("call", ["fsync", "fchmod"])
def test_failed_write_leaves_the_old_file_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    text = write(path, f"alice:sha256:{HASH}")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"aiokv.server.private_file.os.{call}", fail)
    with pytest.raises(ConfigurationError, match="cannot be written: No space left"):
        add_key(path, "bob")
    assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_file_that_is_a_mount_point_is_explained(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write(path, f"alice:sha256:{HASH}")

    def refuse(_source: Path, _target: Path) -> Path:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ConfigurationError, match="mount the folder"):
        add_key(path, "bob")
    assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_new_file_is_on_the_disk_before_it_takes_the_old_ones_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, f"alice:sha256:{HASH}")
    steps: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        steps.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> Path:
        steps.append("replace")
        return real_replace(source, target)

    monkeypatch.setattr("aiokv.server.private_file.os.fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    add_key(path, "bob")
    assert steps == ["sync file", "replace", "sync folder"]


def test_reader_never_sees_a_part_of_the_file(path: Path) -> None:
    add_key(path, "alice")
    stop = threading.Event()
    failures: list[Exception] = []

    def read() -> None:
        while not stop.is_set():
            try:
                assert "alice" in read_access_file(path).accounts()
            except Exception as error:  # noqa: BLE001 (a thread's error must reach the test)
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(30):
        change_limits(path, "alice", {"max-entries": str(number)})
    stop.set()
    reader.join()
    assert failures == []


def test_edits_of_many_threads_at_once_all_take_effect(path: Path) -> None:
    keys = [add_key(path, f"old-{number}") for number in range(4)]
    edits = [
        *(lambda number=number: add_key(path, f"new-{number}") for number in range(4)),
        *(lambda number=number: revoke_keys(path, f"old-{number}") for number in range(0, 4, 2)),
        *(lambda number=number: change_limits(path, f"old-{number}", {"max-bytes": str(number)}) for number in range(1, 4, 2)),
    ]
    threads = [threading.Thread(target=edit) for edit in edits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = read_access_file(path)
    assert len(keys) == 4
    assert set(text.keys()) == {"old-1", "old-3", *(f"new-{number}" for number in range(4))}
    assert {account: limits.given for account, limits in text.limits().items()} == {
        "old-1": {"max-bytes": 1},
        "old-3": {"max-bytes": 3},
    }
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.slow
def test_commands_of_many_processes_at_once_all_take_effect(path: Path) -> None:
    accounts = {f"account-{number}" for number in range(5)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "aiokv", "access", "add", account, "--access-file", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=clean_environment(path.parent),
        )
        for account in sorted(accounts)
    ]
    keys = [process.communicate(timeout=18)[0].strip() for process in processes]
    access = AccessFile(path)
    assert {key.partition(":")[0] for key in keys if access.issue_token(f"Key {key}")} == accounts


def test_lock_file_that_a_killed_command_left_keeps_nobody_out(path: Path) -> None:
    lock = path.with_name("access.lock")
    lock.touch()
    add_key(path, "alice")
    assert not lock.exists()


def test_lock_that_another_program_holds_for_too_long_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write(path, f"alice:sha256:{HASH}")
    monkeypatch.setattr("aiokv.server.private_file._LOCK_TIMEOUT_SECONDS", 0.05)
    lock = path.with_name("access.lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigurationError, match=re.escape(str(lock))):
            add_key(path, "bob")
    assert path.read_text() == text
    add_key(path, "bob")


def test_lock_on_a_file_that_was_removed_meanwhile_is_no_lock(path: Path) -> None:
    add_key(path, "alice")
    lock = path.with_name("access.lock")
    adding = threading.Thread(target=add_key, args=(path, "bob"))
    with lock.open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        adding.start()
        # Long enough that it waits for the lock of the first file.
        adding.join(0.2)
        lock.unlink()
        second = lock.open("w")
        fcntl.flock(second, fcntl.LOCK_EX)
    with second:
        adding.join(0.3)
        assert adding.is_alive()
        assert read_access_file(path).accounts() == ("alice",)
    adding.join()
    assert read_access_file(path).accounts() == ("alice", "bob")


def make_unfit(path: Path, kind: str) -> None:
    """Put what is no small regular file in the place of a file."""
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "huge"])
def test_last_good_version_stays_where_the_path_is_no_small_file(
    path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = add_key(path, "alice")
    access = AccessFile(path)
    make_unfit(path, kind)
    descriptors = len(list(Path("/dev/fd").iterdir()))
    access.reload()
    access.reload()
    words = "at most 16,777,216 bytes, not 1,099,511,627,776" if kind == "huge" else "it must be a regular file"
    assert words in caplog.text
    assert account_of_key(access, f"Key {key}") == "alice"
    assert len(list(Path("/dev/fd").iterdir())) == descriptors


def test_file_that_is_as_large_as_may_be_is_read(path: Path) -> None:
    text = write(path, f"alice:sha256:{HASH}")
    limit = 16 * 1024 * 1024
    path.write_text(f"{text}#{'x' * (limit - len(text) - 1)}")
    assert read_access_file(path).accounts() == ("alice",)
    path.write_text(f"{text}#{'x' * (limit - len(text))}")
    with pytest.raises(ConfigurationError, match="at most 16,777,216 bytes, not 16,777,217"):
        read_access_file(path)


def test_edit_of_a_pipe_is_refused(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(ConfigurationError, match="it must be a regular file"):
        add_key(path, "alice")
