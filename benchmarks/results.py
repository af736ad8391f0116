"""Run the benchmarks, keep their figures, and renew the tables and pictures of the documentation from them.

Each day has a file in `benchmarks/results/`; a script that is run again replaces its own figures of that day. The page
`docs/benchmarks.md` shows the newest figures of each script, between the marks `<!-- results:NAME -->` and `<!-- end -->`.

  python benchmarks/results.py                       run all, on an idle machine
  python benchmarks/results.py --only client server  run some
  python benchmarks/results.py --pages               run none; renew the page and the pictures
"""

import argparse
import datetime as dt
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from bars import draw_bars, number
from harness import REPOSITORY

FOLDER = REPOSITORY / "benchmarks" / "results"
PAGE = REPOSITORY / "docs" / "benchmarks.md"
PICTURES = REPOSITORY / "docs" / "pictures"
# Whose versions the figures depend on.
PACKAGES = (
    *("aiohttp", "orjson", "tenacity", "httptools", "uvloop", "redis", "py-key-value-aio", "fal", "httpx", "hishel"),
    *("aiocache", "async-lru", "cachebox", "cashews", "aiohttp-client-cache"),
)
# A script's exit status: its aims are met; some are not; it could not run.
MET, MISSED = 0, 1


class Script(NamedTuple):
    """A benchmark: what it answers, how it is run, and how it is only tried."""

    file: str
    title: str
    smoke: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    # Of another script, whose figures it starts from: `{figures}` stands for their file.
    figures_of: str | None = None


SCRIPTS = {
    "client": Script("client_overhead.py", "What the client adds to aiohttp", ("--batches", "1", "--calls", "50")),
    "sets": Script("sqlite_sets.py", "Durable sets through SQLite", ("--batches", "1", "--sets", "100")),
    "batches": Script(
        "batches.py",
        "Many keys at once",
        ("--only", "at once", "bulk", "--calls", "64", "--keys", "1000", "--rounds", "1"),
    ),
    "imports": Script("import_time.py", "What an import costs", ("--only", "time", "--batches", "1")),
    "decorator": Script(
        "decorator.py",
        "A hit of kv_cached, in CPU",
        ("--batches", "1", "--calls", "200", "--store-calls", "50", "--concurrency", "1"),
    ),
    "instructions": Script("instructions.py", "A hit and a miss of kv_cached, in instructions", ("--only", "server")),
    "linearity": Script("linearity.py", "What is served after an invalidation", ("--seconds", "2"), ("--seconds", "60")),
    "blocking": Script("blocking.py", "Blocking calls", ("--smoke", "--only", "threads")),
    "http": Script("http_responses.py", "HTTP responses from a store", ("--calls", "50", "--batches", "1")),
    "imported": Script(
        "import_rows.py",
        "Imports that are interrupted",
        ("--rows", "20000", "--rounds", "1", "--stops", "1", "--longest", "1", "--only", "sqlite"),
    ),
    "outage": Script("outage.py", "A store that is away", ("--only", "cached", "--seconds", "2", "--rate", "50")),
    "stampede": Script(
        "stampede.py", "A stampede of processes", ("--duration", "6", "--processes", "2", "--ways", "early=1"), ()
    ),
    "faults": Script("faults.py", "Calls through faults", ("--quick", "--contenders", "aiokv", "aiokv-hedged")),
    "server": Script("server.py", "The server", ("--rounds", "1", "--only", "memory", "floor")),
    "kills": Script("kills.py", "A server killed with signal 9", ("--rounds", "2")),
    "failover": Script("failover.py", "Failover of a Redis Cluster", ("--rounds", "1", "--only", "stop")),
    "engines": Script("engines.py", "Engines", ("--smoke", "--concurrency", "4", "--only", "memory", "memory, served")),
    "scale": Script(
        "scale.py",
        "Machines for a load, by a model",
        ("--figures", "{figures}"),
        ("--figures", "{figures}"),
        "engines",
    ),
}


def machine() -> dict[str, Any]:
    """Describe the machine and the packages that the figures belong to."""
    model = ""
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        model = found[1] if found else ""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": versions,
    }


def run(name: str, folder: Path, *, smoke: bool) -> dict[str, Any]:
    """Run one script; return its figures, or why there are none."""
    script = SCRIPTS[name]
    file = folder / f"{name}.json"
    arguments = script.smoke if smoke else script.arguments
    if script.figures_of is not None:
        figures = folder / f"{script.figures_of}.json"
        if not figures.exists():
            return {"problem": f"run {script.figures_of} with it"}
        arguments = tuple(argument.format(figures=figures) for argument in arguments)
    command = [sys.executable, str(REPOSITORY / "benchmarks" / script.file), *arguments, "--json", str(file)]
    started = dt.datetime.now(dt.UTC)
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    sys.stdout.write(done.stdout)
    if done.returncode not in {MET, MISSED} or not file.exists():
        return {"problem": f"{script.file} ended with status {done.returncode}"}
    seconds = (dt.datetime.now(dt.UTC) - started).total_seconds()
    return {"at": started.isoformat(timespec="seconds"), "seconds": round(seconds), **json.loads(file.read_text())}


def newest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the newest figures of each script, with the machine that they are of."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        day = json.loads(path.read_text())
        for name, figures in day["scripts"].items():
            found[name] = {**figures, "machine": day["machine"], "day": path.stem}
    return found


def section(name: str, figures: Mapping[str, Any]) -> str:
    """Write the tables and the picture of a script's figures as Markdown."""
    of = figures["machine"]
    lines = [
        f"`benchmarks/{SCRIPTS[name].file}`, {figures['day']}, {figures['where']}; {of['processor']}, {of['system']}.",
        "",
        f"![{SCRIPTS[name].title}](pictures/bench-{name}.svg)",
        "",
    ]
    for table in figures["tables"]:
        lines += [f"| {table['title']} | {' | '.join(table['columns'])} |", f"|---|{'---:|' * len(table['columns'])}"]
        lines += [f"| {row} | {' | '.join(map(number, values))} |" for row, values in table["rows"].items()]
        lines.append("")
    return "\n".join(lines)


def aims(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Write every aim of every script as one table of Markdown."""
    lines = ["| aim | wanted | reached | |", "|---|---:|---:|---|"]
    for name, script in SCRIPTS.items():
        for aim in found[name]["aims"] if name in found else ():
            limit, reached = (f"{number(aim[part])} {aim['unit']}".rstrip() for part in ("aim", "figure"))
            outcome = "met" if aim["is_met"] else "**missed**"
            lines.append(f"| [{script.title}](#{slug(script.title)}): {aim['what']} | {limit} | {reached} | {outcome} |")
    return "\n".join((*lines, ""))


def slug(title: str) -> str:
    """Return the anchor of a heading, as Markdown's tools make it."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def renew(page: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page with what stands between its marks made anew."""

    def replaced(mark: re.Match[str]) -> str:
        name = mark[1]
        text = section(name, found[name]) if name in found else "Not measured yet.\n"
        if name == "aims":
            text = aims(found)
        return f"<!-- results:{name} -->\n{text}<!-- end -->"

    return re.sub(r"<!-- results:([\w-]+) -->\n.*?<!-- end -->", replaced, page, flags=re.DOTALL)


def write_pages(folder: Path, page: Path, pictures: Path) -> None:
    """Renew the page and the pictures."""
    found = newest(folder)
    pictures.mkdir(parents=True, exist_ok=True)
    for name, figures in found.items():
        (pictures / f"bench-{name}.svg").write_text(draw_bars(SCRIPTS[name].title, figures["tables"]), encoding="utf-8")
    page.write_text(renew(page.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(f"\n{page}: {len(found)} of {len(SCRIPTS)} scripts have figures")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SCRIPTS), metavar="NAME", help=f"some of: {', '.join(SCRIPTS)}")
    parser.add_argument("--smoke", action="store_true", help="only try whether the scripts run; their figures mean nothing")
    parser.add_argument("--pages", action="store_true", help="run none; renew the page and the pictures")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files of the days are (default: %(default)s)")
    parser.add_argument("--page", type=Path, default=PAGE, help="(default: %(default)s)")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.smoke and options.folder == FOLDER:
        parser.error("--smoke needs a --folder of its own: its figures mean nothing")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the scripts."""
    options = parse(arguments)
    problems: dict[str, str] = {}
    if not options.pages:
        day = options.folder / f"{dt.datetime.now(dt.UTC).date().isoformat()}.json"
        options.folder.mkdir(parents=True, exist_ok=True)
        names = options.only or list(SCRIPTS)
        with tempfile.TemporaryDirectory() as folder:
            for done, name in enumerate(names):
                print(f"\n[{done + 1}/{len(names)}] {SCRIPTS[name].title}: benchmarks/{SCRIPTS[name].file}", flush=True)
                figures = run(name, Path(folder), smoke=options.smoke)
                if "problem" in figures:
                    problems[name] = figures["problem"]
                    continue
                # Written after each, so that nothing is lost where a later one is interrupted.
                kept = json.loads(day.read_text())["scripts"] if day.exists() else {}
                kept[name] = figures
                day.write_text(json.dumps({"machine": machine(), "scripts": kept}, indent=1) + "\n", encoding="utf-8")
    if not options.smoke:
        write_pages(options.folder, options.page, options.pictures)
    for name, problem in problems.items():
        print(f"{name} has no figures: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
