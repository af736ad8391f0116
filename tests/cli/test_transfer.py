"""`aiokv import` and `aiokv export`: what comes back, what is left out, and where an import goes on."""

import contextlib
import io
import json
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import clean_environment, served_process, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from aiokv import AsyncKVStore, cli
from aiokv.cli.rows import CsvRows, JsonRows, Position, Row

URL = "sqlite:///kv.db"
KEYS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda key: key not in {".", ".."}
)
VALUES = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)


def run(*arguments: str, folder: Path, stdin: str = "", url: str = URL, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-m", "aiokv", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**clean_environment(folder), "AIOKV_URL": url, **environment},
    )
    # On a busy machine asyncio's debug mode logs steps that took long.
    done.stderr = re.sub(r"(?m)^aiokv: Executing <.*> took [\d.]+ seconds\n", "", done.stderr)
    return done


def write_rows(path: Path, count: int, start: int = 0) -> None:
    path.write_text("".join(f'{{"key": "k{n}", "value": "v{n}"}}\n' for n in range(start, start + count)))


def stored(folder: Path) -> int:
    with contextlib.closing(sqlite3.connect(folder / "kv.db")) as connection:
        return int(connection.execute("SELECT count(*) FROM entries_v2").fetchone()[0])


def failed(path: Path) -> list[tuple[int, str | None, str]]:
    return [(row["line"], row["key"], row["reason"]) for row in map(json.loads, path.read_text().splitlines())]


async def test_exported_entries_are_imported_as_they_were(tmp_path: Path) -> None:
    values = {
        "é😀\n\t\u2028\x1b[2J": "line\nline\r\n\0\u202e",
        "large": "é" * 950_000,
        "large ascii": '\\"\x01' * 633_333,
        'quo"te,': "",
    }
    async with AsyncKVStore("db", url=f"sqlite:///{tmp_path}/kv.db") as store:
        await store.set_many(values, 3600)
        await store.set("soon", "v", 60)
    done = run("export", "--db", "db", "-o", "out.jsonl", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "aiokv: 5 rows exported\n")
    assert (tmp_path / "out.jsonl").stat().st_mode & 0o777 == 0o600
    assert run("import", "out.jsonl", "--db", "copy", folder=tmp_path).returncode == 0
    async with AsyncKVStore("copy", url=f"sqlite:///{tmp_path}/kv.db") as store:
        assert await store.get_many([*values, "soon"]) == {**values, "soon": "v"}
    lines = [json.loads(line) for line in run("export", "--db", "copy", "--prefix", "l", folder=tmp_path).stdout.splitlines()]
    assert [line["key"] for line in lines] == ["large", "large ascii"]
    assert all(3500 < line["ttl"] <= 3600 for line in lines)


@pytest.mark.slow
@settings(max_examples=15)
@given(st.dictionaries(KEYS, VALUES, max_size=8))
def test_export_then_import_is_the_identity(entries: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out, url = f"{folder}/out.jsonl", f"sqlite:///{folder}/kv.db"
        rows = "".join(json.dumps({"key": key, "value": value}) + "\n" for key, value in entries.items())
        Path(folder, "in.jsonl").write_text(rows)
        with contextlib.redirect_stderr(io.StringIO()):
            assert cli.main(["import", f"{folder}/in.jsonl", "--db", "a", "--url", url]) == 0
            assert cli.main(["export", "--db", "a", "-o", out, "--url", url]) == 0
            assert cli.main(["import", out, "--db", "b", "--url", url]) == 0
            assert cli.main(["export", "--db", "b", "-o", f"{folder}/again.jsonl", "--url", url]) == 0
        read = [json.loads(line) for line in Path(folder, "again.jsonl").read_bytes().splitlines()]
        assert {row["key"]: row["value"] for row in read} == entries


async def test_rows_of_csv_are_those_that_a_spreadsheet_shows(tmp_path: Path) -> None:
    text = '\ufeffvalue,key,ttl\r\n"a ""b"",\r\nc",k1,\r\n\r\né,k2,100\r\n,k3,60\n'
    (tmp_path / "rows.CSV").write_text(text, newline="")
    done = run("import", "rows.CSV", "--db", "db", folder=tmp_path)
    assert (done.returncode, done.stderr.split(" (")[0]) == (0, "aiokv: 3 rows imported")
    async with AsyncKVStore("db", url=f"sqlite:///{tmp_path}/kv.db") as store:
        assert await store.get_many(["k1", "k2", "k3"]) == {"k1": 'a "b",\r\nc', "k2": "é", "k3": ""}


def test_bad_rows_are_left_out_and_noted_without_their_values(tmp_path: Path) -> None:
    rows = [
        '{"key": "good", "value": "v"}',
        '{"key": "secret',
        '["key"]',
        '{"key": "short", "value": "v", "ttl": 59}',
        '{"key": "no value"}',
        '{"key": "typing", "value": "v", "tll": 60}',
        '{"key": "number", "value": 1}',
        '{"key": "", "value": "v"}',
        '{"key": "surrogate", "value": "\\ud800secret"}',
        json.dumps({"key": "large", "value": "s" * 1_900_001}),
        '{"key": "text", "value": "v", "ttl": "60"}',
        "  ",
        '{"key": "last", "value": "v"}',
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    done = run("import", "rows.jsonl", "--db", "db", folder=tmp_path)
    assert done.returncode == 1
    assert "2 rows imported, 10 left out: see rows.jsonl.failed.jsonl" in done.stderr
    noted = failed(tmp_path / "rows.jsonl.failed.jsonl")
    assert [line for line, _, _ in noted] == list(range(2, 12))
    reasons = {key: reason for _, key, reason in noted if key}
    assert "from 60 to" in reasons["short"]
    assert "no value" in reasons["no value"]
    assert "'tll'" in reasons["typing"]
    assert "must be str, not int" in reasons["number"]
    assert "1,900,001 bytes" in reasons["large"]
    assert "secret" not in (tmp_path / "rows.jsonl.failed.jsonl").read_text() + done.stderr
    assert not (tmp_path / "rows.jsonl.aiokv-resume").exists()
    assert stored(tmp_path) == 2


def test_rows_of_csv_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b'key,value,ttl\na,v\nb,\xff,60\nc,"v"x,60\nd,v,6_0\ne,v,60\n')
    done = run("import", "rows.csv", "--db", "db", folder=tmp_path)
    assert done.returncode == 1
    assert [line for line, _, _ in failed(tmp_path / "rows.csv.failed.jsonl")] == [2, 3, 4, 5]
    (tmp_path / "open.csv").write_text('key,value\na,"' + "x\n" * 3_000_000)
    done = run("import", "open.csv", "--db", "db", folder=tmp_path)
    assert done.returncode == 3
    assert "a quote is not closed" in done.stderr
    (tmp_path / "header.csv").write_text("k,v\n1,2\n")
    done = run("import", "header.csv", "--db", "db", folder=tmp_path)
    assert (done.returncode, "must name the columns" in done.stderr) == (2, True)


async def test_later_of_two_rows_with_one_key_wins(tmp_path: Path) -> None:
    lines = "".join(f'{{"key": "k{n % 7}", "value": "{n}"}}\n' for n in range(6_000))
    (tmp_path / "rows.jsonl").write_text(lines)
    assert run("import", "rows.jsonl", "--db", "db", folder=tmp_path).returncode == 0
    async with AsyncKVStore("db", url=f"sqlite:///{tmp_path}/kv.db") as store:
        assert sorted(map(int, (await store.get_many([f"k{n}" for n in range(7)])).values())) == list(range(5_993, 6_000))


def test_row_that_names_no_ttl_gets_that_of_the_option(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 1)
    assert run("import", "rows.jsonl", "--db", "db", "--ttl", "100", folder=tmp_path).returncode == 0
    assert 0 < int(run("ttl", "db", "k0", folder=tmp_path).stdout) <= 100


def interrupted(folder: Path, number: signal.Signals, *arguments: str) -> int:
    """Import rows, and stop it once it has begun; return its exit status."""
    process = subprocess.Popen(
        [sys.executable, "-m", "aiokv", "import", *arguments, "--db", "db"],
        cwd=folder,
        env={**clean_environment(folder), "AIOKV_URL": URL},
        stderr=subprocess.DEVNULL,
    )
    resume = folder / "rows.jsonl.aiokv-resume"
    wait_until(lambda: resume.exists() and json.loads(resume.read_text())["done"]["stored"] > 0)
    process.send_signal(number)
    return process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_interrupted_import_goes_on_where_it_stopped(tmp_path: Path, number: signal.Signals, status: int) -> None:
    write_rows(tmp_path / "rows.jsonl", 150_000)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("bad row\n")
    assert interrupted(tmp_path, number, "rows.jsonl") == status
    done = json.loads((tmp_path / "rows.jsonl.aiokv-resume").read_text())["done"]
    # What is written down is stored; after a kill at most the 4 batches that were under way are more than that.
    assert 0 < done["stored"] <= stored(tmp_path) <= done["stored"] + (0 if number == signal.SIGINT else 4_000)
    assert stored(tmp_path) < 150_000
    again = run("import", "rows.jsonl", "--db", "db", folder=tmp_path)
    assert f"going on behind row {done['position']['rows']:,} " in again.stderr
    assert (again.returncode, "150,000 rows imported, 1 left out" in again.stderr) == (1, True)
    assert stored(tmp_path) == 150_000
    assert failed(tmp_path / "rows.jsonl.failed.jsonl")[0][0] == 150_001
    assert not (tmp_path / "rows.jsonl.aiokv-resume").exists()


@pytest.mark.slow
def test_changed_input_or_another_target_is_refused_until_it_begins_again(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 150_000)
    interrupted(tmp_path, signal.SIGINT, "rows.jsonl")
    other = run("import", "rows.jsonl", "--db", "other", folder=tmp_path)
    assert (other.returncode, "is of another store, namespace or account (db)" in other.stderr) == (2, True)
    write_rows(tmp_path / "rows.jsonl", 10, start=5)
    changed = run("import", "rows.jsonl", "--db", "db", folder=tmp_path)
    assert changed.returncode == 2
    assert "has changed (size, modified, digest)" in changed.stderr
    assert "--restart" in changed.stderr
    assert run("import", "rows.jsonl", "--db", "db", "--restart", folder=tmp_path).returncode == 0


def test_standard_input_goes_on_by_the_number_of_rows(tmp_path: Path) -> None:
    rows = [f'{{"key": "k{n}", "value": "v"}}\n' for n in range(3_000)]
    full = run("import", "-", "--db", "db", "--resume", "r", folder=tmp_path, stdin="".join(rows))
    assert (full.returncode, (tmp_path / "r").exists()) == (0, False)
    reader = JsonRows(io.BytesIO("".join(rows).encode()), "db", None, digests=True)
    end = reader.read_batch(1_000, 10**9).end
    identity = {"input": {"format": "jsonl"}, "target": {"url": f"sqlite:///{tmp_path}/kv.db", "db": "db"}}
    done = {"position": end._asdict(), "stored": 1_000, "failed": 0, "failed_bytes": 0}
    content = json.dumps({"kind": "aiokv import", "format": 1, **identity, "done": done})
    (tmp_path / "r").write_text(content)
    again = run("import", "-", "--db", "db", "--resume", "r", folder=tmp_path, stdin="".join(rows))
    assert (again.returncode, "3,000 rows imported" in again.stderr) == (0, True)
    (tmp_path / "r").write_text(content)
    other = run("import", "-", "--db", "db", "--resume", "r", folder=tmp_path, stdin="".join(rows[1:]))
    assert (other.returncode, "are not those that were imported before" in other.stderr) == (2, True)


def test_interrupt_ends_an_import_that_waits_for_standard_input(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-m", "aiokv", "import", "-", "--db", "db", "--resume", "r"],
        cwd=tmp_path,
        env={**clean_environment(tmp_path), "AIOKV_URL": URL},
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write(b"".join(b'{"key": "k%d", "value": "v"}\n' % number for number in range(1_000)))
    process.stdin.flush()
    wait_until(lambda: (tmp_path / "r").exists() and json.loads((tmp_path / "r").read_text())["done"]["stored"] > 0)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert process.stderr.read().decode().startswith("aiokv: interrupted; 1,000 rows imported")
    process.stdin.close()
    process.stderr.close()


def test_file_that_is_no_resume_file_is_not_overwritten(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 1)
    for content, option in (("letter", "--restart"), ('{"kind": "aiokv import", "format": 1}', "--quiet"), ("[]", "--restart")):
        (tmp_path / "mine").write_text(content)
        done = run("import", "rows.jsonl", "--db", "db", "--resume", "mine", option, folder=tmp_path)
        assert (done.returncode, "is no resume file" in done.stderr) == (2, True)
        assert (tmp_path / "mine").read_text() == content


@pytest.mark.slow
def test_full_quota_and_refused_key_stop_the_import_and_keep_the_resume_file(tmp_path: Path) -> None:
    def access(*arguments: str) -> str:
        return run("access", *arguments, "--access-file", "access", folder=tmp_path).stdout.strip()

    key, reader = access("add", "alice"), access("add", "alice", "--read-only")
    access("limit", "alice", "--max-entries", "9000")
    write_rows(tmp_path / "rows.jsonl", 12_000)
    with served_process("--store", "memory://", "--access-file", str(tmp_path / "access"), home=tmp_path) as (_, address):
        refused = run("import", "rows.jsonl", "--db", "db", folder=tmp_path, url=address, AIOKV_KEY=reader)
        assert refused.returncode == 3
        assert "stopped: " in refused.stderr
        assert "0 rows imported; run the same command again" in refused.stderr
        full = run("import", "rows.jsonl", "--db", "db", folder=tmp_path, url=address, AIOKV_KEY=key)
        assert full.returncode == 3
        assert "507" in full.stderr
        assert json.loads((tmp_path / "rows.jsonl.aiokv-resume").read_text())["done"]["stored"] in range(1_000, 9_001)
        access("limit", "alice", "--max-entries", "none")
        wait_until(
            lambda: run("import", "rows.jsonl", "--db", "db", folder=tmp_path, url=address, AIOKV_KEY=key).returncode == 0
        )
        listed = run("list", "db", folder=tmp_path, url=address, AIOKV_KEY=key)
        assert len(listed.stdout.splitlines()) == 12_000


@given(st.lists(st.sampled_from(["ok", "bad", "", "quoted"]), max_size=30), st.integers(1, 7))
def test_reading_on_at_any_position_misses_and_repeats_nothing(kinds: list[str], size: int) -> None:
    text = {"ok": 'k{},"v"\n', "bad": "k{}\n", "": "\n", "quoted": 'k{},"a\n""b"\n'}
    data = ("key,value\n" + "".join(text[kind].format(number) for number, kind in enumerate(kinds))).encode()
    json_text = {"ok": '{{"key":"k{}","value":"v"}}\n', "bad": "{{\n", "": " \n", "quoted": '{{"key":"k{}","value":"\\n"}}\n'}
    json_data = "".join(json_text[kind].format(number) for number, kind in enumerate(kinds)).encode()
    for kind, content in ((CsvRows, data), (JsonRows, json_data)):
        whole = kind(io.BytesIO(content), "db", None, digests=False).read_batch(1_000, 10**9)
        rows: list[object] = []
        position: Position | None = None
        is_last = False
        while not is_last:
            reader = kind(io.BytesIO(content), "db", None, digests=False)
            if position is not None:
                reader.seek(position)
            batch = reader.read_batch(size, 10**9)
            rows += sorted([*batch.rows, *batch.bad], key=lambda row: row.line)
            position, is_last = batch.end, batch.is_last
        assert rows == sorted([*whole.rows, *whole.bad], key=lambda row: row.line)
        assert position == whole.end
        assert len(rows) == sum(kind != "" for kind in kinds)
        assert sum(isinstance(row, Row) for row in rows) == sum(kind in {"ok", "quoted"} for kind in kinds)


def test_export_that_fails_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("before")
    done = run("export", "--db", "db", "-o", "out", folder=tmp_path, url="http://127.0.0.1:1")
    assert done.returncode == 3
    assert (tmp_path / "out").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
