"""The files of examples/deploy, taken by the programs that they are for."""

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trustme
from helpers import REPOSITORY, clean_environment, served_process, wait_until

from aiokv.limits import MAX_VALUE_BYTES
from aiokv.server.options import resolve_options

DEPLOY = REPOSITORY / "examples" / "deploy"
BARE_KEY, QUOTED_KEY = "a//b/../c%2Fd", "a%2F%2Fb%2F..%2Fc%2Fd"


def needs(program: str, package: str) -> str:
    """Return the path of a program, or skip the test."""
    path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None:
        pytest.skip(f"{program} is not installed: apt-get install {package}")
    return path


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_units_are_what_systemd_takes(tmp_path: Path) -> None:
    analyze = needs("systemd-analyze", "systemd")
    unit = (DEPLOY / "aiokv.service").read_text()
    assert "ExecStart=/opt/aiokv/bin/aiokv serve --config /etc/aiokv/aiokv.toml\n" in unit
    (tmp_path / "aiokv.service").write_text(unit.replace("/opt/aiokv/bin/aiokv", "/bin/true"))
    shutil.copy(DEPLOY / "aiokv.socket", tmp_path)
    assert run(analyze, "verify", str(tmp_path / "aiokv.service"), str(tmp_path / "aiokv.socket")) == ""


def test_configuration_is_what_the_server_takes_and_ends_before_systemd_ends_it() -> None:
    options = resolve_options({"config": str(DEPLOY / "aiokv.toml")}, {})
    limit = re.search(r"TimeoutStopSec=(\d+)", (DEPLOY / "aiokv.service").read_text())
    assert limit is not None
    assert options.drain_delay_seconds + options.drain_seconds + 5 < int(limit[1])


def test_health_check_of_the_image_tells_a_living_server_from_a_dead_one(tmp_path: Path) -> None:
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "")
    check = re.search(r"^HEALTHCHECK .* CMD (\[.*\])$", lines, re.MULTILINE)
    assert check is not None
    _, *arguments = json.loads(check[1])
    with served_process("--store", "memory://", home=tmp_path) as (_, address):
        environment = {**clean_environment(tmp_path), "AIOKV_SERVE_PORT": address.rsplit(":", 1)[1]}
        command = [sys.executable, *arguments]
        assert subprocess.run(command, env=environment, check=False, capture_output=True).returncode == 0
    assert subprocess.run(command, env=environment, check=False, capture_output=True).returncode == 1


def test_variables_of_the_image_are_options() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    variables = dict(re.findall(r"(AIOKV_SERVE_[A-Z_]+)=(\S+)", text))
    assert resolve_options({}, variables).host == "0.0.0.0"


def test_alerts_are_what_prometheus_takes() -> None:
    assert "9 rules found" in run(needs("promtool", "prometheus"), "check", "rules", str(DEPLOY / "prometheus-rules.yml"))


def test_alerts_and_board_use_figures_that_the_server_gives() -> None:
    metrics = pytest.importorskip("aiokv.server.metrics")
    statistics = pytest.importorskip("aiokv.server.statistics")
    from aiokv.backends.base import Gauges  # noqa: PLC0415

    text = metrics.exposition(statistics.Statistics(), Gauges(0, 0, 0, 0, 0, 0, 0)).decode()
    given = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    board = json.loads((DEPLOY / "grafana-board.json").read_text())
    expressions = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    used = set(re.findall(r"aiokv_[a-z_]+", expressions + (DEPLOY / "prometheus-rules.yml").read_text()))
    assert {name.removesuffix("_bucket") for name in used} <= given


def test_panels_of_the_board_do_not_overlap() -> None:
    board = json.loads((DEPLOY / "grafana-board.json").read_text())
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        own = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not own & cells
        assert max(x for x, _ in own) < 24
        cells |= own
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def nginx(folder: Path, port: int, upstream: int, certificate: Path) -> tuple[list[str], list[str]]:
    """Return the commands that check nginx's configuration, and that run it."""
    program = needs("nginx", "nginx-light")
    text = (DEPLOY / "nginx.conf").read_text().replace("127.0.0.1:8787", f"127.0.0.1:{upstream}")
    text = text.replace("listen 8443", f"listen 127.0.0.1:{port}")
    text = re.sub(r"/etc/nginx/tls/\w+\.pem", str(certificate), text)
    temporary = "".join(f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    user = "user root;" if os.getuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"{user} daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; {temporary}\n{text} }}\n"
    )
    command = [program, "-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    return [*command, "-t"], command


def haproxy(folder: Path, port: int, upstream: int, certificate: Path) -> tuple[list[str], list[str]]:
    """Return the commands that check HAProxy's configuration, and that run it."""
    program = needs("haproxy", "haproxy")
    text = (DEPLOY / "haproxy.cfg").read_text().replace("127.0.0.1:8787", f"127.0.0.1:{upstream}")
    text = text.replace("bind :8443", f"bind 127.0.0.1:{port}").replace("/etc/haproxy/tls.pem", str(certificate))
    (folder / "haproxy.cfg").write_text(text)
    command = [program, "-f", str(folder / "haproxy.cfg")]
    return [*command, "-c"], [*command, "-db"]


def exchange(
    port: int, method: str, path: str, body: bytes | None = None, tls: ssl.SSLContext | None = None
) -> tuple[int, bytes]:
    """Send one request whose path nothing changes on its way out."""
    if tls is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=15)
    else:
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=15, context=tls)
    with contextlib.closing(connection):
        connection.request(method, path, body=body)
        answer = connection.getresponse()
        return answer.status, answer.read()


def is_up(port: int, context: ssl.SSLContext) -> bool:
    try:
        return exchange(port, "GET", "/livez", tls=context)[0] == 200
    except OSError:
        return False


@contextlib.contextmanager
def proxied(
    make: Callable[[Path, int, int, Path], tuple[list[str], list[str]]], folder: Path
) -> Generator[tuple[int, int, ssl.SSLContext]]:
    """Run a server and a proxy before it; yield the ports of both, and what trusts the proxy."""
    authority, port = trustme.CA(), free_port()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(folder / "tls.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with served_process("--store", "memory://", home=folder) as (_, address):
        upstream = int(address.rsplit(":", 1)[1])
        check, command = make(folder, port, upstream, folder / "tls.pem")
        run(*check)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: is_up(port, context))
            yield port, upstream, context
        finally:
            process.terminate()
            process.wait(timeout=10)


@pytest.mark.parametrize("make", [nginx, haproxy])
def test_proxy_passes_keys_and_the_largest_value_on_whole(
    make: Callable[[Path, int, int, Path], tuple[list[str], list[str]]], tmp_path: Path
) -> None:
    with proxied(make, tmp_path) as (port, upstream, context):
        value = b"v" * MAX_VALUE_BYTES
        assert exchange(port, "PUT", f"/set/db/{BARE_KEY}", value, context)[0] == 200
        assert exchange(upstream, "GET", f"/get/db/{QUOTED_KEY}")[1] == b'{"value":"' + value + b'"}'
        assert exchange(port, "GET", f"/get/db/{QUOTED_KEY}", tls=context)[1] == b'{"value":"' + value + b'"}'
        for merged in ("a/b/../c%2Fd", "a/c/d"):
            assert exchange(port, "GET", f"/get/db/{merged}", tls=context)[0] == 404
        longest = "k" * 7_900
        assert exchange(port, "PUT", f"/set/db/{longest}", b"long", context)[0] == 200
        assert exchange(upstream, "GET", f"/get/db/{longest}")[1] == b'{"value":"long"}'


@pytest.mark.parametrize(("make", "status"), [(nginx, 400), (haproxy, 404)])
def test_key_that_climbs_above_the_root_is_answered_as_the_documentation_says(
    make: Callable[[Path, int, int, Path], tuple[list[str], list[str]]], status: int, tmp_path: Path
) -> None:
    with proxied(make, tmp_path) as (port, _, context):
        assert exchange(port, "GET", "/get/db/..%2F..%2F..%2Fx", tls=context)[0] == status


@pytest.mark.parametrize("make", [nginx, haproxy])
def test_proxy_keeps_connections_to_the_server(
    make: Callable[[Path, int, int, Path], tuple[list[str], list[str]]], tmp_path: Path
) -> None:
    with proxied(make, tmp_path) as (port, upstream, context):
        for _ in range(10):
            assert exchange(port, "GET", "/livez", tls=context)[0] == 200
        ends = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        local = f"0100007F:{upstream:04X}"
        # Established ones at the server's end: the proxy's checks may hold one more.
        assert 1 <= sum(end[1] == local and end[3] == "01" for end in ends) <= 3


@pytest.mark.slow
def test_haproxy_waits_for_a_server_that_starts_two_seconds_later(tmp_path: Path) -> None:
    authority, port, upstream = trustme.CA(), free_port(), free_port()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "tls.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    _, command = haproxy(tmp_path, port, upstream, tmp_path / "tls.pem")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(served_process("--store", "memory://", "--port", str(upstream), home=tmp_path))[0]
        proxy = stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        stack.callback(proxy.terminate)
        wait_until(lambda: is_up(port, context))
        server.kill()
        server.wait(timeout=10)
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(exchange, port, "PUT", f"/set/db/{number}", b"v", context) for number in range(8)]
            time.sleep(2.0)
            stack.enter_context(served_process("--store", "memory://", "--port", str(upstream), home=tmp_path))
            assert [answer.result()[0] for answer in answers] == [200] * 8
