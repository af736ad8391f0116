"""The access log: what a line says and never says, and what becomes of lines that cannot be written."""

import http.client
import json
import logging
import os
import re
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import REPOSITORY, FakeClock, clean_environment, served_process, wait_until

from aiokv import clock as process_clock
from aiokv.errors import ConfigurationError
from aiokv.server import add_key
from aiokv.server.access_log import AccessLog, request_id
from aiokv.wire import TOKEN_PATH

A_WORKER = """
import sys
from aiokv.server.access_log import AccessLog

log = AccessLog(sys.argv[1])
for number in range(int(sys.argv[3])):
    log.write(request_id=f"{sys.argv[2]}-{number}", address=None, account=None, verb="get", db_name="d" * 300, key=None,
              status=200, bytes_in=0, bytes_out=9, seconds=0.001)
log.close()
"""


def write(log: AccessLog, **changes: Any) -> None:
    members: dict[str, Any] = {
        "request_id": "r1",
        "address": "192.0.2.7",
        "account": "team",
        "verb": "get",
        "db_name": "sessions",
        "key": "user:1",
        "status": 200,
        "bytes_in": 0,
        "bytes_out": 17,
        "seconds": 0.0123456,
    }
    log.write(**members | changes)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@contextmanager
def file_size_limit(size: int) -> Generator[None]:
    """Let no file grow beyond a size, as a disk does that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_says_who_asked_for_what_and_how_it_ended(tmp_path: Path) -> None:
    log = AccessLog(str(tmp_path / "log"), clock=lambda: 1_700_000_000.0625)
    write(log)
    log.close()
    [line] = read(tmp_path / "log")
    assert line == {
        "time": "2023-11-14T22:13:20.062Z",
        "request_id": "r1",
        "address": "192.0.2.7",
        "account": "team",
        "verb": "get",
        "db": "sessions",
        "status": 200,
        "bytes_in": 0,
        "bytes_out": 17,
        "ms": 12.346,
    }


def test_the_time_of_a_line_follows_the_clock(tmp_path: Path) -> None:
    clock = FakeClock(1_700_000_000.999)
    log = AccessLog(str(tmp_path / "log"), clock=clock)
    for seconds in (0.0, 0.001, 86_400.0, -90_000.0):
        clock.advance(seconds)
        write(log)
    log.close()
    assert [line["time"] for line in read(tmp_path / "log")] == [
        "2023-11-14T22:13:20.999Z",
        "2023-11-14T22:13:21.000Z",
        "2023-11-15T22:13:21.000Z",
        "2023-11-14T21:13:21.000Z",
    ]


def test_keys_are_there_only_where_asked_for(tmp_path: Path) -> None:
    for name, log_keys in (("without", False), ("with", True)):
        log = AccessLog(str(tmp_path / name), log_keys=log_keys)
        write(log, key='a"b\n')
        log.close()
    assert "user" not in (tmp_path / "without").read_text()
    assert "key" not in read(tmp_path / "without")[0]
    assert read(tmp_path / "with")[0]["key"] == 'a"b\n'


def test_a_text_with_line_breaks_stays_on_one_line(tmp_path: Path) -> None:
    log = AccessLog(str(tmp_path / "log"))
    write(log, db_name='x\r\n{"status":200}\u2028', account=None, address=None)
    log.close()
    [line] = read(tmp_path / "log")
    assert (line["db"], line["account"], line["address"]) == ('x\r\n{"status":200}\u2028', None, None)


def test_a_text_that_is_no_unicode_costs_its_line_alone(tmp_path: Path) -> None:
    log = AccessLog(str(tmp_path / "log"))
    write(log, db_name="\ud800")
    write(log)
    log.close()
    assert len(read(tmp_path / "log")) == 1
    assert log.dropped == 1


def test_lines_come_out_without_a_further_request(tmp_path: Path) -> None:
    log = AccessLog(str(tmp_path / "log"), flush_seconds=0.01)
    for number in range(3):
        write(log, request_id=str(number))
        wait_until(lambda number=number: len(read(tmp_path / "log")) == number + 1)
    log.close()


def test_a_burst_is_written_without_waiting_for_the_time(tmp_path: Path) -> None:
    log = AccessLog(str(tmp_path / "log"), flush_seconds=3_600.0)
    for _ in range(2_000):
        write(log)
    wait_until(lambda: (tmp_path / "log").stat().st_size > 0)
    log.close()
    assert len(read(tmp_path / "log")) == 2_000


def test_the_end_flushes_and_a_second_end_is_harmless(tmp_path: Path) -> None:
    log = AccessLog(str(tmp_path / "log"), flush_seconds=3_600.0)
    write(log)
    log.close()
    log.close()
    assert len(read(tmp_path / "log")) == 1
    write(log)
    assert log.dropped == 1


def test_a_file_that_is_there_is_appended_to(tmp_path: Path) -> None:
    for number in range(2):
        log = AccessLog(str(tmp_path / "log"))
        write(log, request_id=str(number))
        log.close()
    assert [line["request_id"] for line in read(tmp_path / "log")] == ["0", "1"]
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) & 0o137 == 0


def test_a_rotated_file_is_left_for_a_new_one(tmp_path: Path) -> None:
    log = AccessLog(str(tmp_path / "log"), flush_seconds=3_600.0)
    write(log, request_id="before")
    (tmp_path / "log").rename(tmp_path / "log.1")
    log.reopen()
    wait_until((tmp_path / "log").exists)
    write(log, request_id="after")
    log.close()
    assert [line["request_id"] for line in read(tmp_path / "log.1")] == ["before"]
    assert [line["request_id"] for line in read(tmp_path / "log")] == ["after"]


def test_a_file_that_cannot_be_opened_anew_is_written_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "folder").mkdir()
    log = AccessLog(str(tmp_path / "folder" / "log"))
    (tmp_path / "folder").rename(tmp_path / "elsewhere")
    log.reopen()
    wait_until(lambda: "cannot be opened anew" in caplog.text)
    write(log)
    log.close()
    assert len(read(tmp_path / "elsewhere" / "log")) == 1


@pytest.mark.parametrize("name", ["absent/log", "folder"])
def test_a_path_that_cannot_be_a_log_is_an_error_at_the_start(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigurationError, match=r"access log .* cannot be opened: (No such file|Is a directory)"):
        AccessLog(str(tmp_path / name))


def test_a_pipe_without_a_reader_is_an_error_at_the_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        AccessLog(str(tmp_path / "pipe"))


def test_a_full_disk_costs_lines_and_one_warning_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = FakeClock()
    monkeypatch.setattr(process_clock, "monotonic", now)
    counted: list[int] = []
    log = AccessLog("/dev/full", flush_seconds=0.0, on_dropped=counted.append)
    caplog.set_level(logging.WARNING, "aiokv.server")
    for number in range(1, 6):
        write(log)
        wait_until(lambda number=number: log.dropped == number)
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text
    now.advance(61)
    write(log)
    wait_until(lambda: len(caplog.records) == 2)
    log.close()
    assert "6 by now" in caplog.text
    assert (log.dropped, sum(counted)) == (6, 6)
    assert "sessions" not in caplog.text


def test_after_a_full_disk_lines_are_whole_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = AccessLog(str(path), flush_seconds=0.0)
    write(log, request_id="first")
    wait_until(lambda: path.stat().st_size > 0)
    line_bytes = path.stat().st_size
    with file_size_limit(2 * line_bytes + line_bytes // 2):
        for number in range(10):
            write(log, request_id=f"{number:05}")
        wait_until(lambda: log.dropped == 9)
    for number in range(10, 15):
        write(log, request_id=f"{number:05}")
    log.close()
    lines = path.read_text().splitlines()
    whole = [json.loads(line)["request_id"] for line in lines if line.endswith("}")]
    assert whole == ["first", "00000", *(f"{number:05}" for number in range(10, 15))]
    assert len(lines) == len(whole) + 1
    assert log.dropped == 9


def test_a_pipe_that_nobody_reads_delays_no_request_and_no_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    log = AccessLog(str(tmp_path / "pipe"), flush_seconds=0.0, max_buffered_bytes=100_000)
    slowest = 0.0
    for _ in range(3_000):
        before = time.monotonic()
        write(log)
        slowest = max(slowest, time.monotonic() - before)
    assert slowest < 2.0
    assert log.dropped > 0
    before = time.monotonic()
    log.close(timeout_seconds=0.05)
    assert time.monotonic() - before < 2.0
    # The batch under way ends once there is a reader, then the pipe ends.
    received = b""
    os.set_blocking(reader, True)
    while chunk := os.read(reader, 1 << 20):
        received += chunk
    os.close(reader)
    assert all(json.loads(line) for line in received.splitlines())
    assert received.count(b"\n") + log.dropped >= 3_000


def test_a_closed_pipe_costs_lines_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    log = AccessLog(str(tmp_path / "pipe"), flush_seconds=0.0)
    os.close(reader)
    write(log)
    wait_until(lambda: log.dropped == 1)
    assert "Broken pipe" in caplog.text
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write(log, request_id="heard")
    log.close()
    assert json.loads(os.read(reader, 10_000))["request_id"] == "heard"
    os.close(reader)


def _run_worker(path: str, name: str, lines: int, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", A_WORKER, path, name, str(lines)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        **options,
    )


def test_standard_output_takes_the_lines_of_a_dash() -> None:
    process = _run_worker("-", "w", 3, stdout=subprocess.PIPE)
    output, _ = process.communicate()
    assert [json.loads(line)["request_id"] for line in output.splitlines()] == ["w-0", "w-1", "w-2"]


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo])
def test_the_lines_of_several_workers_stay_whole(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "log"
    make(path)
    # Opened for both, so that a pipe has a reader before the workers begin, and no end between two of them.
    with path.open("rb+", buffering=0) as opened:
        workers = [_run_worker(str(path), str(number), 2_000) for number in range(3)]
        received = b""
        if path.is_fifo():
            while received.count(b"\n") < 6_000:
                received += opened.read(1 << 20)
        assert [worker.wait() for worker in workers] == [0, 0, 0]
    ids = [json.loads(line)["request_id"] for line in (received or path.read_bytes()).splitlines()]
    assert sorted(ids) == sorted(f"{worker}-{number}" for worker in range(3) for number in range(2_000))


@pytest.mark.parametrize("offered", ["a", "x" * 128, "req-1/2:3+4=", "with space", "~!#%&()*"])
def test_the_clients_id_is_echoed(offered: str) -> None:
    assert request_id(offered) == offered


@pytest.mark.parametrize("offered", [None, "", "x" * 129, 'a"b', "a'b", "a\nb", "a\n", "ü", "\x7f", "a\x00", "a\tb"])
def test_an_id_that_could_confuse_a_reader_is_replaced(offered: str | None) -> None:
    made = request_id(offered)
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert made != request_id(offered)


def ask(address: str, method: str, path: str, **headers: str) -> int:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    with closing(connection):
        connection.request(method, path, headers=headers)
        return connection.getresponse().status


def test_pages_are_logged_with_their_path_and_tokens_with_their_account(tmp_path: Path) -> None:
    key = add_key(tmp_path / "access", "team")
    arguments = ("--store", "memory://", "--access-file", "access", "--access-log", "log")
    with served_process(*arguments, home=tmp_path) as (_, address):
        assert ask(address, "GET", "/livez?secret") == 200
        assert ask(address, "GET", "/status") == 401
        assert ask(address, "GET", "/unknown") == 404
        assert ask(address, "POST", TOKEN_PATH, Authorization=f"Key {key}") == 200
        assert ask(address, "POST", TOKEN_PATH, Authorization="Key team:wrong") == 401
        wait_until(lambda: (tmp_path / "log").read_bytes().count(b"\n") == 5)
    lines = [(line["verb"], line.get("path"), line["account"]) for line in read(tmp_path / "log")]
    assert lines == [
        ("other", "/livez", None),
        ("other", "/status", None),
        ("other", None, None),
        ("token", None, "team"),
        ("token", None, None),
    ]


@pytest.mark.parametrize("name", ["kv.db", "kv.db-wal", "kv.db-ballast", "link", "access"])
def test_a_log_that_is_another_file_of_the_server_is_refused(tmp_path: Path, name: str) -> None:
    key = add_key(tmp_path / "access", "alice")
    (tmp_path / "link").symlink_to("kv.db")
    before = (tmp_path / "access").read_bytes()
    options = ("--store", f"sqlite:///{tmp_path}/kv.db", "--access-file", str(tmp_path / "access"), "--port", "0")
    done = subprocess.run(
        [sys.executable, "-m", "aiokv", "serve", *options, "--access-log", str(tmp_path / name)],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
        env=clean_environment(tmp_path),
    )
    assert (done.returncode, "is another file of this server" in done.stderr) == (2, True), done.stderr
    assert key not in done.stderr
    assert (tmp_path / "access").read_bytes() == before
    assert not (tmp_path / "kv.db-wal").exists()
