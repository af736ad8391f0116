"""What systemd hears from a server, and the sockets that it gives."""

import http.client
import os
import signal
import socket
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest
from helpers import serving

from aiokv.errors import ConfigurationError
from aiokv.server.systemd import Notifier, take_sockets

# What systemd does before it runs a service: the sockets from descriptor 3 on, and whose they are.
ACTIVATED = """
import fcntl, os, sys
given = [fcntl.fcntl(int(number), fcntl.F_DUPFD_CLOEXEC, 100) for number in sys.argv[1].split(",")]
for place, number in enumerate(given):
    os.dup2(number, 3 + place)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(given)), "LISTEN_FDNAMES": "aiokv"}
os.execv(sys.executable, [sys.executable, "-m", "aiokv", "serve", *sys.argv[2:]])
"""


class Systemd:
    """The datagram socket on which systemd listens."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        self.socket.settimeout(15)

    def hear(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.socket.recv(4096).decode().splitlines())

    def hear_next(self, name: str) -> dict[str, str]:
        while name not in (heard := self.hear()):
            pass
        return heard


@pytest.fixture
def systemd(tmp_path: Path) -> Generator[Systemd]:
    server = Systemd(str(tmp_path / "notify"))
    with server.socket:
        yield server


def get_status(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=15)
    try:
        connection.request("GET", "/livez", headers={"Connection": "close"})
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_service_tells_when_it_is_ready_reloading_and_stopping(systemd: Systemd, tmp_path: Path, workers: str) -> None:
    command = ["-m", "aiokv", "serve", "--port", "0", "--workers", workers]
    with serving(command, tmp_path, NOTIFY_SOCKET=str(tmp_path / "notify")) as process:
        ready = systemd.hear()
        assert ready["READY"] == "1"
        assert ready["STATUS"].startswith("serving sqlite:///kv.db at http://127.0.0.1:")
        assert get_status(int(ready["STATUS"].rsplit(":", 1)[1].split(",")[0])) == 200
        before = time.monotonic_ns() // 1000
        process.send_signal(signal.SIGHUP)
        reloading = systemd.hear()
        assert reloading["RELOADING"] == "1"
        assert before <= int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
        assert systemd.hear()["READY"] == "1"
        process.terminate()
        assert systemd.hear()["STOPPING"] == "1"
        assert process.wait(timeout=10) == 0


@pytest.mark.slow
@pytest.mark.parametrize("line", ["drain = 7", 'tls-cert = "absent.pem"'], ids=["taken over", "taken back"])
def test_reload_that_replaces_workers_ends_once_all_serve_again(systemd: Systemd, tmp_path: Path, line: str) -> None:
    (tmp_path / "kv.toml").write_text("workers = 2\n")
    command = ["-m", "aiokv", "serve", "--port", "0", "--config", "kv.toml"]
    with serving(command, tmp_path, NOTIFY_SOCKET=str(tmp_path / "notify")) as process:
        systemd.hear_next("READY")
        (tmp_path / "kv.toml").write_text(f"workers = 2\n{line}\n")
        process.send_signal(signal.SIGHUP)
        assert "RELOADING" in systemd.hear()
        assert systemd.hear() == {"READY": "1", "STATUS": "serving"}


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_watchdog_hears_that_the_service_lives(systemd: Systemd, tmp_path: Path, workers: str) -> None:
    command = ["-m", "aiokv", "serve", "--port", "0", "--workers", workers]
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
    with serving(command, tmp_path, **environment):
        systemd.hear_next("READY")
        for _ in range(3):
            systemd.hear_next("WATCHDOG")


def test_watchdog_of_another_process_is_not_ours() -> None:
    environment = {"NOTIFY_SOCKET": "/absent", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}
    assert Notifier(environment).watchdog_seconds is None
    ours = {"NOTIFY_SOCKET": "/absent", "WATCHDOG_USEC": "1500000", "WATCHDOG_PID": str(os.getpid())}
    assert Notifier(ours).watchdog_seconds == 1.5
    assert environment == ours == {}


@pytest.mark.skipif(sys.platform != "linux", reason="abstract addresses are Linux's")
def test_abstract_addresses_are_heard_and_absent_ones_do_no_harm() -> None:
    address = f"@aiokv-test-{os.getpid()}"
    systemd = Systemd(address)
    notifier = Notifier({"NOTIFY_SOCKET": address})
    with systemd.socket:
        notifier.status("well")
        assert systemd.hear() == {"STATUS": "well"}
    notifier.alive()
    Notifier({}).alive()


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_sockets_of_systemd_are_served_and_outlive_a_restart(tmp_path: Path, workers: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        command = ["-c", ACTIVATED, str(listener.fileno()), "--workers", workers, "--port", "1"]
        with serving(command, tmp_path, listener.fileno()) as process:
            assert process.stderr is not None
            assert f" at http://127.0.0.1:{port}" in process.stderr.readline()
            assert get_status(port) == 200
            process.terminate()
            assert process.wait(timeout=10) == 0
        with socket.create_connection(("127.0.0.1", port), timeout=15) as waiting:
            waiting.sendall(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            with serving(command, tmp_path, listener.fileno()):
                assert waiting.recv(100).startswith(b"HTTP/1.1 200 ")


def test_two_sockets_one_of_them_a_file_are_both_served(tmp_path: Path) -> None:
    path = str(tmp_path / "kv.sock")
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as file:
        file.bind(path)
        file.listen()
        command = ["-c", ACTIVATED, f"{file.fileno()},{listener.fileno()}", "--store", "memory://"]
        with serving(command, tmp_path, listener.fileno(), file.fileno()) as process:
            assert process.stderr is not None
            assert f" at unix:{path}" in process.stderr.readline()
            assert get_status(listener.getsockname()[1]) == 200
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(15)
                client.connect(path)
                client.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert client.recv(100).startswith(b"HTTP/1.1 200 ")


def test_socket_that_other_machines_reach_needs_an_access_file(tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        command = ["-c", ACTIVATED, str(listener.fileno()), "--store", "memory://"]
        with serving(command, tmp_path, listener.fileno()) as process:
            assert process.stderr is not None
            assert "binds to loopback only, not to '0.0.0.0'" in process.stderr.readline()
            assert process.wait(timeout=10) == 2


def test_what_is_no_listening_socket_is_refused(tmp_path: Path) -> None:
    left, right = socket.socketpair()
    with left, right, serving(["-c", ACTIVATED, str(left.fileno())], tmp_path, left.fileno()) as process:
        assert process.stderr is not None
        assert "descriptor 3 from systemd is no listening socket" in process.stderr.readline()
        assert process.wait(timeout=10) == 2


def test_sockets_for_another_process_are_left_alone() -> None:
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"}
    assert take_sockets(environment) == []
    assert take_sockets({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"}) == []
    assert environment == {}


def test_refused_descriptor_is_named() -> None:
    # No process has so many files open that this one exists.
    with pytest.raises(ConfigurationError, match="descriptor 3"):
        take_sockets({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1000000"})
