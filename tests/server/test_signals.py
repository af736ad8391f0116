"""`aiokv serve` as one process: what signals do to it."""

import contextlib
import http.client
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest
import trustme
from helpers import served_process, serving, wait_until

from aiokv.errors import ConfigurationError
from aiokv.server import add_key
from aiokv.server.serve import server_tls

FOREVER = ("--drain", "60", "--grace", "60")


@contextlib.contextmanager
def unfinished_set(address: str) -> Generator[socket.socket]:
    """Begin a set whose body does not come; the server has read the head."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"PUT /set/db/k HTTP/1.1\r\nHost: {host}\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        yield connection


def refuses(address: str) -> bool:
    host, port = address.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_second_signal_ends_a_server_that_waits_for_a_request(number: signal.Signals, status: int, tmp_path: Path) -> None:
    with (
        served_process("--store", "memory://", *FOREVER, home=tmp_path) as (process, address),
        unfinished_set(address),
    ):
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(address))
        assert process.poll() is None
        assert process.stderr is not None
        assert "stopping" in process.stderr.readline()
        # One that comes sooner is the first again.
        time.sleep(0.6)
        process.send_signal(number)
        assert process.wait(timeout=5) == status
        assert process.stderr.readline() == "aiokv: ended at once by a second signal; cut 1 open connection\n"


def test_two_signals_at_once_are_one(tmp_path: Path) -> None:
    with (
        served_process("--store", "memory://", *FOREVER, home=tmp_path) as (process, address),
        unfinished_set(address) as connection,
    ):
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: refuses(address))
        connection.sendall(b"value")
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        assert process.wait(timeout=10) == 0


@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_server_that_cannot_store_says_so_once_at_the_start(tmp_path: Path, workers: int) -> None:
    options = ["--port", "0", "--store", f"sqlite:///{tmp_path}/kv.db", "--min-free-bytes", "1000T", "--workers", str(workers)]
    with serving(["-m", "aiokv", "serve", *options], tmp_path) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(2)]
        process.terminate()
        lines += process.stderr.readlines()
        assert process.wait(timeout=10) == 0
    assert sum("serving" in line for line in lines) == 1
    assert sum(line.startswith("aiokv: warning: not ready: ") for line in lines) == 1


def test_certificate_without_its_key_is_refused_with_the_way_out(tmp_path: Path) -> None:
    issued = trustme.CA().issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "chain.pem")
    with pytest.raises(ConfigurationError, match=r"chain\.pem has no key in it; pass --tls-key"):
        server_tls(str(tmp_path / "chain.pem"), None)


def test_signal_before_the_start_is_through_ends_it(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import asyncio, aiokv.backends.memory as m, sys\n"
        "async def get(*_):\n"
        "    print('opening', file=sys.stderr, flush=True)\n"
        "    await asyncio.sleep(3600)\n"
        "m.MemoryBackend.get = get\n"
    )
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with serving(["-m", "aiokv", "serve", "--port", "0", "--store", "memory://"], tmp_path, PYTHONPATH=path) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "opening\n"
        process.terminate()
        assert process.wait(timeout=10) == 0


def certificate(folder: Path, authority: trustme.CA) -> tuple[str, ...]:
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path(folder / "new.pem")
    # In one step, so that the server never reads half a file.
    (folder / "new.pem").replace(folder / "tls.pem")
    return ("--tls-cert", str(folder / "tls.pem"))


def answers_as(address: str, authority: trustme.CA) -> bool:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    host, port = address.removeprefix("https://").split(":")
    connection = http.client.HTTPSConnection(host, int(port), timeout=10, context=context)
    try:
        connection.request("GET", "/livez")
        return connection.getresponse().status == 200
    except ssl.SSLCertVerificationError:
        return False
    finally:
        connection.close()


@pytest.mark.slow
def test_hangup_takes_a_new_certificate_and_keeps_the_old_one_where_the_new_one_is_broken(tmp_path: Path) -> None:
    first, second = trustme.CA(), trustme.CA()
    arguments = ("--store", "memory://", *certificate(tmp_path, first))
    with served_process(*arguments, home=tmp_path) as (process, address):
        assert process.stderr is not None
        assert answers_as(address, first)
        (tmp_path / "tls.pem").write_text("broken")
        process.send_signal(signal.SIGHUP)
        assert "not reloaded, what was read before stays: " in process.stderr.readline()
        assert answers_as(address, first)
        certificate(tmp_path, second)
        process.send_signal(signal.SIGHUP)
        assert process.stderr.readline() == "aiokv: reloaded certificate\n"
        assert answers_as(address, second)
        assert not answers_as(address, first)


def test_hangup_says_that_changed_options_count_after_a_restart(tmp_path: Path) -> None:
    (tmp_path / "kv.toml").write_text("drain = 1")
    with served_process("--store", "memory://", "--config", "kv.toml", home=tmp_path) as (process, _):
        assert process.stderr is not None
        (tmp_path / "kv.toml").write_text("drain = 2\ngrace = 9")
        process.send_signal(signal.SIGHUP)
        line = process.stderr.readline()
        assert line.startswith("aiokv: nothing to reload: ")
        assert line.endswith("; changed, and in force after a restart: grace, drain\n")
        (tmp_path / "kv.toml").write_text("drain = soon")
        process.send_signal(signal.SIGHUP)
        assert "not reloaded, what was read before stays: configuration file kv.toml" in process.stderr.readline()


WITH_TERMINAL = (
    "import os, sys; os.setsid(); os.dup2(os.open(sys.argv[1], os.O_RDWR), 0); os.execv(sys.executable, sys.argv[2:])"
)


@pytest.mark.skipif(sys.platform != "linux", reason="the first terminal that is opened becomes the controlling one on Linux")
@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("--workers", "2")])
def test_server_ends_with_its_terminal(tmp_path: Path, workers: tuple[str, ...]) -> None:
    terminal, slave = os.openpty()
    launcher = ("-c", WITH_TERMINAL, os.ttyname(slave), sys.executable, "-m", "aiokv")
    with served_process("--store", f"sqlite:///{tmp_path}/kv.db", *workers, home=tmp_path, command=launcher) as (process, _):
        os.close(slave)
        os.close(terminal)
        assert process.wait(timeout=10) == 0


@pytest.mark.slow
def test_start_line_says_which_loop_runs(tmp_path: Path) -> None:
    pytest.importorskip("uvloop")
    path = tmp_path / "absent"
    path.mkdir()
    (path / "sitecustomize.py").write_text("import sys; sys.modules['uvloop'] = None\n")
    for hidden in (False, True):
        folders = [str(path)] * hidden + [os.environ.get("PYTHONPATH", "")]
        arguments = ["-m", "aiokv", "serve", "--port", "0", "--store", "memory://"]
        with serving(arguments, tmp_path, PYTHONPATH=os.pathsep.join(folders)) as process:
            assert process.stderr is not None
            assert (", uvloop" in process.stderr.readline()) != hidden


@pytest.mark.slow
def test_plain_http_for_other_machines_warns(tmp_path: Path) -> None:
    add_key(tmp_path / "access", "alice")
    serve = ["-m", "aiokv", "serve", "--port", "0", "--host", "0.0.0.0", "--access-file", "access"]
    with serving(serve, tmp_path) as process:
        assert process.stderr is not None
        assert "--insecure-http" in process.stderr.readline()
        assert process.wait(timeout=10) == 2
    with serving([*serve, "--insecure-http"], tmp_path) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("aiokv: warning: plain HTTP at '0.0.0.0'")
        assert " at http://0.0.0.0:" in process.stderr.readline()


def test_drain_pause_is_kept(tmp_path: Path) -> None:
    with served_process("--store", "memory://", "--drain-delay", "0.5", home=tmp_path) as (process, address):
        began = time.monotonic()
        process.terminate()
        assert not refuses(address)
        assert process.wait(timeout=10) == 0
        assert time.monotonic() - began >= 0.5
