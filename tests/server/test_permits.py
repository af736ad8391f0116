"""What a key may do, live from the access file; operators; callers with wrong keys; a file that cannot be used."""

import base64
import fnmatch
import logging
import re
from pathlib import Path

import pytest
from helpers import FakeClock
from hypothesis import given
from hypothesis import strategies as st

from aiokv.server.access import AccessFile, Permit
from aiokv.server.access_file import add_key, change_limits, revoke_keys
from aiokv.server.quotas import AccountLimits

VERBS = ("get", "set", "delete")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "access"


@pytest.fixture
def monotonic(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The monotonic clock of the package, which moves only when a test says so."""
    clock = FakeClock(5_000.0)
    monkeypatch.setattr("aiokv.clock.monotonic", clock)
    return clock


def bearer(access: AccessFile, key: str) -> str:
    issued = access.issue_token(f"Key {key}")
    assert issued is not None
    return f"Bearer {issued.token}"


def basic(key: str) -> str:
    return f"Basic {base64.b64encode(key.encode()).decode()}"


def with_flags(path: Path, account: str, flags: str) -> None:
    """Edit the file by hand: give the keys of an account these flags."""
    path.write_text(re.sub(rf"({account}:sha256:[0-9a-f]+).*", rf"\1 {flags}", path.read_text()))


def test_permit_bears_what_the_line_of_its_key_says(path: Path) -> None:
    keys = [
        add_key(path, "alice"),
        add_key(path, "alice", read_only=True),
        add_key(path, "bob", db_patterns=("cache-*", "config")),
    ]
    access = AccessFile(path)
    assert [access.permit_of_token(bearer(access, key)) for key in keys] == [
        Permit("alice", read_only=False, db_patterns=None),
        Permit("alice", read_only=True, db_patterns=None),
        Permit("bob", read_only=False, db_patterns=("cache-*", "config")),
    ]


@pytest.mark.parametrize("seen_before", [True, False])
def test_token_obeys_within_a_second_when_its_key_becomes_read_only(
    path: Path, monotonic: FakeClock, *, seen_before: bool
) -> None:
    key = add_key(path, "alice")
    access = AccessFile(path)
    token = bearer(access, key)
    if seen_before:
        assert access.permit_of_token(token) == Permit("alice")
    with_flags(path, "alice", "read-only db=config")
    monotonic.advance(1)
    assert access.permit_of_token(token) == Permit("alice", read_only=True, db_patterns=("config",))
    with_flags(path, "alice", "")
    monotonic.advance(1)
    assert access.permit_of_token(token) == Permit("alice")


def test_change_that_leaves_size_and_times_alone_is_seen_a_second_later(
    path: Path, monotonic: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = add_key(path, "alice", db_patterns=("aaa",))
    access = AccessFile(path)
    token = bearer(access, key)
    # As where two writes fall into one tick of the file system's clock.
    monkeypatch.setattr(access, "_read_stamp", lambda stamp=access._stamp: stamp)
    with_flags(path, "alice", "db=bbb")
    monotonic.advance(1)
    assert access.permit_of_token(token) == Permit("alice", db_patterns=("bbb",))


def test_known_token_is_one_look_up(path: Path, monotonic: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    key = add_key(path, "alice")
    access = AccessFile(path)
    token = bearer(access, key)
    assert access.permit_of_token(token) == Permit("alice")
    monotonic.advance(0.9)
    for name in ("_verify", "_read_stamp"):
        monkeypatch.setattr(access, name, None)
    assert access.permit_of_token(token) == Permit("alice")


@pytest.mark.parametrize(("read_only", "allowed"), [(False, VERBS), (True, ("get",))])
def test_read_only_permit_allows_get_alone(*, read_only: bool, allowed: tuple[str, ...]) -> None:
    permit = Permit("alice", read_only=read_only)
    assert tuple(verb for verb in VERBS if permit.allows(verb, "db") is None) == allowed


def test_reason_says_what_is_not_allowed() -> None:
    assert Permit("a", read_only=True).allows("set", "db") == "this key is read-only: it may get, and not set"
    reason = Permit("a", db_patterns=("cache-*", "config")).allows("get", "other")
    assert reason == "this key may not use db 'other', only 'cache-*, config'"
    assert len(Permit("a", db_patterns=("x" * 5_000,)).allows("get", "y" * 5_000) or "") < 500


@pytest.mark.parametrize(
    ("pattern", "names", "others"),
    [
        ("config", ("config",), ("config2", "Config", "my-config", "")),
        ("cache-*", ("cache-", "cache-a", "cache-*"), ("cache", "xcache-a", "Cache-a")),
        ("*-cache", ("-cache", "a-cache"), ("a-cache2", "cache")),
        ("*", ("a", "a:b", "a\nb"), ()),
        ("a*a", ("aa", "aba"), ("a", "ab")),
        ("a*b*c", ("abc", "a-b-c", "abbcc"), ("acb", "ab", "ac")),
        ("**x**", ("x", "axa"), ("a",)),
        ("[ab]?.x", ("[ab]?.x",), ("a1.x", "[ab]?yx")),
        ("*ab*ab", ("abab", "xab-ab"), ("ab", "aab")),
    ],
)
def test_star_is_any_text_and_all_else_itself(pattern: str, names: tuple[str, ...], others: tuple[str, ...]) -> None:
    permit = Permit("alice", db_patterns=("never", pattern))
    assert [name for name in (*names, *others) if permit.allows("set", name) is None] == list(names)


@given(pattern=st.text("ab*", min_size=1, max_size=8), name=st.text("ab\n", max_size=8))
def test_patterns_match_as_those_of_a_shell(pattern: str, name: str) -> None:
    assert (Permit("a", db_patterns=(pattern,)).allows("get", name) is None) == fnmatch.fnmatchcase(name, pattern)


def test_limits_of_the_file_go_before_the_defaults(path: Path, monotonic: FakeClock) -> None:
    defaults = AccountLimits(50.0, 1_000, 10)
    add_key(path, "alice")
    access = AccessFile(path, default_limits=defaults)
    assert access.limits_of("alice") == access.limits_of("nobody") == defaults
    change_limits(path, "alice", {"max-bytes": "5k", "max-entries": "none"})
    monotonic.advance(1)
    assert access.health() is None
    assert access.limits_of("alice") == AccountLimits(50.0, 5_000, None)
    change_limits(path, "alice", {"max-bytes": "default", "max-entries": "default", "requests-per-second": "0.5"})
    monotonic.advance(1)
    assert access.health() is None
    assert access.limits_of("alice") == AccountLimits(0.5, 1_000, 10)


def test_only_keys_with_the_flag_are_operators(path: Path, monotonic: FakeClock) -> None:
    operator, other = add_key(path, "ops", operator=True), add_key(path, "ops")
    access = AccessFile(path)
    assert [access.is_operator(offered) for offered in (f"Key {operator}", f"key {operator}", basic(operator))] == [True] * 3
    assert [access.is_operator(offered) for offered in (f"Key {other}", basic(other), bearer(access, operator))] == [False] * 3
    assert access.wrong_keys == 0
    with_flags(path, "ops", "")
    monotonic.advance(1)
    assert not access.is_operator(f"Key {operator}")
    revoke_keys(path, "ops")
    monotonic.advance(1)
    assert not access.is_operator(basic(operator))


@pytest.mark.parametrize(
    "offered",
    ["", "Key", "Key ops", "Key ops:", "Key ops:no", "Basic", "Basic !", "Basic \udcff", "Basic b3BzOm5v", "Bearer x", "é"],
)
def test_wrong_credentials_are_no_operator(path: Path, offered: str) -> None:
    add_key(path, "ops", operator=True)
    assert not AccessFile(path).is_operator(offered)


def test_wrong_keys_are_counted_wherever_they_are_offered(path: Path) -> None:
    key = add_key(path, "alice")
    access = AccessFile(path)
    for offered in ("Key alice:wrong", "Key bob:wrong", "Key wrong"):
        assert access.issue_token(offered, "10.0.0.1") is None
    assert not access.is_operator(basic("alice:wrong"), "10.0.0.1")
    assert access.wrong_keys == 4
    assert access.issue_token("", "10.0.0.1") is None
    assert access.issue_token(f"Key {key}", "10.0.0.1") is not None
    assert access.wrong_keys == 4


def test_address_with_wrong_keys_waits_longer_each_time_up_to_a_bound(path: Path, monotonic: FakeClock) -> None:
    add_key(path, "alice")
    access = AccessFile(path)
    delays = [access.delay_of("10.0.0.1")]
    for _ in range(100):
        access.issue_token("Key alice:wrong", "10.0.0.1")
        delays.append(access.delay_of("10.0.0.1"))
    assert delays[:7] == pytest.approx([0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2])
    assert delays[7:] == [5.0] * 94
    assert access.delay_of("10.0.0.2") == 0.0
    monotonic.advance(599)
    assert access.delay_of("10.0.0.1") == 5.0
    monotonic.advance(1)
    assert access.delay_of("10.0.0.1") == 0.0
    access.issue_token("Key alice:wrong", "10.0.0.1")
    assert access.delay_of("10.0.0.1") == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("address", "same", "other"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", "2001:db8:1:3::1"),
        ("::ffff:10.0.0.1", "10.0.0.1", "10.0.0.2"),
        ("::1", "::2", "fe80::1"),
        ("fe80::1%eth0", "fe80::2", "fe81::1"),
        ("", "", "10.0.0.1"),
        ("unix:socket", "unix:socket", "unix"),
    ],
)
def test_addresses_of_one_machine_wait_together(path: Path, address: str, same: str, other: str) -> None:
    add_key(path, "alice")
    access = AccessFile(path)
    access.issue_token("Key alice:wrong", address)
    assert access.delay_of(same) > 0.0
    assert access.delay_of(other) == 0.0


def test_addresses_remembered_are_bounded_and_the_latest_stay(path: Path) -> None:
    add_key(path, "alice")
    access = AccessFile(path)
    addresses = [f"10.0.{number // 256}.{number % 256}" for number in range(4_097)]
    for address in (*addresses[:4_096], addresses[0], addresses[-1]):
        access.issue_token("Key alice:wrong", address)
    assert access.delay_of(addresses[0]) == pytest.approx(0.2)
    assert access.delay_of(addresses[1]) == 0.0
    assert access.delay_of(addresses[2]) == access.delay_of(addresses[-1]) == pytest.approx(0.1)


def test_wrong_keys_are_logged_once_a_minute_for_each_id_without_secrets(
    path: Path, monotonic: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    for account in ("alice", "bob"):
        add_key(path, account)
    access = AccessFile(path)
    for number in range(50):
        for offered in ("alice:my-secret", "bob:my-secret", "my-secret", f"my-secret-{number}:x"):
            access.issue_token(f"Key {offered}", "10.0.0.1")
    lines = [record.getMessage() for record in caplog.records]
    assert [line.partition(";")[0] for line in lines] == [
        "wrong key from 10.0.0.1 for id alice",
        "wrong key from 10.0.0.1 for id bob",
        "wrong key from 10.0.0.1 for an id that no key has",
    ]
    assert "secret" not in caplog.text
    monotonic.advance(59)
    access.issue_token("Key alice:wrong", "10.0.0.2")
    assert len(caplog.records) == 3
    monotonic.advance(1)
    access.issue_token("Key alice:wrong", "10.0.0.2")
    assert caplog.records[-1].getMessage() == "wrong key from 10.0.0.2 for id alice; wrong keys since the start: 202"


@pytest.mark.parametrize("fault", ["gone", "malformed", "folder"])
def test_file_that_cannot_be_used_for_a_minute_is_named_and_then_heals(
    path: Path, monotonic: FakeClock, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    key = add_key(path, "alice")
    access = AccessFile(path)
    token = bearer(access, key)
    good = path.read_bytes()
    if fault == "malformed":
        path.write_bytes(good + b"my-secret\n")
    else:
        path.unlink()
        if fault == "folder":
            path.mkdir()
    reasons: list[str | None] = []
    for _ in range(121):
        monotonic.advance(0.5)
        reasons.append(access.health())
        assert access.permit_of_token(token) == Permit("alice")
    # The fault is seen after one second, so its minute ends after 61.
    assert reasons[:120] == [None] * 120
    monotonic.advance(0.5)
    reason = access.health()
    assert reason is not None
    assert "access file" in reason
    assert str(path) not in reason
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert "secret" not in caplog.text + reason
    if fault == "folder":
        path.rmdir()
    path.write_bytes(good)
    monotonic.advance(1)
    assert access.health() is None
    assert access.permit_of_token(token) == Permit("alice")


def test_file_that_comes_back_as_it_was_heals(tmp_path: Path, monotonic: FakeClock) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    add_key(folder / "access", "alice")
    access = AccessFile(folder / "access")
    monotonic.advance(1)
    assert access.health() is None
    folder.rename(tmp_path / "away")
    monotonic.advance(1)
    assert access.health() is None
    monotonic.advance(61)
    assert access.health() is not None
    (tmp_path / "away").rename(folder)
    monotonic.advance(1)
    assert access.health() is None


def test_reload_reads_the_file_at_once(path: Path, monotonic: FakeClock) -> None:
    key = add_key(path, "alice")
    access = AccessFile(path)
    token = bearer(access, key)
    revoke_keys(path, "alice")
    assert monotonic.now == 5_000.0
    assert access.permit_of_token(token) == Permit("alice")
    access.reload()
    assert access.permit_of_token(token) is None


def test_reload_of_a_file_that_cannot_be_used_is_logged_each_time(
    path: Path, monotonic: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    add_key(path, "alice")
    access = AccessFile(path)
    path.write_text("my-secret\n")
    access.reload()
    access.reload()
    monotonic.advance(2)
    access.health()
    assert ["line 1" in record.getMessage() for record in caplog.records] == [True, True]


def test_file_open_to_others_is_warned_of_at_the_start_and_when_it_becomes_so(
    path: Path, monotonic: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    add_key(path, "alice")
    access = AccessFile(path)
    assert not caplog.records
    path.chmod(0o640)
    for _ in range(5):
        monotonic.advance(1)
        access.health()
    assert ["chmod 600" in record.getMessage() for record in caplog.records] == [True]
    caplog.clear()
    AccessFile(path)
    assert ["chmod 600" in record.getMessage() for record in caplog.records] == [True]
