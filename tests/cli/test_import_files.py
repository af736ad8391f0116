"""Which files `aiokv import` and `aiokv export` write to, which they refuse, and what they say of them."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import clean_environment, served_process, wait_until

URL = "sqlite:///kv.db"


def run(*arguments: str, folder: Path, stdin: str = "", url: str = URL, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aiokv", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        timeout=30,
        env={**clean_environment(folder), "AIOKV_URL": url, **environment},
    )


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of a shell in which `$AIOKV` is the command."""
    environment = {**clean_environment(folder), "AIOKV_URL": URL, "AIOKV": f"{sys.executable} -m aiokv"}
    return subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, check=False, cwd=folder, env=environment, timeout=30
    )


def write_rows(path: Path, count: int) -> None:
    path.write_text("".join(f'{{"key": "k{n}", "value": "secret-value"}}\n' for n in range(count)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a store and rows."""
    assert run("set", "db", "k", "v", folder=tmp_path).returncode == 0
    write_rows(tmp_path / "rows.jsonl", 3)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--failed", "kv.db"), "is a file of the store itself"),
        (("--failed", "./kv.db-wal"), "is a file of the store itself"),
        (("--failed", "link"), "is a file of the store itself"),
        (("--failed", "rows.jsonl"), "has another part in this import"),
        (("--failed", "r", "--resume", "r"), "has another part in this import"),
        (("--failed", "rows.jsonl.aiokv-resume"), "has another part in this import"),
        (("--resume", "kv.db-shm"), "is a file of the store itself"),
        (("--resume", "kv.db-ballast"), "is a file of the store itself"),
        (("--failed", "elsewhere/kv.db-wal", "--url", "sqlite:///link"), "is a file of the store itself"),
        (("--failed", "noted"), "is no file of rows that an import left out"),
        (("--failed", "other notes"), "is no file of rows that an import left out"),
        (("--resume", "."), "name a file by --resume PATH"),
        (("--failed", "brace"), "is no file of rows that an import left out"),
        (("--failed", "letter"), "is no file of rows that an import left out"),
        (("--failed", "pipe"), "is no file that rows can be noted in"),
        (("--failed", "."), "is no file that rows can be noted in"),
        (("--resume", "pipe"), "is no resume file"),
        (("--failed", "absent/notes"), "--failed PATH"),
    ],
)
def test_import_writes_to_no_file_that_has_another_part(folder: Path, arguments: tuple[str, ...], words: str) -> None:
    note = '{"line": 1, "key": "k", "reason": "x"}\n'
    (folder / "letter").write_text('{"key": "k", "value": "v"}\n')
    (folder / "brace").write_text("{")
    (folder / "noted").write_text(f"{note}mine\n")
    (folder / "other notes").write_text(f'{note}{{"line": 2, "key": "k", "reason": "x", "value": "mine"}}\n')
    (folder / "elsewhere").symlink_to(".")
    (folder / "link").symlink_to("kv.db")
    os.mkfifo(folder / "pipe")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    done = run("import", "rows.jsonl", "--db", "db", *arguments, folder=folder)
    assert done.returncode in {2, 3}
    assert words in done.stderr
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_standard_input_from_a_file_is_not_written_to(folder: Path) -> None:
    done = shell("$AIOKV import - --db db --failed rows.jsonl < rows.jsonl", folder)
    assert (done.returncode, "has another part" in done.stderr) == (2, True)
    assert (folder / "rows.jsonl").stat().st_size


@pytest.mark.parametrize("end", ['{"line": 2, "ke', '{"li', "\0\0\0"])
def test_notes_whose_last_one_was_cut_off_are_notes(folder: Path, end: str) -> None:
    (folder / "notes").write_text(f'{{"line": 1, "key": "k", "reason": "x"}}\n{end}')
    done = run("import", "rows.jsonl", "--db", "db", "--failed", "notes", folder=folder)
    assert done.returncode == 0, done.stderr


def test_notes_of_an_earlier_import_are_replaced(folder: Path) -> None:
    (folder / "rows.jsonl").write_text('{"key": "k"}\n')
    for _ in range(2):
        assert run("import", "rows.jsonl", "--db", "db", "--failed", "notes", folder=folder).returncode == 1
        assert [json.loads(line)["line"] for line in (folder / "notes").read_text().splitlines()] == [1]
    write_rows(folder / "rows.jsonl", 1)
    assert run("import", "rows.jsonl", "--db", "db", "--failed", "notes", folder=folder).returncode == 0
    assert not (folder / "notes").exists()


def test_device_gets_notes_and_stays(folder: Path) -> None:
    assert run("import", "rows.jsonl", "--db", "db", "--failed", "/dev/null", folder=folder).returncode == 0
    assert Path("/dev/null").is_char_device()
    (folder / "rows.jsonl").write_text('{"key": "k"}\n')
    full = run("import", "rows.jsonl", "--db", "db", "--failed", "/dev/full", folder=folder)
    assert full.returncode == 3
    assert "stopped: /dev/full: No space left on device; make room" in full.stderr
    assert Path("/dev/full").is_char_device()


def test_damaged_resume_file_is_replaced_where_the_import_begins_again(folder: Path) -> None:
    resume = folder / "rows.jsonl.aiokv-resume"
    for content in ("", '{\n  "kind": "aiokv import",\n  "form', "\0\0\0", "\x17\x03random"):
        resume.write_text(content)
        refused = run("import", "rows.jsonl", "--db", "db", folder=folder)
        assert (refused.returncode, "begin again with --restart" in refused.stderr) == (2, True)
        assert run("import", "rows.jsonl", "--db", "db", "--restart", folder=folder).returncode == 0


@pytest.mark.slow
def test_second_import_of_the_same_file_is_refused_while_the_first_one_runs(folder: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-m", "aiokv", "import", "-", "--db", "db", "--resume", "r", "--failed", "f", "--quiet"],
        cwd=folder,
        env={**clean_environment(folder), "AIOKV_URL": URL},
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until((folder / "r").exists)
        for options in (("--resume", "r", "--failed", "other"), ("--resume", "other", "--failed", "f")):
            second = run("import", "rows.jsonl", "--db", "db", *options, folder=folder)
            assert (second.returncode, "another import uses" in second.stderr) == (2, True)
        assert (folder / "r").exists()
    finally:
        first.send_signal(signal.SIGINT)
        assert first.wait(timeout=10) == 130
        assert first.stdin is not None
        first.stdin.close()
    assert run("import", "rows.jsonl", "--db", "db", "--resume", "r", "--failed", "f", folder=folder).returncode == 0


def checkpoint_of(folder: Path, url: str, **environment: str) -> str:
    """Return the resume file of standard input that ends in the middle, as a store that fails leaves it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "aiokv", "import", "-", "--db", "db", "--resume", "r", "--quiet"],
        cwd=folder,
        env={**clean_environment(folder), "AIOKV_URL": url, **environment},
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    process.stdin.write(b"".join(f'{{"key": "k{n}", "value": "v"}}\n'.encode() for n in range(1_000)))
    process.stdin.flush()
    resume = folder / "r"
    wait_until(lambda: resume.exists() and json.loads(resume.read_text())["done"]["stored"] > 0)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    process.stdin.close()
    return resume.read_text()


@pytest.mark.slow
def test_resume_file_of_another_account_is_refused(tmp_path: Path) -> None:
    keys = [
        run("access", "add", name, "--access-file", "access", folder=tmp_path).stdout.strip()
        for name in ("alice", "bob", "alice")
    ]
    rows = "".join(f'{{"key": "k{n}", "value": "v"}}\n' for n in range(1_500))
    with served_process("--store", "memory://", "--access-file", str(tmp_path / "access"), home=tmp_path) as (_, address):
        content = checkpoint_of(tmp_path, address, AIOKV_KEY=keys[0])
        assert not any(part in content for key in keys for part in key.split(":"))
        arguments = ("import", "-", "--db", "db", "--resume", "r")
        other = run(*arguments, folder=tmp_path, stdin=rows, url=address, AIOKV_KEY=keys[1])
        assert (other.returncode, "another store, namespace or account (account)" in other.stderr) == (2, True)
        same = run(*arguments, folder=tmp_path, stdin=rows, url=address, AIOKV_KEY=keys[2])
        assert (same.returncode, "going on behind row 1,000" in same.stderr) == (0, True)


@pytest.mark.slow
def test_import_of_a_pipe_goes_on_with_the_same_rows_of_a_file(tmp_path: Path) -> None:
    content = checkpoint_of(tmp_path, URL)
    rows = [f'{{"key": "k{n}", "value": "v"}}\n' for n in range(1_500)]
    for name, text in (("same", "".join(rows)), ("other", "".join(rows[1:]))):
        (tmp_path / name).write_text(text)
    for line, status, words in (
        ("import - --db db --resume r < same", 0, "1,500 rows imported"),
        ("import same --db db --resume r", 0, "1,500 rows imported"),
        ("import - --db db --resume r < other", 2, "are not those that were imported before"),
        ("import other --db db --resume r", 2, "are not those that were imported before"),
    ):
        (tmp_path / "r").write_text(content)
        done = shell(f"$AIOKV {line}", tmp_path)
        assert (done.returncode, words in done.stderr) == (status, True), done.stderr


def test_closed_standard_input_is_said_to_be_closed(folder: Path) -> None:
    done = shell("$AIOKV import - --db db <&-", folder)
    assert (done.returncode, "standard input is closed" in done.stderr) == (2, True)


@pytest.mark.slow
def test_import_does_not_go_on_into_a_new_file_where_the_store_is_gone(tmp_path: Path) -> None:
    checkpoint_of(tmp_path, URL)
    (tmp_path / "kv.db").rename(tmp_path / "away.db")
    rows = "".join(f'{{"key": "k{n}", "value": "v"}}\n' for n in range(1_500))
    refused = run("import", "-", "--db", "db", "--resume", "r", folder=tmp_path, stdin=rows)
    assert (refused.returncode, "which is gone" in refused.stderr) == (2, True)
    assert not (tmp_path / "kv.db").exists()
    again = run("import", "-", "--db", "db", "--resume", "r", "--restart", folder=tmp_path, stdin=rows)
    assert (again.returncode, "1,500 rows imported" in again.stderr) == (0, True)


@pytest.mark.parametrize("name", ["kv.db", "kv.db-wal", "kv.db-ballast", "link"])
def test_export_over_the_store_that_it_reads_is_refused(folder: Path, name: str) -> None:
    (folder / "link").symlink_to("kv.db")
    done = run("export", "--db", "db", "-o", name, folder=folder)
    assert (done.returncode, "is a file of the store itself" in done.stderr) == (2, True)
    assert run("get", "db", "k", folder=folder).stdout == "v"


def test_export_to_standard_output_by_its_device_keeps_what_is_there(folder: Path) -> None:
    done = shell("echo before > out; $AIOKV export --db db -o /dev/stdout >> out", folder)
    assert done.returncode == 0, done.stderr
    lines = (folder / "out").read_text().splitlines()
    assert (lines[0], len(lines)) == ("before", 2)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_export_to_standard_output_by_its_device_goes_into_a_pipe(folder: Path, name: str) -> None:
    (folder / "link").symlink_to("/dev/stdout")
    done = run("export", "--db", "db", "-o", name, folder=folder)
    assert (done.returncode, done.stderr) == (0, "aiokv: 1 row exported\n")
    assert json.loads(done.stdout)["key"] == "k"


def test_export_to_an_open_pipe_of_the_shell_is_written(folder: Path) -> None:
    done = shell("$AIOKV export --db db -o /dev/fd/7 7>&1 >&2 2>/dev/null | cat", folder)
    assert json.loads(done.stdout)["key"] == "k"


def test_export_takes_over_what_a_killed_one_has_left(folder: Path) -> None:
    (folder / "out.jsonl.aiokv-new").write_text("the beginning of an export that was longer than this one\n" * 100)
    assert run("export", "--db", "db", "-o", "out.jsonl", folder=folder).returncode == 0
    assert json.loads((folder / "out.jsonl").read_text())["key"] == "k"
    assert (folder / "out.jsonl").stat().st_mode & 0o777 == 0o600
    assert not (folder / "out.jsonl.aiokv-new").exists()


def test_export_writes_through_no_file_that_has_another_name_too(folder: Path) -> None:
    (folder / "other").write_text("mine")
    (folder / "out.jsonl.aiokv-new").hardlink_to(folder / "other")
    done = run("export", "--db", "db", "-o", "out.jsonl", folder=folder)
    assert (done.returncode, "out.jsonl.aiokv-new is in the way" in done.stderr) == (2, True)
    assert (folder / "other").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user; run the tests as root")
def test_export_writes_into_no_file_of_another_user(folder: Path) -> None:
    (folder / "out.jsonl.aiokv-new").write_text("")
    os.chown(folder / "out.jsonl.aiokv-new", 65_534, -1)
    done = run("export", "--db", "db", "-o", "out.jsonl", folder=folder)
    assert (done.returncode, "it is another user's" in done.stderr) == (2, True)
    assert (folder / "out.jsonl.aiokv-new").read_text() == ""


def test_export_that_another_one_writes_is_refused_and_left_alone(folder: Path) -> None:
    with (folder / "out.jsonl.aiokv-new").open("w") as other:
        other.write("other")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        done = run("export", "--db", "db", "-o", "out.jsonl", folder=folder)
    assert (done.returncode, "another export uses" in done.stderr) == (2, True)
    assert (folder / "out.jsonl.aiokv-new").read_text() == "other"


def test_export_does_not_write_json_lines_into_a_file_that_is_called_csv(folder: Path) -> None:
    done = run("export", "--db", "db", "-o", "out.CSV", folder=folder)
    assert (done.returncode, "ends in .jsonl" in done.stderr) == (2, True)
    assert not (folder / "out.CSV").exists()


def test_names_of_files_are_shown_and_not_obeyed_by_a_terminal(folder: Path) -> None:
    name = "a\x1b[31m\naiokv: done"
    (folder / name).write_text('{"key": "k"}\n')
    for arguments in (
        ("import", name, "--db", "db"),
        ("import", f"{name}x", "--db", "db"),
        ("export", "--db", "db", "-o", f"absent/{name}"),
        ("check", name),
        ("backup", f"absent/{name}"),
        ("access", "list", "--access-file", name),
        ("get", "db", "k", f"--x{name}"),
    ):
        done = run(*arguments, folder=folder)
        assert r"\x1b[31m\naiokv: done" in done.stderr
        assert "\x1b" not in done.stderr


def test_full_disk_is_named_with_the_file(folder: Path) -> None:
    done = run("export", "--db", "db", "-o", "/dev/full", folder=folder)
    assert done.returncode == 3
    assert re.search(r"/dev/full: No space left on device; make room", done.stderr)


def test_first_row_of_csv_without_a_header_is_not_shown(folder: Path) -> None:
    (folder / "rows.csv").write_text("k,secret-value\nk2,v\n")
    done = run("import", "rows.csv", "--db", "db", folder=folder)
    assert (done.returncode, "must name the columns" in done.stderr) == (2, True)
    assert "secret-value" not in done.stderr


def test_rows_of_csv_that_are_too_large_are_left_out_and_the_rest_goes_on(folder: Path) -> None:
    large, lines = "x" * 4_194_305, "x,\n" * 1_500_000
    text = f'key,value\na,v\nb,{large}\nc,"{lines}"\nd,{"y" * 13_000_000}\ne,v\n'
    (folder / "rows.csv").write_text(text)
    done = run("import", "rows.csv", "--db", "csv", folder=folder)
    assert (done.returncode, "2 rows imported, 3 left out" in done.stderr) == (1, True), done.stderr
    noted = [json.loads(line) for line in (folder / "rows.csv.failed.jsonl").read_text().splitlines()]
    assert [row["line"] for row in noted] == [3, 4, 1_500_005]
    assert run("list", "csv", folder=folder).stdout.count("\n") == 2


def test_bad_rows_of_csv_say_what_is_wrong_in_words_of_csv(folder: Path) -> None:
    (folder / "rows.csv").write_bytes(b"key,value,ttl\na,v,6_0\nb,\xff,60\nc,v\rw,60\n")
    assert run("import", "rows.csv", "--db", "csv", folder=folder).returncode == 1
    noted = [json.loads(line)["reason"] for line in (folder / "rows.csv.failed.jsonl").read_text().splitlines()]
    assert "its ttl is no decimal number of seconds" in noted[0]
    assert "not UTF-8" in noted[1]
    assert "carriage return" in noted[2]
