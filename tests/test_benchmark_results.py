"""The benchmarks run, in a form too short to mean anything, and the page of the documentation shows what was measured."""

import json
import os
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import results
from bars import draw_bars
from helpers import REPOSITORY

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="some scripts count the CPU of other processes, on Linux only")

# What a script needs beyond the development environment, by the message that it gives without.
NEEDS = r"needs Linux, and: |needs redis-server|is left out"


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", [name for name in results.SCRIPTS if name not in {"engines", "scale"}] + ["engines scale"])
def test_script_runs_and_its_figures_are_kept(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "instructions":
        # Counting takes minutes.
        monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    status = results.main(["--smoke", "--folder", str(tmp_path), "--only", *name.split()])
    output = capfd.readouterr()
    if status != 0 and re.search(NEEDS, output.err):
        pytest.skip(output.err.strip())
    assert status == 0, output.err
    (day,) = tmp_path.glob("*.json")
    measured = json.loads(day.read_text())
    assert list(measured["scripts"]) == name.split()
    assert measured["machine"]["cores"] == os.cpu_count()
    for part in name.split():
        figures = measured["scripts"][part]
        assert figures["tables"] or "is not installed" in output.out
        for table in figures["tables"]:
            assert {len(row) for row in table["rows"].values()} == {len(table["columns"])}
        ET.fromstring(draw_bars("All", figures["tables"]))
        text = results.section(part, {**figures, "machine": measured["machine"], "day": day.stem})
        assert all(row in text for table in figures["tables"] for row in table["rows"])


def test_every_script_is_run_by_one_name_or_is_a_part_of_another() -> None:
    with_main = {path.name for path in (REPOSITORY / "benchmarks").glob("*.py") if "\nif __name__" in path.read_text()}
    assert with_main - {"results.py"} - {script.file for script in results.SCRIPTS.values()} == {
        path for path in with_main if path.endswith(("_subjects.py", "_subject.py"))
    }


def test_page_shows_the_newest_figures_of_every_script(tmp_path: Path) -> None:
    page = results.PAGE.read_text(encoding="utf-8")
    assert re.findall(r"<!-- results:([\w-]+) -->", page) == ["aims", *results.SCRIPTS]
    copy = tmp_path / "benchmarks.md"
    copy.write_text(page, encoding="utf-8")
    results.write_pages(results.FOLDER, copy, tmp_path)
    assert copy.read_text(encoding="utf-8") == page
    for picture in tmp_path.glob("*.svg"):
        assert picture.read_text() == (results.PICTURES / picture.name).read_text()


def test_later_run_replaces_the_figures_of_its_own_script_alone(tmp_path: Path) -> None:
    def day(name: str, **scripts: int) -> None:
        of = {script: {"tables": [], "aims": [], "where": f"run {number}"} for script, number in scripts.items()}
        machine = {"processor": "p", "system": "s"}
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": machine, "scripts": of}))

    day("2026-01-01", client=1, server=1)
    day("2026-01-02", server=2)
    found = results.newest(tmp_path)
    assert {name: (figures["where"], figures["day"]) for name, figures in found.items()} == {
        "client": ("run 1", "2026-01-01"),
        "server": ("run 2", "2026-01-02"),
    }
    page = "a\n<!-- results:server -->\nold\n<!-- end -->\nb\n<!-- results:sets -->\nold\n<!-- end -->\n"
    renewed = results.renew(page, found)
    assert "run 2" in renewed
    assert "old" not in renewed
    assert renewed.endswith("<!-- results:sets -->\nNot measured yet.\n<!-- end -->\n")


def test_aims_that_were_missed_stand_in_the_page_as_missed() -> None:
    def aim(what: str, figure: float, *, is_met: bool) -> dict[str, object]:
        return {"what": what, "figure": figure, "aim": 1.5, "unit": "x", "is_met": is_met}

    figures = {"aims": [aim("a get", 1.2, is_met=True), aim("a set", 1.7, is_met=False)]}
    page = results.renew("<!-- results:aims -->\nold\n<!-- end -->\n", {"client": figures})
    link = "[What the client adds to aiohttp](#what-the-client-adds-to-aiohttp)"
    assert page.splitlines()[1:-1] == [
        "| aim | wanted | reached | |",
        "|---|---:|---:|---|",
        f"| {link}: a get | 1.5 x | 1.2 x | met |",
        f"| {link}: a set | 1.5 x | 1.7 x | **missed** |",
    ]


@pytest.mark.parametrize(
    ("values", "shown"), [([1.0, 2.0], "0.5 1"), ([1.0, 1_000.0], "0.09 1"), ([0.0, 5.0], "0 1"), ([0.0, 0.0], "0 0")]
)
def test_bars_are_as_long_as_their_figures_or_their_logarithms(values: list[float], shown: str) -> None:
    table = {"title": "t", "columns": ["us"], "rows": {f"n{place}": [one] for place, one in enumerate(values)}, "drawn": 0}
    widths = [float(width) for width in re.findall(r'<rect class="o" [^>]*width="([\d.]+)"', draw_bars("T", [table]))]
    longest = 760 - 270 - 80
    assert " ".join(f"{round(width / longest, 2):g}" for width in widths) == shown


def test_figures_of_a_smoke_run_never_reach_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        results.main(["--smoke", "--only", "sets"])
    assert "its figures mean nothing" in capsys.readouterr().err
