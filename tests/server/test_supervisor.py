"""Several workers behind one address: who is started again, when, and what clients see of it."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from helpers import served_process, serving, wait_until

from aiokv.errors import ConfigurationError
from aiokv.server import add_key
from aiokv.server.listening import CAN_SHARE_OUT, listen
from aiokv.server.options import ServerOptions
from aiokv.server.seat import Seat
from aiokv.server.supervisor import RestartWait

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the tests find workers in /proc")

WORKERS = ("--workers", "2")
# A worker is hung after a second.
IMPATIENT = "import sys, aiokv.server.supervisor as s; s.HANG_SECONDS = 1.5; from aiokv.cli import main; sys.exit(main())"


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


def read_until(process: subprocess.Popen[str], words: str) -> str:
    assert process.stderr is not None
    lines = ""
    while words not in lines:
        line = process.stderr.readline()
        assert line, lines
        lines += line
    return lines


def port_of(address: str) -> int:
    return int(address.rsplit(":", 1)[1])


def ask(port: int, path: str = "/livez") -> int:
    """Send one request on a connection of its own, without any retry."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=15)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        return connection.getresponse().status
    finally:
        connection.close()


@contextlib.contextmanager
def asking_all_the_time(port: int) -> Generator[Callable[[], int]]:
    """Ask from two threads; yield what counts the answers; raise the first failure at the end."""
    done, answers, failures = threading.Event(), [0, 0], []

    def run(index: int) -> None:
        while not done.is_set():
            try:
                assert ask(port) == 200
            except Exception as error:  # noqa: BLE001 (raised below)
                failures.append(error)
                return
            answers[index] += 1

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(answers))]
    for thread in threads:
        thread.start()
    try:
        yield lambda: sum(answers)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "kv.toml"
    path.write_text("workers = 2\ndrain = 5\n")
    return path


def test_waits_grow_to_ten_seconds_and_shrink_after_a_good_minute() -> None:
    wait = RestartWait()
    waits = [wait.next(59.0) for _ in range(9)]
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0])
    assert wait.next(60.0) == 0.1
    assert wait.next(0.0) == 0.2
    assert [wait.next(0.0, 0.5) for _ in range(3)] == [0.4, 0.5, 0.5]


def test_seat_reaches_a_worker_whole_and_once() -> None:
    descriptors = [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]
    channel, *listeners, statistics = descriptors
    options = ServerOptions(workers=3, max_connections=7, access_file="f")
    seat = Seat(options.__dict__, channel, tuple(listeners), statistics, 2, 4, waits=True)
    environment: dict[str, str] = {}
    seat.put(environment)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, True)
    assert Seat.take(environment) == seat
    assert seat.server_options == options
    assert not any(os.get_inheritable(descriptor) for descriptor in descriptors)
    assert Seat.take(environment) is None
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.mark.slow
def test_dead_worker_is_started_again_and_the_others_go_on(tmp_path: Path) -> None:
    with served_process(*WORKERS, home=tmp_path) as (process, address):
        first, second = workers_of(process)
        os.kill(first, signal.SIGKILL)
        lines = read_until(process, "next start")
        assert lines == f"aiokv: worker {first} ended by signal 9; the next start is in 0.1 s\n"
        wait_until(lambda: len(workers_of(process)) == 2)
        assert second in workers_of(process)
        assert first not in workers_of(process)
        assert all(ask(port_of(address)) == 200 for _ in range(20))


@pytest.mark.slow
def test_values_are_the_same_in_every_worker(tmp_path: Path) -> None:
    with served_process(*WORKERS, home=tmp_path) as (_, address):
        for number in range(10):
            connection = http.client.HTTPConnection("127.0.0.1", port_of(address), timeout=15)
            connection.request("PUT", "/set/db/k", body=str(number))
            assert connection.getresponse().status == 200
            connection.close()
            connection = http.client.HTTPConnection("127.0.0.1", port_of(address), timeout=15)
            connection.request("GET", "/get/db/k")
            assert connection.getresponse().read() == f'{{"value":"{number}"}}'.encode()
            connection.close()


@pytest.mark.skipif(not CAN_SHARE_OUT, reason="only Linux shares connections out")
def test_connections_are_spread_over_the_workers(tmp_path: Path) -> None:
    with served_process(*WORKERS, home=tmp_path) as (process, address), contextlib.ExitStack() as opened:

        def sockets(pid: int) -> int:
            return sum(str(link.readlink()).startswith("socket:") for link in Path(f"/proc/{pid}/fd").iterdir())

        before = {pid: sockets(pid) for pid in workers_of(process)}
        for _ in range(64):
            opened.enter_context(socket.create_connection(("127.0.0.1", port_of(address)), timeout=15))
        wait_until(lambda: sum(sockets(pid) - count for pid, count in before.items()) == 64)
        # Below 12 of 64 by chance: once in ten million runs.
        assert all(sockets(pid) - count >= 12 for pid, count in before.items())


@contextlib.contextmanager
def unfinished_set(address: str) -> Generator[None]:
    """Begin a set whose body does not come; a worker has read its head."""
    with socket.create_connection(("127.0.0.1", port_of(address)), timeout=15) as connection:
        head = b"PUT /set/db/k HTTP/1.1\r\nHost: 127.0.0.1\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        yield


def alive_of(workers: list[int]) -> int:
    return sum(is_alive(pid) for pid in workers)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_to_the_whole_group_end_no_request(tmp_path: Path, number: signal.Signals) -> None:
    with served_process(*WORKERS, "--drain", "60", "--grace", "60", home=tmp_path) as (process, address):
        workers = workers_of(process)
        with unfinished_set(address):
            process.send_signal(number)
            read_until(process, "stopping, finishing what is under way")
            wait_until(lambda: alive_of(workers) == 1)
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            # Time enough for the worker to end, which it must not.
            time.sleep(0.3)
            assert alive_of(workers) == 1
            with pytest.raises(ConnectionRefusedError):
                ask(port_of(address))
        assert process.wait(timeout=10) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_second_signal_ends_all_at_once(tmp_path: Path, number: signal.Signals, status: int) -> None:
    with served_process(*WORKERS, "--drain", "60", "--grace", "60", home=tmp_path) as (process, address):
        workers = workers_of(process)
        with unfinished_set(address):
            process.send_signal(number)
            read_until(process, "stopping, finishing what is under way")
            wait_until(lambda: alive_of(workers) == 1)
            # One at once is the same signal again.
            process.send_signal(number)
            time.sleep(0.6)
            assert process.poll() is None
            process.send_signal(number)
            assert process.wait(timeout=10) == status
        assert alive_of(workers) == 0


@pytest.mark.slow
def test_workers_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    with served_process(*WORKERS, home=tmp_path) as (process, address):
        workers = workers_of(process)
        process.kill()
        process.wait()
        wait_until(lambda: not any(is_alive(pid) for pid in workers))
        with pytest.raises(ConnectionRefusedError):
            ask(port_of(address))


@pytest.mark.slow
def test_changed_configuration_replaces_workers_one_by_one_and_refuses_nobody(tmp_path: Path, file: Path) -> None:
    with served_process("--config", str(file), home=tmp_path) as (process, address):
        before = set(workers_of(process))
        file.write_text("workers = 2\ndrain = 6\n")
        with asking_all_the_time(port_of(address)) as count_answers:
            process.send_signal(signal.SIGHUP)
            most = 0
            thread = threading.Thread(target=read_until, args=(process, "all workers are replaced"))
            thread.start()
            while thread.is_alive():
                most = max(most, len(workers_of(process)))
                time.sleep(0.005)
            thread.join()
            reached = count_answers()
            wait_until(lambda: count_answers() > reached)
        after = set(workers_of(process))
        assert (len(before), len(after), before & after) == (2, 2, set())
        # Each new worker came before the old one left, and one at a time.
        assert most == 3
        process.terminate()
        assert process.wait(timeout=10) == 0


@pytest.mark.slow
def test_configuration_with_which_no_worker_starts_is_taken_back(tmp_path: Path, file: Path) -> None:
    with served_process("--config", str(file), home=tmp_path) as (process, address):
        before = workers_of(process)
        file.write_text('workers = 2\ntls-cert = "absent.pem"\n')
        process.send_signal(signal.SIGHUP)
        lines = read_until(process, "is taken back")
        assert "TLS file absent.pem does not exist" in lines
        wait_until(lambda: workers_of(process) == before)
        assert ask(port_of(address)) == 200
        process.send_signal(signal.SIGHUP)
        read_until(process, "replaced one by one")
        read_until(process, "is taken back")
        assert workers_of(process) == before


@pytest.mark.slow
def test_configuration_that_is_cut_short_opens_the_server_to_nobody(tmp_path: Path, file: Path) -> None:
    add_key(tmp_path / "access", "alice")
    whole = file.read_text()
    file.write_text(f"{whole}access-file = 'access'\n")
    with served_process("--config", str(file), home=tmp_path) as (process, address):
        before = workers_of(process)
        file.write_text(whole)
        process.send_signal(signal.SIGHUP)
        lines = read_until(process, "reloaded access file")
        assert "the present one stays: access-file is no longer there; to serve without it needs a restart" in lines
        assert workers_of(process) == before
        assert ask(port_of(address), "/get/db/k") == 401


@pytest.mark.slow
def test_pipe_in_place_of_the_configuration_holds_the_supervisor_up_for_nothing(tmp_path: Path, file: Path) -> None:
    with served_process("--config", str(file), home=tmp_path) as (process, _):
        file.unlink()
        os.mkfifo(file)
        process.send_signal(signal.SIGHUP)
        lines = read_until(process, "to reload")
        assert "the present one stays: " in lines
        process.terminate()
        assert process.wait(timeout=10) == 0


@pytest.mark.slow
def test_workers_wait_two_seconds_at_most_for_an_access_file_to_be_fixed(tmp_path: Path) -> None:
    access = tmp_path / "access"
    add_key(access, "alice")
    whole = access.read_text()
    with served_process(*WORKERS, "--access-file", str(access), home=tmp_path) as (process, address):
        access.write_text(whole[:-20])
        for pid in workers_of(process):
            os.kill(pid, signal.SIGKILL)
        lines = read_until(process, "next start is in 2 s").splitlines()
        assert f"none can start: access file {access} is malformed" in lines[-1]
        waits = [line.rsplit(" is in ", 1)[1] for line in lines if " next start is in " in line]
        assert {"0.1 s", "0.2 s", "0.4 s", "0.8 s", "1.6 s", "2 s"} == set(waits)
        access.write_text(whole)
        wait_until(lambda: len(workers_of(process)) == 2, timeout_seconds=20)
        assert ask(port_of(address)) == 200


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("workers = 2\ndrain = soon\n", "the configuration is not reloaded, the present one stays: "),
        ("workers = 3\ndrain = 5\n", "changed, and in force after a restart: workers"),
        ("workers = 2\ndrain = 5\n", "nothing to reload"),
    ],
)
def test_reload_without_a_usable_change_keeps_the_workers(text: str, words: str, tmp_path: Path, file: Path) -> None:
    with served_process("--config", str(file), home=tmp_path) as (process, address):
        before = workers_of(process)
        file.write_text(text)
        process.send_signal(signal.SIGHUP)
        assert words in read_until(process, "nothing to reload")
        assert workers_of(process) == before
        assert ask(port_of(address)) == 200


@pytest.mark.slow
def test_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    with served_process(*WORKERS, home=tmp_path, command=("-c", IMPATIENT)) as (process, address):
        first, second = workers_of(process)
        os.kill(first, signal.SIGSTOP)
        assert f"worker {first} has hung" in read_until(process, "next start")
        wait_until(lambda: len(workers_of(process)) == 2)
        assert second in workers_of(process)
        assert all(ask(port_of(address)) == 200 for _ in range(10))


def test_store_that_cannot_be_opened_fails_the_start_with_one_message(tmp_path: Path) -> None:
    with serving(["-m", "aiokv", "serve", "--port", "0", *WORKERS, "--store", "sqlite:///absent/kv.db"], tmp_path) as process:
        assert process.wait(timeout=15) == 2
        assert process.stderr is not None
        assert process.stderr.read().count("absent does not exist; make it first") == 1


SLOW_TO_OPEN = """
import asyncio, os, sys
import aiokv.backends.sqlite as m
from aiokv.cli import main
first_open = m.SqliteBackend._open
async def slow(*arguments):
    print("opened", file=sys.stderr, flush=True)
    await asyncio.sleep(0.5)
    print("in order", file=sys.stderr, flush=True)
    return await first_open(*arguments)
m.SqliteBackend._open = slow
sys.exit(main())
"""


def test_one_worker_opens_the_store_before_the_others(tmp_path: Path) -> None:
    with serving(["-c", SLOW_TO_OPEN, "serve", "--port", "0", "--workers", "3"], tmp_path) as process:
        lines = read_until(process, "serving").splitlines()
    assert lines[:2] == ["opened", "in order"]
    assert len(lines) == 7


def test_port_of_another_server_with_workers_is_refused(tmp_path: Path) -> None:
    with served_process(*WORKERS, home=tmp_path) as (_, address):
        port = str(port_of(address))
        with serving(["-m", "aiokv", "serve", "--port", port, *WORKERS], tmp_path) as process:
            assert process.stderr is not None
            assert f"cannot listen on 127.0.0.1 port {port}: " in process.stderr.readline()
            assert process.wait(timeout=10) == 2


def test_each_worker_has_the_counters_of_all(tmp_path: Path) -> None:
    with served_process(*WORKERS, home=tmp_path) as (process, _):

        def counters(pid: int) -> set[int]:
            links = Path(f"/proc/{pid}/fd").iterdir()
            return {link.stat().st_ino for link in links if "aiokv statistics" in str(link.readlink())}

        files = [counters(pid) for pid in (process.pid, *workers_of(process))]
        assert len(files[0]) == 1
        assert files.count(files[0]) == 3


def test_name_with_several_addresses_is_bound_at_one_port_for_each_worker() -> None:
    listeners = listen("localhost", 0, 2)
    try:
        ports = {bound.getsockname()[1] for listener in listeners for bound in listener.sockets}
        assert len(ports) == 1
        assert {host for listener in listeners for host in listener.hosts} <= {"127.0.0.1", "::1"}
    finally:
        for bound in (bound for listener in listeners for bound in listener.sockets):
            bound.close()


@pytest.mark.skipif(not CAN_SHARE_OUT, reason="only Linux shares connections out")
def test_connections_pass_over_a_worker_that_cannot_start() -> None:
    failing, well = listen("127.0.0.1", 0, 2)
    port = well.sockets[0].getsockname()[1]
    failing.close()
    try:
        well.sockets[0].settimeout(5)
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                well.sockets[0].accept()[0].close()
        failing.open()
        assert failing.sockets[0].getsockname()[1] == port
    finally:
        for listener in (failing, well):
            for bound in listener.sockets:
                bound.close()


@pytest.mark.parametrize(("host", "port"), [("256.0.0.1", 0), ("a" * 70, 0)])
def test_address_that_cannot_be_bound_is_named(host: str, port: int) -> None:
    with pytest.raises(ConfigurationError, match=f"cannot listen on {host} port {port}: "):
        listen(host, port, 2)


@pytest.mark.slow
def test_script_that_calls_the_command_line_is_run_again_for_its_workers(tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    script.write_text("import sys\nfrom aiokv.cli import main\nsys.exit(main(['serve', '--port', '0', '--workers', '2']))\n")
    with serving([str(script)], tmp_path) as process:
        assert ", 2 workers" in read_until(process, "serving")
        assert len(workers_of(process)) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0
