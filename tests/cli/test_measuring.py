"""`aiokv ping`, `bench`, `top` and `completion`, as a person calls them."""

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from helpers import clean_environment, served_process

from aiokv import AsyncKVStore
from aiokv.cli.histogram import Histogram, draw_svg, draw_text, format_seconds
from aiokv.cli.top import parse_metrics, summarize


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-m", "aiokv", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        encoding="utf-8",
        env={**clean_environment(folder), "PYTHONIOENCODING": "utf-8", **environment},
    )
    # On a busy machine asyncio's debug mode logs steps that took long.
    done.stderr = re.sub(r"(?m)^aiokv: Executing <.*> took [\d.]+ seconds\n", "", done.stderr)
    return done


def on_a_terminal(*arguments: str, folder: Path, **environment: str) -> str:
    """Return all that a command writes to a terminal."""
    child, terminal = pty.fork()
    if not child:
        os.chdir(folder)
        command = [sys.executable, "-m", "aiokv", *arguments]
        os.execve(sys.executable, command, {**clean_environment(folder), "TERM": "xterm", "COLUMNS": "100", **environment})
    seen = b""
    try:
        while data := os.read(terminal, 65_536):
            seen += data
    except OSError:
        # So Linux says that the other end is closed.
        pass
    finally:
        os.close(terminal)
        os.waitpid(child, 0)
    return seen.decode("utf-8", "replace")


def steps(done: "subprocess.CompletedProcess[str]") -> list[tuple[str, str]]:
    return [(line[0], line[1:].split(" ms ")[0].rsplit(None, 1)[0].strip()) for line in done.stdout.splitlines()[1:]]


@pytest.mark.slow
def test_ping_of_a_server_takes_every_step_and_leaves_nothing(tmp_path: Path) -> None:
    with served_process("--store", f"sqlite:///{tmp_path}/kv.db", home=tmp_path) as (_, address):
        done = run("ping", "--url", address, "--write", folder=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        names = ["resolve", "connect", "sign in", "gets", "set", "get", "delete"]
        assert steps(done) == [("✓", name) for name in names]
        assert "20 round trips: least" in done.stdout
        plain = run("ping", folder=tmp_path, AIOKV_URL=address, PYTHONIOENCODING="ascii")
        assert (plain.returncode, plain.stdout.isascii(), "ok " in plain.stdout) == (0, True, True)
    assert run("list", "aiokv-ping", "--url", "sqlite:///kv.db", folder=tmp_path).stdout == ""


@pytest.mark.parametrize("url", ["memory://", "sqlite:///kv.db"])
def test_ping_of_an_embedded_store_opens_it(tmp_path: Path, url: str) -> None:
    assert steps(run("ping", "--url", url, folder=tmp_path)) == [("✓", "open"), ("✓", "gets")]


@pytest.mark.slow
def test_ping_says_which_step_fails_and_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        free = listening.getsockname()[1]
    key = run("access", "add", "alice", "--read-only", "--access-file", "access", folder=tmp_path).stdout.strip()
    with (
        served_process("--store", "memory://", "--access-file", str(tmp_path / "access"), home=tmp_path) as (_, address),
        served_process("--store", "memory://", home=tmp_path) as (_, other),
    ):
        cases = [
            ("http://no-such-host.invalid", (), "", "resolve", "look at the host in the URL"),
            (f"http://127.0.0.1:{free}", (), "", "connect", "nothing listens at 127.0.0.1"),
            (address.replace("http", "https"), (), "", "TLS", "does not speak TLS"),
            (address, (), "alice:wrong", "sign in", "AIOKV_KEY"),
            (f"{other}/kv", (), "", "sign in", "look at the path in the URL"),
            (address, ("--write",), key, "set", "read-only"),
            ("sqlite:///nowhere/kv.db", (), "", "open", "make it first"),
            (f"redis+cluster://127.0.0.1:{free},localhost:{free}", (), "", "connect", "nothing listens at 127.0.0.1"),
        ]
        for url, more, secret, step, words in cases:
            done = run("ping", "--url", url, *more, folder=tmp_path, **({"AIOKV_KEY": secret} if secret else {}))
            assert done.returncode == 3, done.stdout
            assert ("✗", step) in steps(done)
            assert words in done.stdout
            assert "wrong" not in done.stdout + done.stderr
            assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_ping_names_a_certificate_that_is_not_trusted(tmp_path: Path) -> None:
    trustme = pytest.importorskip("trustme", reason="pip install trustme")
    authority = trustme.CA()
    authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "cert.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    flags = ("--store", "memory://", "--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "cert.pem"))
    with served_process(*flags, home=tmp_path) as (_, address):
        refused = run("ping", "--url", address, folder=tmp_path)
        assert (refused.returncode, steps(refused)[-1]) == (3, ("✗", "TLS"))
        assert "SSL_CERT_FILE" in refused.stdout
        trusted = run("ping", "--url", address, folder=tmp_path, SSL_CERT_FILE=str(tmp_path / "ca.pem"))
        assert trusted.returncode == 0
        assert ("✓", "TLS") in steps(trusted)


def test_bench_measures_gets_and_sets_and_cleans_up(tmp_path: Path) -> None:
    done = run(
        *("bench", "sqlite:///kv.db", "--seconds", "0.5", "--concurrency", "4", "--value-bytes", "10"),
        *("--db", "mine", "--json", "--plot", "times.svg"),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["concurrency"] == 4
    for call in result["calls"].values():
        assert call["calls"] > 0
        assert 0 < call["seconds"]["p50"] <= call["seconds"]["p90"] <= call["seconds"]["p99"] <= call["seconds"]["p99.9"]
        assert call["errors"] == {}
    assert ET.parse(tmp_path / "times.svg").getroot().tag.endswith("svg")
    assert run("list", "mine", "--url", "sqlite:///kv.db", folder=tmp_path).stdout == ""


async def test_bench_leaves_others_alone(tmp_path: Path) -> None:
    async with AsyncKVStore("mine", url=f"sqlite:///{tmp_path}/kv.db") as store:
        await store.set("k", "v")
        done = run("bench", "sqlite:///kv.db", "--seconds", "0.2", "--db", "mine", folder=tmp_path)
        assert done.returncode == 0
        assert re.search(r"get: calls by the time that they took\n +[\d.]+ (s|ms|us) █", done.stdout)
        assert (await store.get("k"), await store.count()) == ("v", 1)


@pytest.mark.slow
def test_bench_that_is_interrupted_cleans_up(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "aiokv", "bench", "sqlite:///kv.db", "--seconds", "60", "--db", "mine"],
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=clean_environment(tmp_path),
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith(b"aiokv: 1 s: get ")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=15) == 130
    process.stderr.close()
    assert run("list", "mine", "--url", "sqlite:///kv.db", folder=tmp_path).stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench",), "aiokv bench URL, or set AIOKV_URL"),
        (("bench", "memory://", "--set-share", "2"), "from 0 to 1"),
        (("bench", "memory://", "--seconds", "0"), "invalid number above 0 value"),
        (("bench", "memory://", "--value-bytes", "2000000"), "at most 1,900,000"),
        (("bench", "http://a:secret-text@localhost"), "set AIOKV_KEY in the environment"),
        (("top", "sqlite:///kv.db"), "address of a server"),
        (("top", "https://kv.fal.media"), "fal's service shows no figures"),
    ],
)
def test_what_cannot_be_measured_is_wrong_usage(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = run(*arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert "secret-text" not in done.stderr


@pytest.mark.slow
def test_top_shows_what_the_server_did_between_two_readings(tmp_path: Path) -> None:
    key = run("access", "add", "ops", "--operator", "--access-file", "access", folder=tmp_path).stdout.strip()
    with served_process("--store", "memory://", "--access-file", str(tmp_path / "access"), home=tmp_path) as (_, address):
        refused = run("top", address, "--once", folder=tmp_path)
        assert (refused.returncode, "--operator" in refused.stderr) == (3, True)
        done = run("top", address, "--once", "--json", "--interval", "0.2", folder=tmp_path, AIOKV_METRICS_KEY=key)
        assert (done.returncode, done.stderr) == (0, "")
        figures = json.loads(done.stdout)
        assert figures["verbs"]["other"] > 0
        assert (figures["connections"], figures["entries"], figures["hit_ratio"]) == (1, 0, None)
        text = run("top", address, "--once", "--interval", "0.2", folder=tmp_path, AIOKV_KEY=key).stdout
        assert re.search(r"connections +1\n", text)
    gone = run("top", address, "--once", folder=tmp_path)
    assert (gone.returncode, "aiokv ping --url" in gone.stderr) == (3, True)


def test_figures_are_those_between_two_readings_and_survive_a_new_server() -> None:
    def reading(gets: int, misses: int, slow: int) -> str:
        return (
            f'aiokv_requests_total{{status="200",verb="get"}} {gets}\naiokv_requests_total{{status="500",verb="set"}} {slow}\n'
            f"aiokv_get_hits_total {gets - misses}\naiokv_get_misses_total {misses}\naiokv_connections 3.0\n"
            f'# HELP x y\naiokv_request_seconds_bucket{{le="0.001",verb="get"}} {gets - slow}\n'
            f'aiokv_request_seconds_bucket{{le="+Inf",verb="get"}} {gets}\nbroken\n'
        )

    before, after = parse_metrics(reading(100, 50, 0)), parse_metrics(reading(300, 100, 2))
    figures = summarize(before, after, 2.0)
    assert figures["verbs"] == {"get": 100.0, "set": 1.0}
    assert (figures["hit_ratio"], figures["errors"], figures["connections"]) == (0.75, 1.0, 3.0)
    assert figures["latency"]["get"] == {"p50": 0.001, "p99": 0.001}
    assert summarize(after, before, 2.0)["verbs"] == {"get": 50.0, "set": 0.0}


def test_percentiles_are_close_and_pictures_hold_every_call() -> None:
    histogram = Histogram()
    assert histogram.percentiles() == dict.fromkeys(("p50", "p90", "p99", "p99.9"))
    assert draw_text(histogram, "#") == ""
    assert draw_svg("nothing", {"get": histogram}).endswith("</svg>\n")
    for number in range(1, 10_001):
        histogram.add(number / 1e6)
    assert histogram.percentiles() == pytest.approx({"p50": 5e-3, "p90": 9e-3, "p99": 9.9e-3, "p99.9": 9.99e-3}, rel=0.03)
    counts = [int(line.rsplit(None, 1)[1].replace(",", "")) for line in draw_text(histogram, "#").splitlines()]
    assert sum(counts) == 10_000
    picture = ET.fromstring(draw_svg("a < b", {"get": histogram}))
    assert "a < b" in "".join(picture.itertext())
    assert [format_seconds(seconds) for seconds in (None, 2.0, 0.0015, 1.5e-6)] == ["-", "2 s", "1.5 ms", "1.5 us"]


@pytest.mark.slow
def test_terminal_gets_a_bar_and_plain_text_where_it_asks_for_that(tmp_path: Path) -> None:
    pytest.importorskip("rich", reason="pip install 'aiokv[cli]'")
    (tmp_path / "r.jsonl").write_text("".join(f'{{"key": "k{number}", "value": "v"}}\n' for number in range(3_000)))
    arguments = ("import", "r.jsonl", "--db", "db", "--url", "sqlite:///kv.db")
    live = on_a_terminal(*arguments, folder=tmp_path)
    assert "3,000 rows" in live
    assert re.search(r"\x1b\[3\dm|\x1b\[38;", live)
    assert not re.search(r"\x1b\[[\d;]*3\d[\d;]*m", on_a_terminal(*arguments, folder=tmp_path, NO_COLOR="1"))
    assert "\x1b" not in on_a_terminal(*arguments, folder=tmp_path, TERM="dumb")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_script_for_a_shell_knows_every_command(tmp_path: Path, shell: str) -> None:
    pytest.importorskip("shtab", reason="pip install 'aiokv[cli]'")
    done = run("completion", shell, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("import", "revoke", "max-connections" if shell != "tcsh" else "serve"):
        assert word in done.stdout
    if shutil.which(shell) and shell != "tcsh":
        assert subprocess.run([shell, "-n"], input=done.stdout, text=True, check=False).returncode == 0


@pytest.mark.skipif(not shutil.which("bash"), reason="apt-get install bash")
def test_bash_completes_a_command(tmp_path: Path) -> None:
    pytest.importorskip("shtab", reason="pip install 'aiokv[cli]'")
    script = run("completion", "bash", folder=tmp_path).stdout
    script += 'COMP_WORDS=(aiokv expo); COMP_CWORD=1; _shtab_aiokv; echo "${COMPREPLY[@]}"\n'
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["export"]


@pytest.mark.parametrize(
    ("package", "arguments", "status", "words"),
    [
        ("shtab", ["completion", "bash"], 2, "pip install 'aiokv[cli]'"),
        ("rich", ["import", "r.jsonl", "--db", "db", "--url", "memory://"], 0, "1 row imported"),
    ],
)
def test_command_line_works_without_its_extra(
    tmp_path: Path, package: str, arguments: list[str], status: int, words: str
) -> None:
    (tmp_path / "r.jsonl").write_text('{"key": "k", "value": "v"}\n')
    program = f"import sys; sys.modules[{package!r}] = None; from aiokv.cli import main; sys.exit(main({arguments!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=clean_environment(tmp_path),
    )
    assert (done.returncode, words in done.stderr) == (status, True), done.stderr


def test_help_loads_no_command(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom aiokv.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n"
        "    print(sorted(name for name in sys.modules if name.startswith(('aiokv.cli.', 'rich', 'shtab', 'aiohttp'))))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "['aiokv.cli.terminal']"


def test_plot_replaces_an_earlier_plot_and_neither_the_store_nor_another_file(tmp_path: Path) -> None:
    url = "sqlite:///kv.db"
    assert run("set", "db", "k", "v", "--url", url, folder=tmp_path).returncode == 0
    (tmp_path / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><title>mine</title></svg>')
    for name, words in (
        ("kv.db", "is a file of the store itself"),
        ("kv.db-wal", "is a file of the store itself"),
        ("drawing.svg", "is no picture of `aiokv bench`"),
    ):
        before = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else None
        refused = run("bench", url, "--seconds", "5", "--plot", name, folder=tmp_path)
        assert (refused.returncode, words in refused.stderr) == (2, True)
        assert ((tmp_path / name).read_bytes() if (tmp_path / name).exists() else None) == before
    assert run("get", "db", "k", "--url", url, folder=tmp_path).stdout == "v"
    for _ in range(2):
        assert run("bench", url, "--seconds", "0.1", "--plot", "plot.svg", folder=tmp_path).returncode == 0
        ET.fromstring((tmp_path / "plot.svg").read_text())
